"""The client. What FedKL adds: the mod, and the lock around the network."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedkl import lock
from fedkl.flower import key_of, keylock_mod
from quickstart.task import EXAMPLE, Net, loaders, test, train


def make_model(context: Context) -> nn.Module:
    """The network, locked with this client's key."""
    return lock(Net(), key_of(context), example=EXAMPLE)


app = ClientApp(mods=[keylock_mod(make_model)])  # the one line


def prepared(message: Message, context: Context) -> tuple[nn.Module, tuple]:
    """The model with what arrived (the mod has put the private part back), and the data."""
    model = make_model(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node = context.node_config
    return model, loaders(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """An epoch on the client's own images."""
    model, (images, _) = prepared(message, context)
    loss = train(model, images, float(context.run_config["lr"]))
    metrics = MetricRecord({"loss": loss, "num-examples": len(images.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    """Accuracy on the client's own images, with its own key."""
    model, (_, images) = prepared(message, context)
    metrics = {"accuracy": test(model, images), "num-examples": len(images.dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
