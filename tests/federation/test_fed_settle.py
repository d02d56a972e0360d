"""Before a client uses a global model, its private part settles on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import config, digits

from fedkl.federation import Workspace, run
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.evaluate import correct_share, reestimate
from fedkl.federation.jobs import Job
from fedkl.federation.session import SETTLE_RATE, Session
from fedkl.rng import derive


def finished(folder: Path, defense: str, **federation: Any) -> tuple[Session, dict[str, Any]]:
    given = config(defense, federation={"settle_steps": 3, **federation})
    run(given, folder, bundle=digits())
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    assert latest is not None
    return Session(given, folder, digits()), dict(latest.shared)


def by_hand(session: Session, shared: Any, steps: int) -> float:
    state, space = session.store.load(1, before=3), session.workspace
    space.enter(shared, session.store.key(1), state.private)
    rate = SETTLE_RATE * session.config.training.lr
    space.join(shared, session.parts[1], derive(0, "settle", 1, 2), rate, steps=steps)
    exam = session._exam("test")
    reestimate(space, space.images, session.parts[1][:1000], every_norm=False)
    return correct_share(space.model, exam.images, exam.rows, space.device)


@pytest.mark.parametrize("defense", ["fedbn", "channel", "pad"])
def test_accuracy_is_that_after_settling(defense: str, tmp_path: Path) -> None:
    session, shared = finished(tmp_path, defense)
    private = {n: t.clone() for n, t in (session.store.load(1, before=3).private or {}).items()}
    own = session.run(Job("examine", 1, 2, "test"), shared).facts["own"]
    assert own == by_hand(session, shared, 3)
    # Only for the examination: nothing of it is kept.
    kept = session.store.load(1, before=3).private or {}
    assert all(torch.equal(kept[n], t) for n, t in private.items())
    session.config = dataclasses.replace(
        session.config, federation=dataclasses.replace(session.config.federation, settle_steps=0)
    )
    assert session.run(Job("examine", 1, 2, "test"), shared).facts["own"] == by_hand(
        session, shared, 0
    )


def test_no_more_than_an_epoch_and_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, shared = finished(tmp_path, "pad", settle_steps=1000)
    seen: list[tuple[float, int]] = []

    def join(self: Any, shared: Any, index: Any, generator: Any, lr: float, **how: Any) -> None:
        seen.append((lr, how["steps"]))

    monkeypatch.setattr(Workspace, "join", join)
    session.run(Job("examine", 0, 2, "test"), shared)
    size = session.config.training.batch_size
    assert seen == [(SETTLE_RATE * session.config.training.lr, -(-len(session.parts[0]) // size))]


def test_nobody_settles_on_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shared = finished(tmp_path, "channel", method="centralized")
    monkeypatch.setattr(Workspace, "join", lambda *args, **how: pytest.fail("it settled"))
    session.run(Job("examine", 0, 2, "test"), shared)
