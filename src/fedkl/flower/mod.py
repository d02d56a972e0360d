"""``keylock_mod``: what an existing Flower ClientApp adds to train a locked model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message, MessageType
from torch import Tensor, nn

from fedkl.errors import FedKLError, KeyFileError, LockError, StateError
from fedkl.federation.store import GROUP, OWN, ClientState, ClientStore
from fedkl.flower.answers import Answer, Answers, alone, digest_of
from fedkl.flower.guard import Secrets
from fedkl.flower.wire import decoded, encoded
from fedkl.key import Key
from fedkl.locking import (
    Pad,
    epoch_of,
    is_locked,
    load_private_state,
    lock_spec,
    private_state,
    set_key,
    shared_state,
    sources_of,
)
from fedkl.locking.pad import PadAffine

REFUSED: Final = 100
log = logging.getLogger("flwr.fedkl")

MakeModel = Callable[[Context], nn.Module]
Next = Callable[[Message, Context], Message]


def _home(context: Context) -> tuple[Path, int]:
    """The node's folder and number."""
    number = context.node_config.get("partition-id")
    client = number if type(number) is int and number >= 0 else 0
    default = Path.home() / ".fedkl" / f"node-{context.node_id if number is None else client}"
    folder = context.node_config.get("fedkl-folder")
    return (default if folder is None else Path(str(folder)).expanduser().absolute()), client


def _key(context: Context, setting: str, make: Callable[[ClientStore, int], Key | None]) -> Key:
    path = context.node_config.get(setting)
    if path is not None:
        return Key.load(Path(str(path)).expanduser())
    folder, client = _home(context)
    found = make(ClientStore(folder, keyed=True), client)
    assert found is not None
    return found


def key_of(context: Context) -> Key:
    """The client's key: the node config's ``key-file``, or one made on first use in its folder.

    Raises:
        KeyFileError: The file is missing, damaged, or readable by others.
    """
    return _key(context, "key-file", lambda store, client: store.key(client))


def group_key_of(context: Context) -> Key:
    """The key that all clients have: the node config's ``group-key-file``, for ``lock(group=)``.

    Raises:
        KeyFileError: It is not in the node config, or the file cannot be used.
    """
    path = context.node_config.get("group-key-file")
    if path is None:
        raise KeyFileError(
            "the node config has no group-key-file; make one with 'fedkl keygen', give every "
            "client a copy, and start the SuperNode with --node-config 'group-key-file=...'."
        )
    return Key.load(Path(str(path)).expanduser())


