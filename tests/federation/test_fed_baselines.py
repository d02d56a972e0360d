"""Noise and pruning where clients send: on what moved, the same however a run is carried out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import (
    Stopped,
    assert_same,
    config,
    differ,
    digits,
    make_keys,
    outcome,
    snapshot,
    stop_after,
    task,
    with_keys,
    workspace,
)
from torch import Tensor

from fedkl.federation import TrainingConfig, Workspace, client_update, config_from, run
from fedkl.federation.length import length_of
from fedkl.pruning import kept
from fedkl.rng import derive

SMALL = TrainingConfig(batch_size=32)


def sent(space: Workspace, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(client_update(space, shared, task(), derive(0, "client", 0, 1)).update.tensors)


def moved(
    space: Workspace, shared: dict[str, Tensor], update: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The change of parameters; of a gradient that itself."""
    still = space.method == "fedsgd"
    names = [n for n in update if n in space.parameters]
    return {n: update[n] if still else update[n] - shared[n] for n in names}


def plain_and(defense: str, method: str, **lock: Any) -> list[Any]:
    """A workspace, its shared state, and what is sent without and with the defense."""
    space = workspace(f"norm+{defense}", SMALL, model="lenet", method=method, lock=lock)
    bare = workspace("norm", SMALL, model="lenet", method=method)
    shared = snapshot(space.shared)
    assert_same(shared, snapshot(bare.shared))
    return [space, shared, sent(bare, shared), sent(space, shared)]


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_pruning_keeps_the_largest_changes_of_every_tensor(method: str) -> None:
    space, shared, plain, found = plain_and("prune", method, prune_ratio=0.75)
    change = moved(space, shared, plain)
    for name, value in moved(space, shared, found).items():
        stays = kept(change[name], 0.75)
        assert torch.equal(value != 0, stays & (change[name] != 0))
        assert torch.equal(found[name][stays], plain[name][stays])
    for name in plain.keys() - change.keys():  # running statistics
        assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_noise_is_on_the_clipped_change(method: str) -> None:
    space, shared, plain, found = plain_and("noise", method, clip=0.01, noise_multiplier=0.1)
    change = moved(space, shared, plain)
    assert length_of(change) > 0.01
    now = moved(space, shared, found)
    noise = torch.cat([(now[n] - change[n] * 0.01 / length_of(change)).flatten() for n in now])
    assert float(noise.std()) == pytest.approx(0.001, rel=0.05)
    assert abs(float(noise.mean())) < 5 * 0.001 / len(noise) ** 0.5
    for name in plain.keys() - change.keys():
        assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_the_length_comes_first(method: str) -> None:
    """The clip and the share of what is pruned are then of an update that has it."""
    training = dataclasses.replace(SMALL, update_length=0.3)
    lock = {"clip": 0.2, "noise_multiplier": 0.0, "prune_ratio": 0.0}
    space = workspace("norm+prune+noise", training, model="lenet", method=method, lock=lock)
    shared = snapshot(space.shared)
    size = length_of(moved(space, shared, sent(space, shared)))
    assert size == pytest.approx(0.2, rel=1e-4)
    space = workspace("norm+prune", training, model="lenet", method=method)
    assert length_of(moved(space, shared, sent(space, shared))) < 0.299


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", ["noise", "prune"])
def test_a_tied_parameter_is_sent_alike_under_both_names(defense: str, method: str) -> None:
    space = workspace(defense, SMALL, model="fedhelp:tied", method=method)
    shared = snapshot(space.shared)
    found = sent(space, shared)
    assert torch.equal(found["middle.weight"], found["again.weight"])
    assert differ(found, shared)


@pytest.mark.parametrize("defense", ["norm+noise", "norm+prune", "pad+prune+noise"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(defense: str, tmp_path: Path) -> None:
    settings = config(defense, federation={"rounds": 3, "join_steps": 2})
    keys = make_keys(tmp_path / "keys", 3, seeds=True)
    for name in ("one", "two"):
        with_keys(tmp_path / name, keys)
    one = run(settings, tmp_path / "one", bundle=digits())
    with pytest.raises(Stopped):
        run(settings, tmp_path / "two", bundle=digits(), on_event=stop_after(2))
    two = run(settings, tmp_path / "two", resume=True, bundle=digits())
    assert_same(one.shared, two.shared)
    assert outcome(tmp_path / "one")["metrics"] == outcome(tmp_path / "two")["metrics"]


def test_every_client_and_round_has_noise_of_its_own() -> None:
    space = workspace("noise", SMALL, lock={"clip": 1e-9, "noise_multiplier": 1e9})
    shared = snapshot(space.shared)
    found = []
    for client, round_ in ((0, 1), (1, 1), (0, 2), (0, 1)):
        generator = derive(0, "client", client, "round", round_)
        update = client_update(space, shared, task(), generator).update.tensors
        found.append(torch.cat([v.flatten() for v in moved(space, shared, dict(update)).values()]))
    assert torch.equal(found[0], found[3])
    together = torch.corrcoef(torch.stack(found[:3])) - torch.eye(3)
    assert float(together.abs().max()) < 0.1


def test_settings_of_a_run_before_these_are_those_of_a_run_without(tmp_path: Path) -> None:
    settings = config("norm", federation={"rounds": 1, "join_steps": 2})
    run(settings, tmp_path, bundle=digits())
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    for name in ("clip", "noise_multiplier", "prune_ratio"):
        assert old["defense"].pop(name) is None
    path.write_text(json.dumps(old))
    assert config_from(old) == settings
    more = dataclasses.replace(
        settings, federation=dataclasses.replace(settings.federation, rounds=2)
    )
    run(more, tmp_path, resume=True, bundle=digits())
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == 2
