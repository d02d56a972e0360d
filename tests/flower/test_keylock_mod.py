"""The mod for other people's apps: merges, strips, keeps, refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedhelp import assert_same, fixed_key
from flowhelp import Loopback, Node
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedkl import Key, lock, shared_state
from fedkl.federation.store import ClientStore
from fedkl.flower import Secrets, group_key_of, key_of, keylock_mod
from fedkl.locking import affines, load_private_state, private_state

X = torch.rand(8, 1, 8, 8)
Y = torch.arange(8)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8)
    )


def locked(context: Context) -> nn.Module:
    return lock(net(), key_of(context), example=X)


Spoil = Callable[[nn.Module, RecordDict], None]


def app_of(spoil: Spoil | None = None, seen: list[set[str]] | None = None) -> ClientApp:
    """A quickstart app: loads a whole state dict, trains, returns a whole state dict."""
    app = ClientApp(mods=[keylock_mod(locked)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = locked(context)
        state = message.content["arrays"].to_torch_state_dict()
        if seen is not None:
            seen.append(set(state))
        model.load_state_dict(state, strict=True)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(dict(model.state_dict())),
                "metrics": MetricRecord({"num-examples": 8}),
            }
        )
        if spoil is not None:
            spoil(model, content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = locked(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        loss = float(nn.functional.cross_entropy(model(X), Y))
        metrics = MetricRecord({"num-examples": 8, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def grid_of(app: ClientApp, folder: Path, nodes: int = 2) -> Loopback:
    found = {}
    for number in range(nodes):
        place = folder / f"node-{number}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / "my.key"
        if not path.exists():
            fixed_key(number).save(path)
        config = {"partition-id": number, "fedkl-folder": str(place), "key-file": str(path)}
        found[10 + number] = Node(app, config)
    return Loopback(found)


def start() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(dict(shared_state(lock(net(), fixed_key(9), example=X))))


def train(grid: Loopback, arrays: ArrayRecord, round_: int, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": round_})})
    return grid.send_and_receive(
        [Message(content, dst_node_id=node, message_type=kind) for node in grid.get_node_ids()]
    )


def state_of(folder: Path, number: int, before: int = 99) -> Any:
    store = ClientStore(folder / f"node-{number}", keyed=False)
    return store.load(number, before=before).private


def test_merges_strips_and_keeps(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    grid = grid_of(app_of(seen=seen), tmp_path)
    first = train(grid, start(), 1)
    whole = set(lock(net(), fixed_key(0), example=X).state_dict())
    assert seen == [whole, whole]
    for reply in first:
        assert set(reply.content["arrays"]) == set(start())
        assert not any("keylock" in name for name in reply.content["arrays"])
    kept = [state_of(tmp_path, number) for number in range(2)]
    assert all(set(k) | set(start()) == whole for k in kept)
    path = next((tmp_path / "node-0" / "clients").rglob("*.safetensors"))
    assert os.stat(path).st_mode & 0o777 == 0o600
    # A second round starts from what was kept, in a new process as well.
    again = grid_of(app_of(seen=seen), tmp_path)
    second = train(again, first[0].content["arrays"], 2)
    assert not any(r.has_error() for r in second)
    name = next(n for n in kept[0] if n.endswith("scale_weight"))
    assert not state_of(tmp_path, 0)[name].equal(kept[0][name])
    # Round 2 once more, as after a crash of the server: from the state of round 1, same bits.
    third = train(grid_of(app_of(), tmp_path), first[0].content["arrays"], 2)
    assert_same(
        third[0].content["arrays"].to_torch_state_dict(),
        second[0].content["arrays"].to_torch_state_dict(),
    )


def test_with_a_strategy_of_flower(tmp_path: Path) -> None:
    """FedAvg.start as in any quickstart; its aggregate makes floats of counters."""
    grid = grid_of(app_of(), tmp_path)
    result = FedAvg().start(grid, start(), num_rounds=4)
    losses = [float(m["loss"]) for m in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < losses[0]
    assert len({Key.load(p).fingerprint for p in tmp_path.rglob("my.key")}) == 2


def test_equals_training_without_flower(tmp_path: Path) -> None:
    """What the mod keeps and sends is what plain code with the same key gives."""
    grid = grid_of(app_of(), tmp_path, nodes=1)
    reply = train(grid, start(), 1)[0]
    model = lock(net(), fixed_key(0), example=X)
    shared = start().to_torch_state_dict()
    model.load_state_dict({**private_state(model), **shared})
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert_same(reply.content["arrays"].to_torch_state_dict(), shared_state(model))
    assert_same(state_of(tmp_path, 0), private_state(model))


def secret_of(model: nn.Module, kind: str) -> Tensor:
    if kind in ("gamma", "beta"):
        return next(iter(affines(model).values()))[kind == "beta"]
    if kind == "vector":
        return fixed_key(0).vector(1024)
    return next(t for n, t in private_state(model).items() if n.endswith(kind))


def plant_array(name: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> Any:
    def plant(content: RecordDict, secret: np.ndarray[Any, Any]) -> None:
        content["arrays"][name] = Array(np.ascontiguousarray(change(secret)))

    return plant


def in_the_middle(secret: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(0).normal(size=5000).astype(secret.dtype)
    flat = secret.reshape(-1)[:200]
    noise[1001 : 1001 + len(flat)] = flat
    return noise


def as_bytes(secret: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"xyz" + secret.tobytes(), np.uint8)


def in_config(content: RecordDict, secret: np.ndarray[Any, Any]) -> None:
    content["extra"] = ConfigRecord({"note": b"a" + secret.tobytes()})


def in_metrics(content: RecordDict, secret: np.ndarray[Any, Any]) -> None:
    content["metrics"]["curve"] = [float(v) for v in secret.reshape(-1)[:50]]


def overwritten(content: RecordDict, secret: np.ndarray[Any, Any]) -> None:
    """Inside a tensor that may leave, under its own name and shape."""
    values = content["arrays"]["4.weight"].numpy().copy()
    flat = secret.reshape(-1)[: values.size].astype(np.float32)
    values.reshape(-1)[: len(flat)] = flat
    content["arrays"]["4.weight"] = Array(values)


WAYS: dict[str, Any] = {
    "another name": plant_array("innocent.weight", lambda s: s),
    "in the middle": plant_array("innocent.weight", in_the_middle),
    "as bytes": plant_array("innocent.weight", as_bytes),
    "transposed": plant_array("innocent.weight", lambda s: s.T),
    "in the config": in_config,
    "in the metrics": in_metrics,
    "in a shared tensor": overwritten,
}
KINDS = ["scale_weight", "shift_weight", "running_mean", "running_var", "gamma", "beta", "vector"]


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_refuses_what_is_planted(way: str, kind: str, number: Any, tmp_path: Path) -> None:
    # A metric is a float64 and a shared tensor a float32, whatever it came from.
    if way in ("in the metrics", "in a shared tensor") and number == np.float16:
        number = np.float32

    def spoil(model: nn.Module, content: RecordDict) -> None:
        WAYS[way](content, secret_of(model, kind).detach().numpy().astype(number))

    reply = train(grid_of(app_of(spoil), tmp_path, nodes=1), start(), 1)[0]
    assert reply.has_error()
    assert "private" in reply.error.reason
    assert "\n" not in reply.error.reason
    assert state_of(tmp_path, 0) is None  # the round did not happen


@pytest.mark.parametrize("form", ["raw", "hex", "text in config"])
def test_refuses_a_key(form: str, tmp_path: Path) -> None:
    key = Key.generate()
    raw: bytes = key._secret

    def spoil(model: nn.Module, content: RecordDict) -> None:
        value = {"raw": b".." + raw, "hex": raw.hex(), "text in config": raw.hex().upper()}[form]
        content["extra"] = ConfigRecord({"note": value})

    grid = grid_of(app_of(spoil), tmp_path, nodes=1)
    key.save(tmp_path / "node-0" / "my.key", overwrite=True)
    reply = train(grid, start(), 1)[0]
    assert reply.has_error()
    assert "the key" in reply.error.reason


def test_refuses_another_key_in_place_of_its_own(tmp_path: Path) -> None:
    grid = grid_of(app_of(), tmp_path, nodes=1)
    first = train(grid, start(), 1)[0]
    fixed_key(77).save(tmp_path / "node-0" / "my.key", overwrite=True)
    reply = train(grid, first.content["arrays"], 2)[0]
    assert reply.has_error()
    assert "my.key is another key" in reply.error.reason
    fixed_key(0).save(tmp_path / "node-0" / "my.key", overwrite=True)
    assert not train(grid, first.content["arrays"], 2)[0].has_error()


def test_honest_updates_are_never_refused() -> None:
    """Fresh, constant and trained tensors of other models are let through."""
    model = lock(net(), fixed_key(0), example=X)
    secrets = Secrets.of(model, [fixed_key(0)])
    for seed in range(20):
        torch.manual_seed(seed)
        other = net()
        content = {n: t.numpy() for n, t in other.state_dict().items()}
        content |= {"zeros": np.zeros(1000), "ones": np.ones(1000, np.float32)}
        content |= {"signs": np.sign(np.random.default_rng(seed).normal(size=4096))}
        content |= {"noise": np.random.default_rng(seed).normal(size=50_000).astype(np.float32)}
        secrets.refuse(content)


def test_an_app_that_forgets_the_lock(tmp_path: Path) -> None:
    def spoil(model: nn.Module, content: RecordDict) -> None:
        content["arrays"] = ArrayRecord(dict(shared_state(model)))

    reply = train(grid_of(app_of(spoil), tmp_path, nodes=1), start(), 1)[0]
    assert "whole state_dict()" in reply.error.reason


def test_a_server_with_another_model(tmp_path: Path) -> None:
    arrays = start()
    arrays["4.weight"] = Array(np.zeros((8, 4), np.float32))
    reply = train(grid_of(app_of(), tmp_path, nodes=1), arrays, 1)[0]
    assert "4.weight" in reply.error.reason


def test_a_model_without_a_lock(tmp_path: Path) -> None:
    app = ClientApp(mods=[keylock_mod(lambda context: net())])
    app.train()(lambda message, context: message)
    reply = train(grid_of(app, tmp_path, nodes=1), start(), 1)[0]
    assert "without a lock" in reply.error.reason


def test_a_missing_key_file(tmp_path: Path) -> None:
    grid = grid_of(app_of(), tmp_path, nodes=1)
    (tmp_path / "node-0" / "my.key").unlink()
    assert "my.key" in train(grid, start(), 1)[0].error.reason


def test_the_group_key_is_never_made_up(tmp_path: Path) -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    with pytest.raises(ValueError, match="group-key-file"):
        group_key_of(context)
    fixed_key(5).save(tmp_path / "group.key")
    context.node_config["group-key-file"] = str(tmp_path / "group.key")
    assert group_key_of(context) == fixed_key(5)


def test_a_key_is_made_on_first_use(tmp_path: Path) -> None:
    context = Context(1, 1, {"partition-id": 3, "fedkl-folder": str(tmp_path)}, RecordDict(), {})
    assert key_of(context) == key_of(context)
    assert (tmp_path / "keys" / "client-00003.key").exists()


def test_loading_what_was_kept() -> None:
    model = lock(net(), fixed_key(0), example=X)
    load_private_state(model, private_state(model))
    assert "forms" in repr(Secrets.of(model, [fixed_key(0)]))


def test_other_locks_have_no_record(tmp_path: Path) -> None:
    grid = grid_of(app_of(), tmp_path, nodes=1)
    crafted = ArrayRecord({n: Array(a.numpy() * 2) for n, a in start().items()})
    for arrays, round_ in ((start(), 1), (start(), 2), (crafted, 2), (start(), 1)):
        assert not train(grid, arrays, round_)[0].has_error()
    assert not list(tmp_path.rglob("answered.json"))
