"""A client's side of a federation: its folder, its keys, and the in-process engine's session."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkl.data import DataBundle
from fedkl.defenses import Composed, Defense
from fedkl.errors import ConfigError, KeyFileError, UpdateError
from fedkl.federation import RunConfig
from fedkl.federation.engine import one_thread
from fedkl.federation.jobs import Job, Result
from fedkl.federation.session import Session
from fedkl.files import make_folder, read_json, write_json
from fedkl.flower.answers import Answer, Answers, alone, digest_of
from fedkl.flower.settings import FlowerConfig, digest

LoadData = Callable[[Any], DataBundle]


@dataclass(frozen=True)
class Place:
    """Where a client lives, from its node config.

    Attributes:
        client: Number of the client, from 0 (``partition-id``).
        folder: Keys and private states (``fedkl-folder``).
        key, group: Key files elsewhere (``key-file``, ``group-key-file``); None: in ``folder``.
    """

    client: int
    folder: Path
    key: Path | None = None
    group: Path | None = None


def place_of(node_config: Mapping[str, Any], folder: str, clients: int) -> Place:
    """The place that a node config describes.

    Args:
        node_config: Flower's, of one node.
        folder: Where a node that names no folder keeps its files.
        clients: Number of clients of the federation.

    Raises:
        ConfigError: ``partition-id`` is missing or out of range.
    """
    number = node_config.get("partition-id")
    if type(number) is not int or not 0 <= number < clients:
        raise ConfigError(
            f"partition-id in the node config must be a whole number from 0 to {clients - 1}, got "
            f"{number!r}; start the SuperNode with --node-config 'partition-id=0 ...'."
        )
    path, key, group = (node_config.get(n) for n in ("fedkl-folder", "key-file", "group-key-file"))
    return Place(
        number,
        Path(str(path or folder)).expanduser().absolute(),
        None if key is None else Path(str(key)).expanduser().absolute(),
        None if group is None else Path(str(group)).expanduser().absolute(),
    )


class Node:
    """Plays the clients that live in one folder; made once per process.

    Args:
        config: The run.
        folder: The folder; keys that are neither there nor linked are made on first use.
        bundle: The client's own data. None: the data set of ``config``, of which a client takes
            its part.
    """

    def __init__(self, config: RunConfig, folder: Path, bundle: DataBundle | None = None) -> None:
        self.config = config
        self.session = make_session(config, folder, bundle)
        self.start = self.session.initial()

    def run(self, job: Job, shared: Mapping[str, Tensor], *, proximal: float = 0.0) -> Result:
        """Does ``job`` as the in-process engine would, on one thread.

        Args:
            job: To train or to examine.
            shared: Global state.
            proximal: Weight of FedProx's term.

        Raises:
            FederationError: A pad would answer another question under a round that was answered
                already, or one of before the last (:class:`fedkl.flower.answers.Answers`).
            UpdateError: Training diverged, with a pad or with private layers that go to others.
            FedKLError: As :meth:`fedkl.federation.session.Session.run`.
        """
        with one_thread(), self._proximal(proximal):
            if job.kind == "train" and self.session.padded:
                return self._once(job, shared, proximal)
            return _sendable(self.session.run(job, shared))

    def _once(self, job: Job, shared: Mapping[str, Tensor], proximal: float) -> Result:
        """A pad answers a question once, or the same again; on record before it leaves."""
        store = self.session.store
        with alone(store.folder(job.client)):
            answers = Answers(store, job.client)
            sealed = sorted(job.sealed.items())
            asked = digest_of([job.round, proximal, self._settings(), sealed], shared)
            answers.check_question(job.round, asked)
            base, epoch = self.session.outlook(job)
            answers.check_pad(job.round, base, epoch)
            result = _sendable(self.session.run(job, shared))
            answers.add(job.round, Answer(asked, base, epoch, result.facts["spent"]))
        return result

    def _settings(self) -> str:
        """Of what a resumed run may not change; a budget it may."""
        renewal = dataclasses.replace(self.config.renewal, budget=None, on_spent="warn")
        return digest(dataclasses.replace(self.config, renewal=renewal), FlowerConfig())

    @contextlib.contextmanager
    def _proximal(self, weight: float) -> Iterator[None]:
        space = self.session.workspace
        plain = space.defense
        if weight:
            space.defense = Composed([plain, Proximal(self.session, weight)])
        try:
            yield
        finally:
            space.defense = plain


def _sendable(result: Result) -> Result:
    if "withheld" in result.facts:
        raise UpdateError(result.facts["withheld"])
    return result


class Proximal(Defense):
    """FedProx (Li et al. 2020): μ (w − w_global) is added to the gradient of what is shared."""

    name = "proximal"

    def __init__(self, session: Session, weight: float) -> None:
        self.weight = weight
        self._space = session.workspace
        self._start: dict[str, Tensor] = {}

    def receive(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Remembers the global state of this round."""
        self._start = {name: tensor.clone() for name, tensor in state.items()}
        return dict(state)

    def step(self, gradients: Any) -> None:
        """Adds the term to the gradients (in place)."""
        for parameter, name in self._space.names.items():
            if name in self._start and parameter.grad is not None:
                start = self._start[name].to(parameter.device)
                parameter.grad.add_(parameter.detach() - start, alpha=self.weight)


