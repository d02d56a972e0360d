"""Updates of one length: what is sent, in which direction, and what stays as it is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from fedhelp import assert_same, config, digits, snapshot, task, workspace
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkl import at_length
from fedkl.errors import ConfigError, StateError
from fedkl.federation import ClientTask, TrainingConfig, Workspace, client_update, run
from fedkl.federation.length import length_of
from fedkl.federation.session import Session
from fedkl.key import Key
from fedkl.rng import derive

SMALL = TrainingConfig(batch_size=32)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors.values()])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(1e-6, 1e6), st.integers(0, 9))
def test_the_whole_has_the_length_and_the_direction_it_had(
    sizes: list[int], length: float, seed: int
) -> None:
    generator = derive(seed, "update")
    update = {str(i): torch.randn(n, 2, generator=generator).double() for i, n in enumerate(sizes)}
    before = {name: value.clone() for name, value in update.items()}
    found = at_length(update, length)
    assert found.keys() == update.keys()
    torch.testing.assert_close(flat(found), flat(update) * length / float(flat(update).norm()))
    assert length_of(found) == pytest.approx(length)
    assert_same(update, before)


def test_weights_keep_to_what_was_received_and_the_rest_is_as_it_was() -> None:
    received = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "mean": torch.zeros(2)}
    update = {"w": torch.tensor([4.0, 2.0]), "b": torch.tensor([7.0]), "mean": torch.ones(2)}
    found = at_length(update, 10.0, received=received, names={"w", "b"})
    assert found["w"].tolist() == [7.0, 2.0]
    assert found["b"].tolist() == [11.0]
    assert found["mean"].tolist() == [1.0, 1.0]
    assert at_length(received, 10.0, received=received) == received
    counted = at_length({"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}, 10.0)
    assert counted["w"].tolist() == [6.0, 8.0]
    assert counted["n"].equal(torch.tensor(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_update_is_stretched_as_any_other(dtype: torch.dtype) -> None:
    """The factor itself may be more than the dtype holds."""
    tiny = torch.finfo(dtype).smallest_normal / 64
    found = at_length({"w": torch.tensor([tiny, 0.0], dtype=dtype)}, 2.0)["w"]
    assert found.dtype == dtype
    assert found.tolist() == [2.0, 0.0]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a finite number above 0, got 0"):
        at_length({"w": torch.ones(1)}, 0.0)
    with pytest.raises(StateError, match=r"received weights lack w of the update"):
        at_length({"w": torch.ones(1)}, 1.0, received={})
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=rf"a finite number above 0, got {value}"):
            at_length({"w": torch.ones(1)}, value)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"update_length"):
            TrainingConfig(update_length=value)


def sent(space: Workspace, shared: dict[str, Tensor], given_: ClientTask) -> dict[str, Tensor]:
    return dict(client_update(space, shared, given_, derive(0, "client", 0, 1)).update.tensors)


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
@pytest.mark.parametrize("defense", ["none", "norm", "pad"])
def test_a_client_sends_its_update_at_the_length_asked_for(defense: str, method: str) -> None:
    key = Key.generate() if defense == "pad" else None
    model = "fedhelp:normed" if defense == "none" else "lenet"
    space = workspace(defense, SMALL, model=model)
    space.method = method
    shared, half = snapshot(space.shared), SMALL.lr / 2  # the schedule's rate at some round
    one = dataclasses.replace(task(key=key), lr=half)
    plain = sent(space, shared, one)
    space.training = dataclasses.replace(SMALL, update_length=0.3)
    found = sent(space, shared, one)
    moving = {n for n in found if n in space.parameters}
    assert found.keys() == plain.keys()
    start = {n: shared[n] if method == "fedavg" else torch.zeros_like(shared[n]) for n in moving}
    before = {n: plain[n] - start[n] for n in moving}
    after = {n: found[n] - start[n] for n in moving}
    wanted = 0.15 if method == "fedavg" else 0.3
    assert length_of(before) != pytest.approx(wanted, rel=0.01)
    assert length_of(after) == pytest.approx(wanted, rel=1e-4)
    assert float(torch.cosine_similarity(flat(before), flat(after), dim=0)) > 0.9999
    for name in found.keys() - moving:  # running statistics
        assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_the_server_moves_by_what_one_client_sent(method: str, tmp_path: Path) -> None:
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    settings = config(
        "norm",
        training={"batch_size": 32, "lr": 0.5, "update_length": 0.25, **plain},
        federation={"clients": 1, "rounds": 1, "join_steps": 0, "method": method},
    )
    start = Session(settings, tmp_path / "other", digits()).initial()
    found = run(settings, tmp_path / "run").shared
    moved = {n: found[n] - start[n] for n in start if n.endswith(("weight", "bias"))}
    # Gradients are sent at the length, and the server steps along them at the rate.
    assert length_of(moved) == pytest.approx(0.25 if method == "fedavg" else 0.125, rel=1e-3)


@pytest.mark.parametrize("method", ["fedavg", "fedsgd"])
def test_a_tied_parameter_counts_once_and_is_sent_alike_under_both_names(method: str) -> None:
    training = dataclasses.replace(SMALL, update_length=0.3)
    space = workspace("none", training, model="fedhelp:tied", method=method)
    shared = snapshot(space.shared)
    found = sent(space, shared, task())
    assert torch.equal(found["middle.weight"], found["again.weight"])
    once = {n: t - (shared[n] if method == "fedavg" else 0) for n, t in found.items()}
    del once["again.weight"]
    assert length_of(once) == pytest.approx(0.3, rel=1e-4)


def test_at_a_rate_of_zero_nothing_moves_and_nothing_is_stretched() -> None:
    space = workspace("none", dataclasses.replace(SMALL, update_length=0.3), model="fedhelp:mlp")
    shared = snapshot(space.shared)
    assert_same(sent(space, shared, dataclasses.replace(task(), lr=0.0)), shared)


@pytest.mark.parametrize(
    "method, changed, said",
    [
        ("fedavg", {}, True),
        ("fedavg", {"weight_decay": 0.0}, False),
        ("fedavg", {"update_length": None}, False),
        ("fedsgd", {}, False),  # the server's decay, of its own weights
    ],
)
def test_a_run_says_that_decay_gives_the_length_away(
    method: str, changed: dict[str, float | None], said: bool, tmp_path: Path
) -> None:
    settings = config(
        "none",
        training={"weight_decay": 0.01, "update_length": 0.25, **changed},
        federation={"method": method},
    )
    notes = Session(settings, tmp_path, digits()).warnings()
    assert any("weight decay of 0.01" in note for note in notes) == said
