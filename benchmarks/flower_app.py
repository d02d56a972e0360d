"""The opponent of (c): the loop of rounds.py as a Flower app, on Flower's simulation engine.

Run by .venv-bench's Python with settings as JSON; the last line of its output is the result. Data,
parts and model are made once per simulation process, as a user who minds the time would have it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedkl.data import load, partition
from fedkl.models import build
from fedkl.rng import derive

app = ClientApp()


@lru_cache(maxsize=1)
def world(clients: int, images: int) -> tuple[Any, list[torch.Tensor], torch.nn.Module]:
    """Training images, parts and a model, once per process."""
    torch.set_num_threads(1)
    train = load("fashion-mnist", seed=0).train
    parts = partition(train.labels, clients, generator=derive(0, "partition"), samples=images)
    return train, parts, build("lenet", num_classes=10, generator=derive(0, "model"))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round: the body of the bare loop."""
    config = message.content["config"]
    train_images, parts, model = world(config["clients"], config["images"])
    client = int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = derive(0, "client", client, "round", int(config["server-round"]))
    torch.randint(2**62, (1,), generator=generator)
    order = parts[client][torch.randperm(len(parts[client]), generator=generator)]
    for rows in torch.split(order, 64):
        x, y = train_images.batch(rows)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(order)}),
        }
    )
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round begins and ends."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rounds: list[float] = []

    def configure_train(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
        found = super().aggregate_train(*args, **kwargs)
        self.rounds.append(time.perf_counter() - self.began)
        return found


def simulate(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the federation. Seconds per round and in all, and some of the final weights."""
    answer: dict[str, Any] = {}
    server = ServerApp()
    clients, images = settings["clients"], settings["images"]

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        model = build("lenet", num_classes=10, generator=derive(0, "model"))
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=settings["rounds"],
            train_config=ConfigRecord({"clients": clients, "images": images}),
        )
        state = result.arrays.to_torch_state_dict()
        answer["rounds"] = strategy.rounds
        answer["weights"] = [v for n in sorted(state) for v in state[n].flatten()[:5].tolist()]

    began = time.perf_counter()
    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return {**answer, "wall": time.perf_counter() - began}


if __name__ == "__main__":
    # By its own name and not as __main__, so that Ray's processes import it once.
    import flower_app

    with contextlib.redirect_stdout(sys.stderr):
        found = flower_app.simulate(json.loads(sys.argv[1]))
    print(json.dumps(found))
