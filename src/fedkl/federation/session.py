"""Everything a process needs to play clients: data, parts, model, keys, private states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedkl.data import DataBundle, load, partition
from fedkl.defenses import Composed, Defense, LockDefense, make_defense
from fedkl.errors import ConfigError, KeyFileError
from fedkl.federation.client import ClientTask, Update, Workspace, client_update
from fedkl.federation.config import RunConfig
from fedkl.federation.evaluate import Exam, examine
from fedkl.federation.jobs import Job, Result
from fedkl.federation.length import decayed
from fedkl.federation.optim import learning_rate
from fedkl.federation.renewal import (
    Use,
    Verdict,
    epoch_at,
    excess,
    foresee,
    judge,
    presentations,
    raised,
    withheld,
)
from fedkl.federation.sealed import Opener, check_random, seal
from fedkl.federation.store import ClientState, ClientStore
from fedkl.key import Key
from fedkl.locking import LockSpec, Pad, is_locked, lock_spec
from fedkl.models import build
from fedkl.rng import derive

_Lock = tuple[Key | None, Mapping[str, Tensor]]
SETTLE_RATE: Final = 0.1  # of the learning rate, for a client's private part after the last round


class Session:
    """Plays any client of the run that ``config`` describes.

    Args:
        config: The run.
        folder: Run folder with ``keys/`` and ``clients/``.
        bundle: Data loaded already, to share it between runs.
    """

    def __init__(self, config: RunConfig, folder: Path, bundle: DataBundle | None = None) -> None:
        self.config = config
        self.bundle = load_data(config) if bundle is None else bundle
        self.parts = _parts(config, self.bundle)
        defense = make_defense(config.defense)
        self.store = ClientStore(folder, keyed=defense.keyed, one=config.defense.one_key)
        if self.store.one:  # made here, before workers could each make one
            whole = self.store.group()
            if self.seals:
                check_random(whole, self.store.keys / "group.key")
        plain = build(
            config.model.name,
            num_classes=self.bundle.num_classes,
            channels=config.data.channels,
            image_size=config.data.image_size,
            generator=derive(config.seed, "model"),
            init=None if config.model.init is None else Path(config.model.init),
        )
        example = self.bundle.public.batch(torch.arange(min(4, len(self.bundle.public))))[0]
        # A throwaway key: enter() replaces key and lock by the client's before anything is used.
        throwaway = Key.generate() if defense.keyed else None
        centralized = config.federation.method == "centralized"
        training = config.training
        if centralized:
            training = dataclasses.replace(training, keep_momentum=True)
        self.workspace = Workspace(
            defense.prepare(plain, throwaway, example),
            defense,
            self.bundle.train,
            training,
            method=config.federation.method,
            augmented=config.data.augment,
            device=config.device,
            join_steps=0 if centralized else config.federation.join_steps,
            group=self.store.group() if _grouped(config, defense) else None,
        )

    @property
    def group(self) -> Key | None:
        """The key that all clients have: where locks start, or the only one; None without."""
        return self.store.group() if self.store.one else self.workspace.group

    def initial(self) -> dict[str, Tensor]:
        """Global shared state before the first round."""
        return {name: tensor.clone() for name, tensor in self.workspace.shared.items()}

    @property
    def spec(self) -> LockSpec | None:
        """The lock spec, None without a lock."""
        model = self.workspace.model
        return lock_spec(model) if is_locked(model) else None

    def run(self, job: Job, shared: Mapping[str, Tensor]) -> Result:
        """Does ``job`` on the global state ``shared``."""
        return self._train(job, shared) if job.kind == "train" else self._examine(job, shared)

    def _train(self, job: Job, shared: Mapping[str, Tensor]) -> Result:
        config = self.config
        state = self._start(job, after=job.round - 1)
        verdict, epoch = self._verdict(job, state)
        task = ClientTask(
            renew=verdict.renew,
            epoch=epoch,
            renew_steps=config.renewal.steps,
            keep_learned=config.renewal.keep_learned,
            client=job.client,
            round=job.round,
            index=self.parts[job.client],
            key=self.store.key(job.client),
            private=state.private,
            moments=state.moments,
            join=state.private is None or state.round != job.round - 1,
            lr=learning_rate(config.training, job.round, config.federation.rounds),
        )
        generator = derive(config.seed, "client", job.client, "round", job.round)
        result = client_update(self.workspace, shared, task, generator)
        spent = result.presentations * self._users + (0 if verdict.renew else state.spent)
        kept = ClientState(job.round, result.private, result.moments, spent)
        # A client that diverged goes back to its last good state instead of staying refused.
        keep = bool(result.private or result.moments) and _finite(kept)
        if keep:
            self.store.save(job.client, kept, keep=job.keep)
        update = result.update
        told = {"kind": update.kind, "examples": update.examples, "loss": result.loss}
        facts: dict[str, Any] = {**told, "kept": keep}
        if (self.padded or self.seals) and not keep:
            # Its next try has the pad and the count of before: nothing may have left under them.
            facts |= {"renewed": False, "spent": state.spent}
            return Result(job, facts | {"withheld": withheld(job.client, job.round)}, {})
        if self.padded:
            facts |= {"renewed": verdict.renew, "spent": spent, "note": verdict.note}
        if self.seals:
            facts |= {"sealed": self._sealed(update, result.private)}
        return Result(job, facts, update.tensors)

    def _sealed(self, update: Update, private: Mapping[str, Tensor]) -> str:
        of = {"client": update.client, "round_": update.round, "examples": update.examples}
        return seal(private, self.store.group(), **of)

    def _verdict(self, job: Job, state: ClientState) -> tuple[Verdict, int]:
        """Whether the client draws another pad before the round, and the epoch of what it has."""
        now = state.epoch
        if not self.padded or self.config.federation.method == "centralized":
            return Verdict(renew=False), now
        verdict = judge(
            self.config.renewal,
            client=job.client,
            clients=len(self.parts),
            round_=job.round,
            last=0 if state.private is None else state.round,
            spent=state.spent,
            ahead=self._ahead(job.client),
            use=self._use,
        )
        if not self.store.one:
            return verdict, now + verdict.renew
        # That of the calendar: who was absent, or is new, would else be left with another pad.
        epoch = max(now, epoch_at(self.config.renewal, job.round))
        return (Verdict(renew=True) if epoch > now else verdict), epoch

    def outlook(self, job: Job) -> tuple[int, int]:
        """How :meth:`run` would begin a ``train`` job, which changes nothing yet.

        Returns:
            The round of its own private state, as it starts (0: none), and the epoch of the pad
            that it trains under (0 for other locks).

        Raises:
            FederationError: The client's budget does not cover the round (``on_spent`` ``error``).
            CheckpointError, KeyFileError: As :meth:`fedkl.federation.store.ClientStore.load`.
        """
        own = self._state(job.client, before=job.round)  # its count and momentum, not the mean
        return own.round, self._verdict(job, self._start(job, after=job.round - 1))[1]

    def _ahead(self, client: int) -> int:
        method = self.config.federation.method
        one = presentations(self.config.training, method, len(self.parts[client]))
        return one * self._users

    @property
    def _users(self) -> int:
        """How many use a pad up; a client counts the others' images as many as its own."""
        return len(self.parts) if self.store.one else 1

    @property
    def _use(self) -> Use:
        length = self.config.training.update_length
        return Use(together=self.store.one, at_length=length is not None)

    @property
    def padded(self) -> bool:
        """Whether the lock has a pad, which is used up by presentations."""
        return self.spec is not None and self.spec.scheme == Pad.name

    def warnings(self) -> list[str]:
        """What a user should know about lock and length before the first round."""
        method = self.config.federation.method
        found = [decayed(self.config.training)] if method == "fedavg" else []
        if not self.padded or method == "centralized":
            return [text for text in found if text]
        most, renewal = max(map(self._ahead, range(len(self.parts)))), self.config.renewal
        found.append(excess(renewal, most, self._use) or raised(renewal, self._use))
        if self.config.model.init is not None:
            found.append(
                "the stem starts from the key, not from the weights given; for the layers behind, "
                "which the server knows, the pad makes no claim."
            )
        return [text for text in found if text]

    def check_budget(self) -> None:
        """Raises what a client would raise in some round whose pad is not allowed another one.

        Raises:
            FederationError: A budget does not cover the rounds that are certain to be asked of it.
        """
        if not self.padded or self.config.federation.method == "centralized":
            return
        federation = self.config.federation
        # Whoever is asked, its first round is certain; all of them only where nobody is left out.
        everybody = federation.sampled == len(self.parts) and not federation.dropout
        rounds = federation.rounds if everybody else 1
        ahead = [self._ahead(client) for client in range(len(self.parts))]
        foresee(self.config.renewal, ahead, rounds, self._use)

    def _start(self, job: Job, *, after: int) -> ClientState:
        """What a client goes on from after round ``after``: its own, or all clients' mean."""
        return self.state(job.client, after=after, sealed=job.sealed)

    def state(self, client: int, *, after: int, sealed: Mapping[str, str]) -> ClientState:
        """The private state that a client goes on from after round ``after``.

        Args:
            client: Number of the client.
            after: The round.
            sealed: Private layers that clients sealed in that round, if they do.

        Raises:
            CheckpointError, KeyFileError: As :meth:`fedkl.federation.store.ClientStore.load`.
            FederationError: They are missing, or not what clients with this key sealed then.
        """
        own = self._state(client, before=after + 1)
        if not self.seals or after == 0:
            return own
        return self._opener.going_on(client, own, self.store.group(), after=after, sealed=sealed)

    @property
    def seals(self) -> bool:
        """Whether clients send each other their private layers; without a key they have none."""
        return self.config.federation.seal_private and self.store.one

    @cached_property
    def _opener(self) -> Opener:
        weighted, learned = self.config.federation.weighted, self.config.renewal.keep_learned
        return Opener(self.workspace.private, weighted=weighted, keep_learned=learned)

    def _state(self, client: int, *, before: int) -> ClientState:
        if not (self.workspace.private or self.workspace.training.keep_momentum):
            return ClientState(before - 1, None, {})
        return self.store.load(client, before=before)

    def _examine(self, job: Job, shared: Mapping[str, Tensor]) -> Result:
        state = self._start(job, after=job.round)
        key = self.store.key(job.client)
        self.workspace.enter(shared, key, state.private)
        if job.round > 0 and state.round < job.round:
            config, mine = self.config, self.parts[job.client]
            lr = learning_rate(config.training, job.round, config.federation.rounds)
            generator = derive(config.seed, "examine", job.client, job.round)
            epoch = epoch_at(config.renewal, job.round)
            if key is not None and self.store.one and self.padded and epoch > state.epoch:
                self.workspace.renew(key, epoch, keep_learned=config.renewal.keep_learned)
            self.workspace.join(shared, mine, generator, lr, first=state.private is None)
        if job.round > 0:
            self._settle(job, shared)
        found = examine(
            self.workspace,
            self._exam(job.split),
            key,
            self._others(job, state),
            self.parts[job.client][: self.config.evaluation.calibration_images],
        )
        return Result(job, dataclasses.asdict(found), {})

    def _settle(self, job: Job, shared: Mapping[str, Tensor]) -> None:
        """A few slow lock-only steps, after the aggregation and before the model is used."""
        config, mine = self.config, self.parts[job.client]
        if config.federation.method == "centralized" or not config.federation.settle_steps:
            return  # nobody else has moved the weights, or nobody is to settle
        epoch = math.ceil(len(mine) / config.training.batch_size)
        steps = min(config.federation.settle_steps, epoch)
        generator = derive(config.seed, "settle", job.client, job.round)
        self.workspace.join(shared, mine, generator, SETTLE_RATE * config.training.lr, steps=steps)

    def _others(self, job: Job, mine: ClientState) -> list[_Lock]:
        if not self.workspace.private:
            return []
        if self.seals and job.round > 0 and mine.private is not None:  # all go on from one mean
            return [(self.store.group(), mine.private)] if len(self.parts) > 1 else []
        others: list[_Lock] = []
        for step in range(1, len(self.parts)):
            if len(others) == self.config.evaluation.clients:
                break
            other = (job.client + step) % len(self.parts)
            try:
                state = self._state(other, before=job.round + 1)
            except KeyFileError:  # which its own jobs say; it has no lock that opens anything
                continue
            if state.private is not None:
                others.append((self.store.key(other), state.private))
        return others

    def _exam(self, split: str) -> Exam:
        return self._exams[split]

    @cached_property
    def _exams(self) -> dict[str, Exam]:
        config = self.config.evaluation
        exams = {}
        for split, images in (("validation", self.bundle.validation), ("test", self.bundle.test)):
            order = torch.randperm(len(images), generator=derive(0, "exam", split))
            rows = order if split == "test" else order[: config.images]
            exams[split] = Exam(
                images=images,
                rows=rows,
                wrong_rows=rows[: config.wrong_key_images],
                public=self.bundle.public,
                public_rows=torch.arange(min(config.thief_images, len(self.bundle.public))),
                wrong_keys=config.wrong_keys,
            )
        return exams


