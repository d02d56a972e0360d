"""The mod with a pad: an app renews it, and no server gets an old one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedhelp import assert_same
from flowhelp import Loopback, Node
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from fedkl import Key, lock, renew, shared_state
from fedkl.federation.store import ClientStore
from fedkl.flower import key_of, keylock_mod
from fedkl.locking import affines, epoch_of, set_key

X = torch.rand(8, 1, 8, 8)
Y = torch.arange(8)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8)
    )


def padded(context: Context) -> nn.Module:
    return lock(net(), key_of(context), scheme="pad", example=X)


def pad_app(renewals: dict[int, int], make: Any = padded, spoil: str = "") -> ClientApp:
    """An app that puts the pad of ``renewals[round]`` in before it trains."""
    app = ClientApp(mods=[keylock_mod(make)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make(context)
        key = Key.load(str(context.node_config["key-file"]))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        set_key(model, key)
        pads = {"before": next(iter(affines(model).values()))[1].detach().clone()}
        epoch = renewals.get(message.content["config"]["server-round"], 0)
        if epoch > epoch_of(model):
            renew(model, key, epoch)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        arrays = ArrayRecord(dict(model.state_dict()))
        pads["after"] = next(iter(affines(model).values()))[1].detach()
        if epoch and spoil in pads:
            arrays["innocent.weight"] = Array(pads[spoil].numpy())
        for name in [n for n in arrays if spoil == "epoch" and n.endswith("keylock.epoch")]:
            arrays[name] = Array(np.zeros((), np.int64))
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        tensors = message.content["arrays"].to_torch_state_dict()
        epochs = {int(t) for n, t in tensors.items() if n.endswith("keylock.epoch")}
        return Message(
            RecordDict({"metrics": MetricRecord({"epoch": epochs.pop()})}), reply_to=message
        )

    return app


def grid_of(folder: Path, app: ClientApp) -> tuple[Loopback, ArrayRecord]:
    """One node with a random key, and a state to start from."""
    path = folder / "my.key"
    Key.generate().save(path)
    config = {"partition-id": 0, "fedkl-folder": str(folder), "key-file": str(path)}
    torch.manual_seed(0)
    model = lock(net(), Key.generate(), scheme="pad", example=X)
    return Loopback({10: Node(app, config)}), ArrayRecord(dict(shared_state(model)))


def ask(
    grid: Loopback, arrays: ArrayRecord, round_: int, kind: str = "train", **more: Any
) -> Message:
    config = ConfigRecord({"server-round": round_, **more})
    content = RecordDict({"arrays": arrays, "config": config})
    return grid.send_and_receive([Message(content, dst_node_id=10, message_type=kind)])[0]


def reason(reply: Message) -> str:
    return str(reply.error.reason) if reply.has_error() else ""


def epoch_kept(folder: Path) -> int:
    private = ClientStore(folder, keyed=False).load(0, before=99).private
    assert private is not None
    return int(next(t for n, t in private.items() if n.endswith("keylock.epoch")))


def test_an_app_may_renew_its_pad(tmp_path: Path) -> None:
    grid, arrays = grid_of(tmp_path, pad_app({2: 1, 4: 3}))
    for round_, epoch in ((1, 0), (2, 1), (3, 1), (4, 3)):
        reply = ask(grid, arrays, round_)
        assert reason(reply) == ""
        assert epoch_kept(tmp_path) == epoch
        arrays = reply.content["arrays"]


def test_a_round_is_evaluated_with_the_lock_that_came_of_it(tmp_path: Path) -> None:
    grid, arrays = grid_of(tmp_path, pad_app({2: 1, 3: 2}))
    for round_, epoch in ((1, 0), (2, 1), (3, 2), (2, 1)):
        if round_ not in ClientStore(tmp_path, keyed=False).rounds(0):
            arrays = ask(grid, arrays, round_).content["arrays"]
        reply = ask(grid, arrays, round_, "evaluate")
        assert reply.content["metrics"]["epoch"] == epoch


@pytest.mark.parametrize("leak", ["before", "after"])
def test_neither_pad_of_a_renewal_is_sent(leak: str, tmp_path: Path) -> None:
    grid, arrays = grid_of(tmp_path, pad_app({2: 1}, spoil=leak))
    assert not ask(grid, arrays, 1).has_error()
    assert "private; nothing was sent" in reason(ask(grid, arrays, 2))
    assert epoch_kept(tmp_path) == 0


def test_a_renewed_pad_needs_the_key_that_draws_it(tmp_path: Path) -> None:
    elsewhere = Key.generate()

    def make(context: Context) -> nn.Module:
        return lock(net(), elsewhere, scheme="pad", example=X)

    grid, arrays = grid_of(tmp_path, pad_app({2: 1}, make))
    elsewhere.save(tmp_path / "my.key", overwrite=True)
    assert not any(ask(grid, arrays, r).has_error() for r in (1, 2))
    del grid.nodes[10].config["key-file"]
    (tmp_path / "my.key").unlink()
    said = reason(ask(grid, arrays, 3))
    assert f"({elsewhere.fingerprint}) is none of this node's" in said
    assert "key_of(context)" in said


def test_a_pad_answers_the_same_message_only(tmp_path: Path) -> None:
    grid, arrays = grid_of(tmp_path, pad_app({2: 1}))
    replies = [ask(grid, arrays, r) for r in (1, 2, 3)]
    again = ask(grid, arrays, 3)
    assert_same(
        again.content["arrays"].to_torch_state_dict(),
        replies[2].content["arrays"].to_torch_state_dict(),
    )
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    crafted = ArrayRecord({n: Array(a.numpy() * 2) for n, a in arrays.items()})
    for round_ in (3, 2, 1):
        said = reason(ask(grid, crafted, round_))
        assert f"round {round_} again" in said
        assert "go on with round 4" in said
    # Only the newest two states are kept; from an older one, the pad would be the first again.
    assert "expected 1 and 1 as before" in reason(ask(grid, arrays, 2))
    assert "round 3 again" in reason(ask(grid, arrays, 3, lr=9.0))
    assert {p: p.read_bytes() for p in before} == before
    assert not ask(grid, crafted, 4).has_error()


def test_no_app_goes_back_to_an_old_pad(tmp_path: Path) -> None:
    grid, arrays = grid_of(tmp_path, pad_app({2: 1}))
    assert not any(ask(grid, arrays, r).has_error() for r in (1, 2))

    grid.nodes[10].app = pad_app({}, spoil="epoch")
    assert "under pad 0, expected 2 and at least 1" in reason(ask(grid, arrays, 3))
    assert epoch_kept(tmp_path) == 1