def make_session(config: RunConfig, folder: Path, bundle: DataBundle | None) -> Session:
    """A session whose clients all have the whole of ``bundle``, or their part of the data set."""
    make_folder(folder)
    with alone(folder):  # simulated clients start at the same time and share a group key
        if bundle is None:
            return Session(config, folder)
        one = dataclasses.replace(
            config.federation, clients=1, fraction=1.0, min_clients=1, dropout=0.0
        )
        single = dataclasses.replace(
            config,
            federation=one,
            data=dataclasses.replace(config.data, samples=None, partition="iid"),
        )
        session = Session(single, folder, bundle)
    session.config = config
    session.parts = [torch.arange(len(bundle.train))] * config.federation.clients
    return session


@lru_cache(maxsize=1)
def _node(config: RunConfig, folder: Path) -> Node:
    return Node(config, folder)


def node_at(place: Place, config: RunConfig, bundle: DataBundle | None) -> Node:
    """The node of ``place`` with its keys checked; kept for the next call of this process.

    Raises:
        KeyFileError: A key file is missing or damaged, or is another than the one that this
            client's lock was trained with.
    """
    _link(place)
    node = _node(config, place.folder) if bundle is None else Node(config, place.folder, bundle)
    with alone(place.folder):
        _check_keys(place, node.session)
    return node


def _link(place: Place) -> None:
    """Key files that live elsewhere are linked, never copied."""
    names = {f"client-{place.client:05d}.key": place.key, "group.key": place.group}
    for name, source in names.items():
        if source is None:
            continue
        if not source.is_file():
            raise KeyFileError(
                f"{source} in the node config is not a file; make one with 'fedkl keygen', or "
                "correct the path."
            )
        target = place.folder / "keys" / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if target.exists() and not target.is_symlink() and not target.samefile(source):
            raise KeyFileError(
                f"{target} is a key already, and the node config names {source}; keep one of them."
            )
        if not target.exists() or not target.samefile(source):
            fresh = target.with_suffix(f".{os.getpid()}.tmp")
            fresh.symlink_to(source)
            os.replace(fresh, target)


def _check_keys(place: Place, session: Session) -> None:
    """Raises when the keys are not those that this client has taken part with."""
    key = session.store.key(place.client)
    group = session.group
    if session.store.one and group is not None and group.kind == "vector":
        raise KeyFileError(
            f"{session.store.keys / 'group.key'} is an imported vector, and with --one-key the "
            "server gets the fingerprint of the clients' key, against which whoever can list the "
            "candidates can try them; give all clients a random one, made with 'fedkl keygen'."
        )
    now = {
        "key": None if key is None else key.fingerprint,
        "group": None if group is None else group.fingerprint,
    }
    if not any(now.values()):
        return
    path = session.store.keys / f"client-{place.client:05d}.json"
    if not path.exists() or not session.store.rounds(place.client):
        write_json(path, now, private=True)
        return
    for name, before in read_json(path).items():
        if before != now[name]:
            raise KeyFileError(
                f"the {name} key is {now[name]}, but the lock of client {place.client} was trained "
                f"with {before}; put that key file back, or start again in another folder."
            )


def job_text(job: Job) -> str:
    """A job as text for the wire; the client knows its own number."""
    facts = {"round": job.round, "split": job.split, "keep": list(job.keep)}
    return json.dumps({**facts, "sealed": dict(job.sealed)})


def job_from(text: object, kind: str, client: int) -> Job:
    """Inverse of :func:`job_text`.

    Raises:
        ConfigError: It is no job.
    """
    try:
        facts = json.loads(str(text))
        round_, split = int(facts["round"]), str(facts["split"])
        sealed = {str(int(c)): str(text) for c, text in facts["sealed"].items()}
        return Job(kind, client, round_, split, [int(n) for n in facts["keep"]], sealed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the server's message holds no job ({error}); use the same version of FedKL on both "
            "sides."
        ) from error
