"""The in-process engine: rounds, evaluations and checkpoints around the one client update."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.data import DataBundle
from fedkl.errors import FederationError
from fedkl.federation.aggregate import Tally, accepted, aggregate
from fedkl.federation.checkpoint import Checkpoint, Checkpoints
from fedkl.federation.client import Update
from fedkl.federation.config import RunConfig
from fedkl.federation.evaluate import Accuracy, combine
from fedkl.federation.events import Event, RunResult
from fedkl.federation.folder import claimed
from fedkl.federation.jobs import Job, Result
from fedkl.federation.logbook import Logbook
from fedkl.federation.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from fedkl.federation.pool import Pool, ProcessPool, SerialPool
from fedkl.federation.remains import check_resumable
from fedkl.federation.session import Session, check_device
from fedkl.files import write_json
from fedkl.rng import derive

Combined = Callable[[Iterable[Update], bool], dict[str, Tensor]]


@dataclass
class _Progress:
    """What changes from round to round."""

    shared: dict[str, Tensor]
    server: dict[str, Tensor] = field(default_factory=dict)
    round: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"refused": 0, "dropped": 0})
    pads: dict[str, int] = field(default_factory=lambda: {"renewals": 0, "most_presentations": 0})
    budgets: list[dict[str, Any]] = field(default_factory=list)  # from which round on
    kept: dict[str, int] = field(default_factory=dict)  # client → round of its private state
    sealed: dict[str, str] = field(default_factory=dict)  # client → private layers of the round


def run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    bundle: DataBundle | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunResult:
    """Trains a federation and measures what its keys are worth.

    Writes ``config.json``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``clients/``
    and, for defenses with a key, ``keys/`` below ``folder``. The result does not depend on
    ``config.workers`` nor on interruptions; keys that are already in ``keys/`` are used.

    Args:
        config: The run.
        folder: Its folder; must not hold another run unless ``resume``.
        resume: Go on from the newest valid checkpoint.
        bundle: Data loaded already.
        on_event: Called with every event.

    Raises:
        ConfigError: The folder holds a run with other settings, or a device is missing.
        CheckpointError: No checkpoint can be used.
        FederationError: Too few updates are left in a round, or a worker died.
    """
    emit = on_event or (lambda event: None)
    check_device(config.device)
    with claimed(folder, resume=resume) as found, one_thread():
        check_resumable(found, config, folder)
        write_json(folder / "config.json", config.to_dict())
        session = Session(config, folder, bundle)
        engine = _Engine(config, folder, session, emit)
        with _pool(config, session, folder) as pool:
            return engine.run(pool)


def run_on(
    pool: Pool,
    session: Session,
    folder: Path,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    combined: Combined | None = None,
) -> RunResult:
    """:func:`run` with clients that are somewhere else, behind ``pool``.

    Args:
        pool: Does the jobs. It may leave out the results of clients that did not answer.
        session: Of the server, which needs no keys of its own.
        folder: As in :func:`run`; nothing private is written below it.
        resume: As in :func:`run`.
        on_event: As in :func:`run`.
        combined: Takes the place of :func:`aggregate`; gets the accepted updates, and whether to
            weight them by their number of examples.

    Raises:
        FedKLError: As :func:`run`.
    """
    with claimed(folder, resume=resume) as found, one_thread():
        check_resumable(found, session.config, folder, clients=False)
        write_json(folder / "config.json", session.config.to_dict())
        engine = _Engine(session.config, folder, session, on_event or (lambda event: None))
        engine.combined = combined or engine.combined
        return engine.run(pool)


def _pool(config: RunConfig, session: Session, folder: Path) -> Pool:
    if config.workers == 1:
        return SerialPool(session)
    if config.device == "cpu" and hasattr(os, "fork"):
        return ProcessPool(lambda: session, config.workers, fork=True)
    return ProcessPool(_Fresh(config, folder), config.workers, fork=False)


@dataclass(frozen=True)
class _Fresh:
    """Makes a session in a started process."""

    config: RunConfig
    folder: Path

    def __call__(self) -> Session:
        return Session(self.config, self.folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread, as every worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exam_jobs(session: Session, round_: int, split: str, sealed: Mapping[str, str]) -> list[Job]:
    """One job per client to be measured; without a private state all clients are the same."""
    count = 1
    if session.workspace.private:
        count = min(session.config.evaluation.clients, len(session.parts))
    return [Job("examine", client, round_, split, sealed=sealed) for client in range(count)]


def sample(config: RunConfig, count: int, number: int) -> tuple[list[int], list[int]]:
    """Of ``count`` clients those that answer in round ``number``, and those that drop out."""
    federation = config.federation
    generator = derive(config.seed, "sample", number)
    take = 1 if federation.method == "centralized" else federation.sampled
    chosen = torch.randperm(count, generator=generator)[:take].sort().values.tolist()
    lost = (torch.rand(len(chosen), generator=generator) < federation.dropout).tolist()
    answering = [c for c, gone in zip(chosen, lost, strict=True) if not gone]
    return answering, [c for c, gone in zip(chosen, lost, strict=True) if gone]


class _Engine:
    def __init__(
        self, config: RunConfig, folder: Path, session: Session, emit: Callable[[Event], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.session = session
        self.emit = emit
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.started = time.monotonic()
        self.state = self._restore()
        self.before = self.state.seconds
        self.combined: Combined = lambda updates, weighted: aggregate(updates, weighted=weighted)
        self.log = Logbook(folder, after=self.state.round)

    def _restore(self) -> _Progress:
        checkpoint, problems = self.checkpoints.latest()
        for problem in problems:
            self.emit(Event("note", message=problem))
        if checkpoint is None:
            return _Progress(self.session.initial())
        self.emit(Event("note", message=f"resumed after round {checkpoint.round}"))
        facts = checkpoint.facts
        return _Progress(
            shared=dict(checkpoint.shared),
            server=dict(checkpoint.server),
            round=checkpoint.round,
            seconds=facts["seconds"],
            best=dict(facts["best"]),
            counts=dict(facts["counts"]),
            pads=dict(facts.get("pads") or _Progress({}).pads),
            budgets=list(facts.get("budgets") or []),
            kept=dict(facts.get("kept") or {}),
            sealed=checkpoint.sealed,
        )

    def _seconds(self) -> float:
        return round(self.before + time.monotonic() - self.started, 3)

    def run(self, pool: Pool) -> RunResult:
        """All rounds that are left, then the test set, once."""
        rounds = self.config.federation.rounds
        self._note_budget()
        for warning in self.session.warnings():
            self.emit(Event("note", message=warning))
        try:
            while self.state.round < rounds:
                self._round(pool, self.state.round + 1)
            accuracy = self._measure(pool, "test")
        finally:
            self.log.close()
        result = RunResult(
            config=self.config,
            seconds=self._seconds(),
            accuracy=accuracy,
            validation=self.log.lines,
            best=self.state.best,
            counts=self.state.counts,
            pads=self.state.pads if self.session.padded else None,
            budgets=self.state.budgets if self.session.padded else None,
            spec=None if self.session.spec is None else self.session.spec.to_dict(),
            origin=self.session.bundle.origin,
            shared=self.state.shared,
        )
        write_json(self.folder / "summary.json", result.to_dict())
        return result

    def _note_budget(self) -> None:
        """Budgets may change on resume; the record says which rounds had which."""
        now = {"budget": self.config.renewal.budget, "on_spent": self.config.renewal.on_spent}
        known = self.state.budgets
        if not known or any(known[-1].get(name) != value for name, value in now.items()):
            known.append({"from_round": self.state.round + 1, **now})

    def _round(self, pool: Pool, number: int) -> None:
        config, state = self.config.federation, self.state
        asked, dropped = sample(self.config, len(self.session.parts), number)
        state.counts["dropped"] += len(dropped)
        keep = [*self.checkpoints.rounds(), state.best.get("round", 0)]
        jobs = [Job("train", c, number, keep=keep, sealed=state.sealed) for c in asked]
        tally, losses = Tally(), list[float]()
        results = self._watched(pool.run(jobs, state.shared), number, len(jobs), losses, tally)
        updates = accepted((r.update() for r in results), state.shared, tally)
        first = next(updates, None)
        mean = {} if first is None else self.combined(chain([first], updates), config.weighted)
        state.counts["refused"] += len(tally.refused)
        for message in tally.refused.values():
            self.emit(Event("note", message=message))
        if len(tally.accepted) < config.min_clients:
            raise FederationError(
                f"round {number}: {len(tally.accepted)} update(s) left of {len(asked)} asked "
                f"({len(dropped)} dropped out, {len(tally.refused)} refused), "
                f"min_clients is {config.min_clients}; lower dropout, the learning rate or "
                # Every reason is a note; of a hundred clients one is enough here.
                f"min_clients. {next(iter(tally.refused.values()), '')}".rstrip()
            )
        state.shared = self._apply(mean, number) if config.method == "fedsgd" else mean
        state.sealed = {str(c): tally.sealed[c] for c in tally.accepted if c in tally.sealed}
        state.round = number
        loss = math.fsum(losses) / max(1, len(losses))
        every = self.config.evaluation.every
        if every and (number % every == 0 or number == config.rounds):
            self._evaluate(pool, number, loss, tally, dropped)
        if number % self.config.checkpoint_every == 0 or number == config.rounds:
            self._checkpoint()
        self.emit(Event("round", number, config.rounds, loss=loss))

    def _watched(
        self,
        results: Iterator[Result],
        number: int,
        of: int,
        losses: list[float],
        tally: Tally,
    ) -> Iterator[Result]:
        for done, result in enumerate(results, 1):
            rounds = self.config.federation.rounds
            loss = result.facts.get("loss", math.nan)  # clients behind a wire keep theirs
            self.emit(Event("client", number, rounds, done, of, loss))
            self._count_pads(result.facts)
            if result.facts.get("kept"):  # clients behind a wire keep their states to themselves
                self.state.kept[str(result.job.client)] = number
            if reason := result.facts.get("withheld"):
                tally.refused[result.job.client] = reason
                continue
            if text := result.facts.get("sealed"):
                tally.sealed[result.job.client] = text
            losses.append(loss)
            yield result

    def _count_pads(self, facts: Mapping[str, Any]) -> None:
        """Clients behind a wire report nothing of their pads: a server has no business with it."""
        pads = self.state.pads
        pads["renewals"] += bool(facts.get("renewed"))
        pads["most_presentations"] = max(pads["most_presentations"], facts.get("spent", 0))
        if facts.get("note"):
            self.emit(Event("note", message=facts["note"]))

    def _apply(self, mean: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The server's optimizer step of fedsgd. Buffers are taken as averaged."""
        state, training = self.state, self.config.training
        workspace = self.session.workspace
        # A frozen parameter has no gradient, but weight decay would move it.
        learns = {n: workspace.names[p] for n, p in workspace.parameters.items() if p.requires_grad}
        canonical = {n: learns[n] for n in state.shared if n in learns}
        parameters = {n: nn.Parameter(state.shared[n].clone()) for n in canonical.values()}
        lr = learning_rate(training, number, self.config.federation.rounds)
        optimizer = make_optimizer(parameters.values(), lr, training)
        by_parameter = {p: n for n, p in parameters.items()}
        load_optimizer_tensors(optimizer, by_parameter, state.server)
        for name, parameter in parameters.items():
            parameter.grad = mean[name].clone()
        optimizer.step()
        state.server = {
            n: t.detach().clone() for n, t in optimizer_tensors(optimizer, by_parameter).items()
        }
        frozen = workspace.parameters.keys() - learns.keys()
        kept = {n: state.shared[n] for n in state.shared if n in frozen}
        moved = {n: parameters[c].detach().clone() for n, c in canonical.items()}
        found = {**mean, **kept, **moved}
        return {name: found[name] for name in state.shared}

    def _measure(self, pool: Pool, split: str) -> Accuracy:
        jobs = exam_jobs(self.session, self.state.round, split, self.state.sealed)
        return combine(r.accuracy() for r in pool.run(jobs, self.state.shared))

    def _evaluate(
        self, pool: Pool, number: int, loss: float, tally: Tally, dropped: list[int]
    ) -> None:
        accuracy = self._measure(pool, "validation")
        line = {
            "round": number,
            "seconds": self._seconds(),
            "loss": loss if math.isfinite(loss) else None,
            "accuracy": accuracy.to_dict(),
            "clients": len(tally.accepted),
            "refused": sorted(tally.refused),
            "dropped": dropped,
        }
        self.log.add(line)
        if accuracy.own_key > self.state.best.get("own_key", -1.0):
            self.state.best = {"round": number, "own_key": accuracy.own_key}
            self.checkpoints.save_best(self._snapshot())
        rounds = self.config.federation.rounds
        self.emit(Event("evaluation", number, rounds, loss=loss, accuracy=accuracy))

    def _snapshot(self) -> Checkpoint:
        state = self.state
        facts = {"seconds": self._seconds(), "best": state.best, "counts": state.counts}
        facts |= {"pads": state.pads, "budgets": state.budgets, "kept": state.kept}
        if state.sealed:  # as the server has them: nobody reads them without the clients' key
            facts |= {"sealed": state.sealed}
        return Checkpoint(state.round, state.shared, state.server, facts)

    def _checkpoint(self) -> None:
        self.checkpoints.save(self._snapshot())