def _finite(state: ClientState) -> bool:
    tensors = [*(state.private or {}).values(), *state.moments.values()]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _grouped(config: RunConfig, defense: Defense) -> bool:
    parts = defense.parts if isinstance(defense, Composed) else (defense,)
    locks = [part.scheme for part in parts if isinstance(part, LockDefense)]
    return config.defense.group_key and any(scheme.takes_group for scheme in locks)


def load_data(config: RunConfig) -> DataBundle:
    """The data of ``config``; raises as :func:`fedkl.data.load`."""
    data = config.data
    return load(
        data.dataset,
        root=None if data.root is None else Path(data.root),
        seed=config.seed,
        image_size=data.image_size,
        channels=data.channels,
    )


def _parts(config: RunConfig, bundle: DataBundle) -> list[Tensor]:
    data = config.data
    parts = partition(
        bundle.train.labels,
        config.federation.clients,
        data.partition,
        generator=derive(config.seed, "partition"),
        alpha=data.alpha,
        shards_per_client=data.shards_per_client,
        samples=data.samples,
    )
    return [torch.cat(parts)] if config.federation.method == "centralized" else parts


def check_device(name: str) -> None:
    """Raises unless torch can compute on ``name``.

    Raises:
        ConfigError: Unknown device, or not on this machine.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used: {reason}; try device = 'cpu'."
        ) from error
