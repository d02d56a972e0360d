"""A grid without a network: ClientApps are called in this process, messages go through bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr", reason="Flower is not in this environment")

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto
from flwr.supercore.task_identity import TaskIdentity

from fedkl.federation import RunConfig
from fedkl.flower import FlowerConfig, client_app, server_app

EXAMPLES = Path(__file__).parents[2] / "examples"
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@dataclass
class Node:
    """A SuperNode: an app and what Flower keeps for it."""

    app: ClientApp
    config: dict[str, Any]
    state: RecordDict = field(default_factory=RecordDict)


@dataclass
class Loopback:
    """As much of Flower's grid as a ServerApp uses.

    ``tamper`` may replace a reply; ``lose`` says which messages (node, how many before) vanish.
    """

    nodes: dict[int, Node]
    run_config: dict[str, Any] = field(default_factory=dict)
    tamper: Callable[[int, Message], Message | None] | None = None
    lose: Callable[[int, Message], bool] | None = None
    sent: list[bytes] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)
    down: set[int] = field(default_factory=set)

    def get_node_ids(self) -> list[int]:
        return [node for node in self.nodes if node not in self.down]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [r for m in messages if (r := self._one(m)) is not None]

    def _one(self, message: Message) -> Message | None:
        number = message.metadata.dst_node_id
        node = self.nodes[number]
        if self.lose is not None and self.lose(number, message):
            return None
        inside = through_bytes(message)[0]
        context = Context(
            run_id=1,
            node_id=number,
            node_config=node.config,
            state=node.state,
            run_config=dict(self.run_config),
        )
        try:
            reply = node.app(inside, context)
        except Exception as error:  # as Flower does with whatever an app raises
            reply = Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=inside)
        if self.tamper is not None and (changed := self.tamper(number, reply)) is not None:
            reply = changed
        reply, data = through_bytes(reply)
        self.sent.append(data)
        self.received.append(reply)
        return reply


def through_bytes(message: Message) -> tuple[Message, bytes]:
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(Proto.FromString(data)), data


def loopback(
    config: RunConfig,
    flower: FlowerConfig,
    *,
    folders: Callable[[int], Path] | None = None,
    **settings: Any,
) -> Loopback:
    """A grid of ``config``'s clients, each in a folder of its own or all in the run's."""
    app = client_app(config, flower, **settings)
    nodes = {}
    for client in range(config.federation.clients):
        node: dict[str, Any] = {"partition-id": client}
        if folders is not None:
            node["fedkl-folder"] = str(folders(client))
        nodes[1000 - client] = Node(app, node)  # ids in another order than the clients
    return Loopback(nodes)


def serve(grid: Loopback, config: RunConfig, flower: FlowerConfig, **settings: Any) -> Any:
    """Runs the server app on ``grid``; its result."""
    found: list[Any] = []
    app = server_app(config, flower, on_result=found.append, **settings)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    app(grid, context)
    return found[0]


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, 10)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1)) * self.scale
        return out


def scaled(num_classes: int, channels: int, image_size: int) -> nn.Module:
    return Scaled(channels * image_size * image_size)


def everything_in(grid: Loopback) -> list[np.ndarray[Any, Any]]:
    """Every vector that reached the server, in whatever record."""
    found = []
    for reply in grid.received:
        if reply.has_error():
            continue
        for record in reply.content.values():
            whole = []
            for value in (record[name] for name in sorted(record)):
                for part in value if isinstance(value, list) else [value]:
                    if hasattr(part, "numpy"):
                        array = part.numpy()
                    elif isinstance(part, bytes) and part.startswith(b"\x93NUMPY"):
                        array = np.load(io.BytesIO(part), allow_pickle=False)
                    else:
                        continue
                    found.append(array.reshape(-1).astype(np.float64))
                    whole.append(found[-1])
            if len(whole) > 1:
                found.append(np.concatenate(whole))
    return found
