"""``client_app``: a Flower ClientApp around the in-process engine's client update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedkl.errors import ConfigError, FedKLError
from fedkl.federation import RunConfig
from fedkl.federation.jobs import Result
from fedkl.federation.trust import suspicious
from fedkl.flower.guard import Secrets
from fedkl.flower.layers import layers
from fedkl.flower.node import LoadData, Node, Place, job_from, node_at, place_of
from fedkl.flower.settings import (
    PROTOCOL,
    FlowerConfig,
    check_together,
    digest,
    settings_from,
)
from fedkl.flower.wire import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    METRICS,
    SEALED,
    decoded,
    encoded,
    packed_record,
    unpacked,
)

REFUSED: Final = 100  # code of an error that FedKL raised on purpose; its reason is one line
log = logging.getLogger("flwr.fedkl")

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def client_app(
    config: RunConfig | None = None,
    flower: FlowerConfig | None = None,
    *,
    data: LoadData | None = None,
    mods: Iterable[Mod] = (),
) -> ClientApp:
    """A ClientApp that takes part in a FedKL federation.

    Args:
        config: The run; by default read from the app's run config (:func:`settings_from`).
        flower: What Flower adds; by default from the run config too.
        data: Makes a client's own data from its context. Default: its part of ``config.data``.
        mods: Further mods around training, outermost first. They see what leaves the client.

    Node config: ``partition-id`` (number of the client), ``fedkl-folder`` (keys and private state;
    give every node its own in a deployment), ``key-file``, ``group-key-file``.
    """

    def settings(context: Context) -> tuple[RunConfig, FlowerConfig]:
        ours, theirs = settings_from(context.run_config)
        return config or ours, flower or theirs

    def handler(kind: str) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            return _Visit(message, context, *settings(context), data).answer(kind)

        return handle

    def outermost(message: Message, context: Context, call_next: Any) -> Message:
        try:
            reply: Message = call_next(message, context)
            return reply
        except FedKLError as error:
            line = " ".join(str(error).split())
            log.error("refused: %s", line)
            return Message(Error(code=REFUSED, reason=line), reply_to=message)

    def configured(message: Message, context: Context, call_next: Any) -> Message:
        ours, theirs = settings(context)
        weighted = ours.federation.weighted
        return layers(theirs, message, context, call_next, weighted=weighted)

    app = ClientApp(mods=[outermost])
    app.train(mods=[*mods, configured])(handler("train"))
    app.evaluate()(handler("examine"))
    app.query()(handler("hello"))
    return app


class _Visit:
    """One message at one client."""

    def __init__(
        self,
        message: Message,
        context: Context,
        config: RunConfig,
        flower: FlowerConfig,
        data: LoadData | None,
    ) -> None:
        self.message = message
        self.config = config
        self.flower = flower
        check_together(config, flower)
        self.place = place_of(context.node_config, flower.folder, config.federation.clients)
        self._check_protocol()
        bundle = None if data is None else data(context)
        self.node: Node = node_at(self.place, config, bundle)
        self._packed = bool(message.content[CONFIG].get("packed"))

    def _check_protocol(self) -> None:
        asked = self.message.content[CONFIG]
        theirs, ours = asked.get("protocol"), PROTOCOL
        if theirs != ours:
            raise ConfigError(
                f"client {self.place.client}: the server speaks version {theirs} of FedKL's "
                f"protocol, this client version {ours}; install the same FedKL on both sides."
            )
        if (server := asked.get("settings")) != (mine := digest(self.config, self.flower)):
            raise ConfigError(
                f"client {self.place.client}: the server runs other settings or another model "
                f"({server}) than this client ({mine}); start both from the same app."
            )

    def answer(self, kind: str) -> Message:
        """The reply: what the client is, an update, or accuracies."""
        if kind == "hello":
            return self._hello()
        config = self.message.content[CONFIG]
        job = job_from(config.get("job"), kind, self.place.client)
        shared = self._received()
        if kind == "train":
            for finding in suspicious(None, shared):
                log.warning(
                    "client %d: the server's model looks crafted: %s", self.place.client, finding
                )
        result = self.node.run(job, shared, proximal=float(config.get("proximal-mu", 0.0)))
        content = self._update(result) if kind == "train" else _accuracy(result)
        return Message(content, reply_to=self.message)

    def _received(self) -> dict[str, Tensor]:
        record = self.message.content[ARRAYS]
        if self._packed:
            return unpacked(record, self.node.start)
        return decoded(record, self.node.start)

    def _hello(self) -> Message:
        session = self.node.session
        group = session.group
        facts = {
            "protocol": PROTOCOL,
            "client": self.place.client,
            "examples": len(session.parts[self.place.client]),
            "group": "" if group is None else group.fingerprint,
        }
        return Message(RecordDict({CONFIG: ConfigRecord(facts)}), reply_to=self.message)

    def _update(self, result: Result) -> RecordDict:
        tensors = dict(result.tensors)
        _last_look(self.place, self.node, tensors)
        if note := result.facts.get("note"):  # of the client's pad: the server is not told
            log.warning("%s", note)
        facts = {"client": self.place.client, "kind": result.facts["kind"]}
        facts |= {n: v for n, v in result.facts.items() if n == SEALED}
        return RecordDict(
            {
                ARRAYS: packed_record(tensors) if self._packed else encoded(tensors),
                # Not its loss: that is the size of the gradient over again, which may be hidden.
                METRICS: MetricRecord({EXAMPLES: result.facts["examples"]}),
                CONFIG: ConfigRecord(facts),
            }
        )


def _last_look(place: Place, node: Node, tensors: dict[str, Tensor]) -> None:
    """The update once more against the client's secrets, whatever made it."""
    space = node.session.workspace
    secrets = Secrets.of(space.model, [node.session.store.key(place.client), node.session.group])
    secrets.refuse({f"tensor {n}": t.detach().cpu().numpy() for n, t in tensors.items()})


def _accuracy(result: Result) -> RecordDict:
    facts = result.facts
    metrics: dict[str, Any] = {EXAMPLES: 1, "own": facts["own"], "guess": facts["guess"]}
    metrics |= {"wrong": [float(v) for v in facts["wrong"]]} if facts["wrong"] else {}
    metrics |= {} if facts["other"] is None else {"other": facts["other"]}
    metrics |= {f"thief.{name}": value for name, value in facts["thief"].items()}
    return RecordDict(
        {METRICS: MetricRecord(metrics), CONFIG: ConfigRecord({"client": result.job.client})}
    )