def keylock_mod(make_model: MakeModel) -> Callable[[Message, Context, Next], Message]:
    """A mod that keeps a locked model's private tensors on the client.

    Put it last in the list of mods, next to the app. It merges the private state into the model
    state that arrives, so that the app loads a whole ``state_dict``; takes it out of the whole
    ``state_dict`` that the app returns from training and keeps it on the client's disk; and looks
    at the bytes of everything that leaves. A reply that holds a piece of a secret under any name is
    replaced by an error, and nothing is sent.

    With a pad, a round that was answered is answered again only for the very same message, and no
    round gets a pad of an epoch before the last one's. What the app shows under a pad is not
    counted: there is no budget, and :func:`fedkl.renew` is the app's to call.

    Args:
        make_model: Makes the locked model from the context, the same every time, for example
            ``lambda context: lock(Net(), key_of(context), example=x)``.

    Node config: ``fedkl-folder`` (where the private state is kept; default
    ``~/.fedkl/node-<partition-id>``), ``key-file``, ``group-key-file``.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        try:
            model = make_model(context)
            folder, client = _home(context)
            with alone(ClientStore(folder, keyed=False).folder(client)):
                return _Passage(model, message, context).through(call_next, context)
        except FedKLError as error:
            line = " ".join(str(error).split())
            log.error("refused: %s", line)
            return Message(Error(code=REFUSED, reason=line), reply_to=message)

    return mod


class _Passage:
    """One message on its way to the app and back."""

    def __init__(self, model: nn.Module, message: Message, context: Context) -> None:
        if not is_locked(model):
            raise LockError(
                f"keylock_mod got a {type(model).__name__} without a lock; make_model must return "
                "what fedkl.lock returns."
            )
        self.model = model
        self.message = message
        folder, self.client = _home(context)
        self.store = ClientStore(folder, keyed=False)
        self.store.known = _in_use(context)
        self.round = self._round()
        self.training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
        # A round is trained first, and what came of it is evaluated with the lock that came of it.
        self.state = self.store.load(self.client, before=self.round + (not self.training))
        padded = lock_spec(model).scheme == Pad.name
        self.answers = Answers(self.store, self.client) if padded and self.training else None
        self.keys = _keys(context)
        if self.state.private is not None:
            self._put(self.state.private)
        self.private = {n: t.clone() for n, t in private_state(model).items()}
        self.shared = {n: t.clone() for n, t in shared_state(model).items()}
        self.secrets = Secrets.of(model, self.keys)

    def _put(self, private: Mapping[str, Tensor]) -> None:
        """Loads a private state; a pad that was renewed is drawn from the node's key."""
        now = epoch_of(self.model)
        load_private_state(self.model, private)
        if epoch_of(self.model) == now:
            return
        sources = sources_of(self.model).values()
        owners = {source.owner for source in sources if isinstance(source, PadAffine)}
        key = next((key for key in self.keys if {key.fingerprint} == owners), None)
        if key is None:
            raise KeyFileError(
                f"client {self.client}: the pad was renewed, but the key that draws it "
                f"({', '.join(sorted(owners))}) is none of this node's; expected make_model to "
                "lock with key_of(context). Name its file as key-file in the node config."
            )
        set_key(self.model, key)

    def _round(self) -> int:
        """The server's round, or one more than the last."""
        for record in self.message.content.config_records.values():
            number = record.get("server-round")
            if type(number) is int and number > 0:
                return number
        return max(self.store.rounds(self.client), default=0) + 1

    def through(self, call_next: Next, context: Context) -> Message:
        """Merges, calls the app, strips, looks, sends."""
        asked = _question(self.message, self.round)
        if self.answers is not None:
            self.answers.check_question(self.round, asked)
        for record in self.message.content.array_records.values():
            self._merge(record)
        reply = call_next(self.message, context)
        if reply.has_error():
            return reply
        if self.training:
            trained = self._strip(reply.content.array_records)
            self._put(trained)
            self.secrets.model(self.model)  # after training, beside those from before
            self.secrets.refuse(dict(outgoing(reply)))
            self._keep(trained, asked)
        else:
            self._strip(reply.content.array_records, wanted=False)
            self.secrets.refuse(dict(outgoing(reply)))
        return reply

    def _keep(self, trained: Mapping[str, Tensor], asked: str) -> None:
        answer = Answer(asked, self.state.round, epoch_of(self.model))
        if self.answers is not None:
            self.answers.check_pad(self.round, answer.base, answer.epoch)
        self.store.save(self.client, ClientState(self.round, trained, {}), keep=[self.round - 1])
        if self.answers is not None:
            self.answers.add(self.round, answer)

    def _merge(self, record: ArrayRecord) -> None:
        # Not the dtypes: Flower's strategies turn counters into floats.
        claims = {name: tuple(array.shape) for name, array in record.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.shared.items()}
        if claims != shapes:
            odd = sorted(n for n in claims | shapes if claims.get(n) != shapes.get(n))
            raise StateError(
                f"the model that arrived differs from this client's in {', '.join(odd[:5])}; start "
                "the server from shared_state(model) of the same locked model."
            )
        for name, array in encoded(self.private).items():
            record[name] = array

    def _strip(
        self, records: Mapping[str, ArrayRecord], *, wanted: bool = True
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for record in records.values():
            mine = ArrayRecord({n: record.pop(n) for n in list(record) if n in self.private})
            if mine:
                found = decoded(mine, self.private)
        if wanted and not found:
            raise StateError(
                "the app's reply to a train message lacks the lock's tensors, so what the lock "
                "learned would be lost; return the model's whole state_dict(), the mod strips it."
            )
        return found


def _question(message: Message, round_: int) -> str:
    """Digest of everything that a message asks, before anything is merged into it."""
    facts: list[Any] = [round_]
    for where, record in sorted(message.content.items()):
        for name, value in sorted(record.items()):
            if isinstance(record, ArrayRecord):
                data = hashlib.sha256(value.data).hexdigest()
                facts.append([where, name, value.dtype, list(value.shape), data])
            else:
                facts.append([where, name, repr(value)])
    return digest_of(facts, {})


def _keys(context: Context) -> list[Key]:
    """All keys that the node has; none is made here."""
    folder, client = _home(context)
    given = [context.node_config.get(name) for name in ("key-file", "group-key-file")]
    paths = [Path(str(path)).expanduser() for path in given if path is not None]
    paths.append(folder / "keys" / f"client-{client:05d}.key")
    return [Key.load(path) for path in paths if path.is_file()]


def _in_use(context: Context) -> dict[str, tuple[str, Path]]:
    """Fingerprint and file of the keys that key_of and group_key_of give, as far as they exist."""
    folder, client = _home(context)
    own = str(folder / "keys" / f"client-{client:05d}.key")
    given = {
        OWN: context.node_config.get("key-file", own),
        GROUP: context.node_config.get("group-key-file"),
    }
    paths = {whose: Path(str(path)).expanduser() for whose, path in given.items() if path}
    return {w: (Key.load(path).fingerprint, path) for w, path in paths.items() if path.is_file()}


def outgoing(reply: Message) -> Iterator[tuple[str, Any]]:
    """Everything in a message that could carry a secret: (what, bytes, text or array)."""
    for where, record in reply.content.items():
        for name, value in record.items():
            what = f"{where}[{name!r}]"
            if isinstance(record, ArrayRecord):
                yield what, bytes(value.data)
                # The same numbers in the other order.
                if len(value.shape) > 1 and value.stype == "numpy.ndarray":
                    yield f"{what} transposed", np.ascontiguousarray(value.numpy().T)
                continue
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(part, bytes | str):
                    yield f"{what}[{number}]", part
            numbers = [v for v in value if isinstance(v, float)] if isinstance(value, list) else []
            yield f"{what} numbers", np.asarray(numbers, np.float64)
        yield f"names in {where}", "\0".join(map(str, record))
