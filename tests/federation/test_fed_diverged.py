"""Under a pad a client that diverged sends nothing, so that nothing is left uncounted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import config, digits, fixed_seed, make_keys, with_keys

from fedkl.federation import (
    ClientResult,
    Event,
    RunConfig,
    RunResult,
    Workspace,
    client_update,
    run,
)
from fedkl.federation.jobs import Job
from fedkl.federation.session import Session
from fedkl.federation.store import ClientStore


def pads(**more: Any) -> RunConfig:
    renewal = {"budget": None, **more.pop("renewal", {})}
    federation = {"rounds": 2, "join_steps": 2}
    return config("pad", data={"samples": 64}, federation=federation, renewal=renewal, **more)


def test_a_client_that_diverged_under_a_pad_sends_nothing(tmp_path: Path) -> None:
    """Its next try has the same pad and the count of before, on other batches."""
    session = Session(pads(renewal={"every": 1}), tmp_path, digits())
    shared = session.initial()
    session.run(Job("train", 0, 1), shared)
    broken = {n: torch.full_like(t, float("nan")) for n, t in shared.items() if t.ndim == 2}
    got = session.run(Job("train", 0, 2), {**shared, **broken})
    assert got.tensors == {}
    assert "client 0: training diverged in round 2" in got.facts["withheld"]
    assert (got.facts["renewed"], got.facts["spent"], got.facts["kept"]) == (False, 64, False)
    assert session.outlook(Job("train", 0, 3)) == (1, 1)
    after = session.run(Job("train", 0, 3), shared)
    assert (after.facts["renewed"], after.facts["spent"]) == (True, 64)
    assert set(after.tensors) == set(shared)


def two_rounds_of_which_client_1_is_refused(
    folder: Path, workers: int = 1
) -> tuple[list[str], RunResult]:
    with_keys(folder, make_keys(folder.parent / "keys", 3, seeds=True))
    wanted = pads(workers=workers)
    events: list[Event] = []
    result = run(wanted, folder, bundle=digits(), on_event=events.append)
    assert result.counts == {"refused": 2, "dropped": 0}
    return [e.message for e in events if e.kind == "note"], result


def test_an_update_that_left_counts_although_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(workspace: Workspace, shared: Any, task: Any, generator: Any) -> ClientResult:
        result = client_update(workspace, shared, task, generator)
        if task.client == 1:
            result.update.tensors["4.weight"].fill_(float("nan"))
        return result

    monkeypatch.setattr("fedkl.federation.session.client_update", spoiled)
    notes, _ = two_rounds_of_which_client_1_is_refused(tmp_path / "run")
    assert all("4.weight holds NaN" in note for note in notes)
    assert ClientStore(tmp_path / "run", keyed=True).load(1, before=9).spent == 128


@pytest.mark.parametrize("workers", [1, 2])
def test_a_round_goes_on_without_a_client_that_diverged(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = Workspace.enter

    def diverged(self: Workspace, shared: Any, key: Any, private: Any) -> None:
        enter(self, shared, key, private)
        if key.fingerprint == fixed_seed(1).fingerprint:
            self.model.get_parameter("1.weight").data.fill_(float("nan"))

    monkeypatch.setattr(Workspace, "enter", diverged)
    notes, result = two_rounds_of_which_client_1_is_refused(tmp_path / "run", workers)
    told = "client 1: training diverged in round {}"
    assert [told.format(r) in note for r, note in enumerate(notes, 1)] == [True, True]
    assert result.pads == {"renewals": 0, "most_presentations": 128}
    assert [line["refused"] for line in result.validation] == [[1], [1]]
    assert all(math.isfinite(line["loss"]) for line in result.validation)
