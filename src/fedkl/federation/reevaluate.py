"""A finished or interrupted run, measured again from its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fedkl.data import DataBundle
from fedkl.errors import CheckpointError, ConfigError, unknown
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.config import RunConfig, config_from
from fedkl.federation.engine import exam_jobs, one_thread, sample
from fedkl.federation.evaluate import Accuracy, combine
from fedkl.federation.folder import claimed
from fedkl.federation.remains import check_remains
from fedkl.federation.session import Session, check_device

SPLITS: Final = ("validation", "test")
CHECKPOINTS: Final = ("last", "best")


@dataclass(frozen=True)
class Reevaluation:
    """Accuracy after ``round`` on ``split``; ``notes`` name damaged checkpoints passed over."""

    config: RunConfig
    round: int
    split: str
    accuracy: Accuracy
    notes: tuple[str, ...]


def reevaluate(
    folder: Path,
    *,
    split: str = "test",
    checkpoint: str = "last",
    device: str | None = None,
    bundle: DataBundle | None = None,
) -> Reevaluation:
    """Measures a run again, with the keys and private states of its folder; trains nothing.

    The figures are the run's own on the same machine: wrong keys come out of the own key's stream.

    Args:
        folder: The run's folder.
        split: ``validation`` or ``test``.
        checkpoint: ``last``, or ``best`` by validation accuracy with the own key.
        device: Another device than the run's.
        bundle: Data loaded already.

    Raises:
        ConfigError: An unknown split or checkpoint, or the device is not there.
        CheckpointError: There is no run or no usable checkpoint, or the private states of that
            round are no longer kept.
        KeyFileError: A key is missing or damaged, or is not the one the lock was trained with.
    """
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS))
    if checkpoint not in CHECKPOINTS:
        raise ConfigError(unknown("checkpoint", checkpoint, CHECKPOINTS))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no run (no config.json); check the path.")
    with claimed(folder, resume=True) as found, one_thread():
        assert found is not None
        config = config_from(found, source=str(folder / "config.json"))
        config = dataclasses.replace(config, device=device or config.device)
        check_device(config.device)
        round_, shared, sealed, notes = _state(folder, checkpoint, config)
        session = Session(config, folder, bundle)
        _check_private(session, round_)
        jobs = exam_jobs(session, round_, split, sealed)
        accuracy = combine(session.run(job, shared).accuracy() for job in jobs)
    return Reevaluation(config, round_, split, accuracy, tuple(notes))


def _state(
    folder: Path, checkpoint: str, config: RunConfig
) -> tuple[int, Mapping[str, Tensor], Mapping[str, str], list[str]]:
    """Round, shared state and what clients sealed, of a checkpoint.

    Keys and private states of its clients are all there.
    """
    check_remains(folder, config)
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoint == "best":
        if not (checkpoints.folder / "best.safetensors").exists() and not config.evaluation.every:
            raise CheckpointError(
                f"{folder} has no best checkpoint, for the run never validated (--eval-every 0); "
                "use --checkpoint last."
            )
        best = checkpoints.load_best()
        return best.round, best.shared, best.sealed, []
    latest, problems = checkpoints.latest()
    if latest is None:
        raise CheckpointError(
            f"there is no checkpoint in {folder}: its first round never ended. Continue the run "
            "with --resume first."
        )
    return latest.round, latest.shared, latest.sealed, problems


def _check_private(session: Session, round_: int) -> None:
    if not session.workspace.private:
        return
    played = (sample(session.config, len(session.parts), n)[0] for n in range(1, round_ + 1))
    took_part = {client for clients in played for client in clients}
    for job in exam_jobs(session, round_, "test", {}):
        kept = session.store.rounds(job.client)
        # One that took part later only had no lock yet, and is measured as it was then.
        if job.client in took_part and kept and kept[0] > round_:
            raise CheckpointError(
                f"the lock that client {job.client} had after round {round_} is no longer kept "
                f"(the oldest is of round {kept[0]}); use --checkpoint last."
            )
