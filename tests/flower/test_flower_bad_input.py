"""Clients and servers that are wrong, old or hostile: one line on both sides, and it goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedhelp import assert_same, config, fixed_key, make_keys, with_keys
from flowhelp import Loopback, Node, loopback, serve
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedkl.errors import ConfigError, FederationError, KeyFileError, StateError, UpdateError
from fedkl.federation import RunConfig
from fedkl.federation.jobs import Job
from fedkl.flower import FlowerConfig, client_app, settings_from
from fedkl.flower.node import Node as FlowerNode
from fedkl.flower.node import node_at, place_of
from fedkl.flower.replies import introduction, result_of
from fedkl.flower.settings import check_together, digest
from fedkl.flower.wire import decoded, encoded

BASE = config(
    "channel",
    defense_settings={"length": 64},
    data={"samples": 64},
    federation={"clients": 3, "rounds": 2, "min_clients": 2},
    evaluation={"every": 0, "images": 20, "wrong_keys": 1},
)
BAD = 999  # the node of client 1


def prepared(tmp_path: Path, **settings: Any) -> tuple[Loopback, FlowerConfig]:
    folder = tmp_path / "run"
    if not folder.exists():
        with_keys(folder, make_keys(tmp_path / "keys", 3, 64))
    flower = FlowerConfig(folder=str(folder), retries=0, timeout=2.0, **settings)
    return loopback(BASE, flower), flower


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    """Log lines of FedKL with ``text``; each is one line."""
    found = [r.getMessage() for r in caplog.records if r.name == "flwr.fedkl"]
    assert not any("\n" in line or "Traceback" in line for line in found)
    return [line for line in found if text in line]


def change_arrays(change: Callable[[ArrayRecord], None]) -> Callable[[int, Message], Any]:
    def tamper(node: int, reply: Message) -> Message | None:
        if node == BAD and not reply.has_error() and "arrays" in reply.content:
            change(reply.content["arrays"])
        return None

    return tamper


def _nan(record: ArrayRecord) -> None:
    record["1.weight"] = Array(np.full(record["1.weight"].shape, np.nan, np.float32))


def _wrong_name(record: ArrayRecord) -> None:
    record["2.weight"] = record.pop("1.weight")


def _extra(record: ArrayRecord) -> None:
    record["5.keylock.scale_weight"] = Array(np.zeros(3, np.float32))


def _shape(record: ArrayRecord) -> None:
    record["1.weight"] = Array(np.zeros((5, 5), np.float32))


def _dtype(record: ArrayRecord) -> None:
    record["1.weight"] = Array(record["1.weight"].numpy().astype(np.float64))


def _huge_claim(record: ArrayRecord) -> None:
    array = record["1.weight"]
    record["1.weight"] = Array("float32", (50_000, 50_000), array.stype, array.data)


def _huge_header(record: ArrayRecord) -> None:
    """Right on the outside, 10 GB in numpy's own header."""
    array = record["1.weight"]
    data = array.data.replace(b"(12, 256)", b"(50000, 50000)")
    data = data.replace(b"     \n", b"\n", 1)[: len(array.data)]
    record["1.weight"] = Array(array.dtype, array.shape, array.stype, data.ljust(len(array.data)))


def _overflowing(record: ArrayRecord) -> None:
    array = record["1.weight"]
    record["1.weight"] = Array("float32", (2**31 - 1,) * 3, array.stype, array.data)


def _negative(record: ArrayRecord) -> None:
    array = record["1.weight"]
    record["1.weight"] = Array("float32", (-1, 256), array.stype, array.data)


def _short(record: ArrayRecord) -> None:
    array = record["1.weight"]
    record["1.weight"] = Array(array.dtype, array.shape, array.stype, array.data[:100])


def _garbage(record: ArrayRecord) -> None:
    array = record["1.weight"]
    record["1.weight"] = Array(array.dtype, array.shape, array.stype, b"x" * len(array.data))


def _pickle(record: ArrayRecord) -> None:
    record["1.weight"] = Array("object", (1,), "cloudpickle", b"\x80\x04")


def _empty(record: ArrayRecord) -> None:
    record.clear()


HOSTILE = [_nan, _wrong_name, _extra, _shape, _dtype, _huge_claim, _huge_header, _overflowing,
           _negative, _short, _garbage, _pickle, _empty]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE, ids=lambda f: f.__name__.strip("_"))
def test_a_hostile_update_is_left_out(
    change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid, flower = prepared(tmp_path)
    grid.tamper = change_arrays(change)
    with caplog.at_level(logging.INFO, "flwr.fedkl"):
        found = serve(grid, BASE, flower)
    assert all(bool(torch.isfinite(t).all()) for t in found.shared.values())
    refused = lines(caplog, "client 1")
    assert len(refused) == 2  # one line a round
    name = "5.keylock.scale_weight" if change is _extra else "1.weight"
    assert all("refused" in line and name in line for line in refused), refused


@pytest.mark.parametrize(
    "metrics, message",
    [
        ({"num-examples": 10**15}, "claims 1000000000000000 examples"),
        ({"num-examples": 0}, "claims 0 examples"),
        ({"num-examples": 1.5}, "claims 1.5 examples"),
        ({"loss": 1.0}, "num-examples"),
    ],
)
def test_a_hostile_weight_is_refused(
    metrics: Any, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid, flower = prepared(tmp_path)

    def tamper(node: int, reply: Message) -> None:
        if node == BAD and "arrays" in reply.content:
            reply.content["metrics"] = MetricRecord(metrics)

    grid.tamper = tamper
    serve(grid, BASE, flower)
    assert len(lines(caplog, message)) == 2


def test_a_reply_without_any_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)

    def tamper(node: int, reply: Message) -> None:
        if node == BAD and "arrays" in reply.content:
            reply.content.clear()

    grid.tamper = tamper
    serve(grid, BASE, flower)
    assert len(lines(caplog, "not one of FedKL's")) == 2


def test_an_accuracy_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)

    def tamper(node: int, reply: Message) -> None:
        if node == BAD and "own" in reply.content.metric_records.get("metrics", {}):
            reply.content["metrics"]["own"] = 17.0

    grid.tamper = tamper
    found = serve(grid, BASE, flower)
    assert len(found.accuracy.own_per_client) == 2
    assert lines(caplog, "outside [0, 1]")


def test_too_few_left(tmp_path: Path) -> None:
    grid, flower = prepared(tmp_path)
    grid.tamper = lambda node, reply: (
        _nan(reply.content["arrays"]) if "arrays" in reply.content else None
    )
    with pytest.raises(FederationError, match="min_clients is 2"):
        serve(grid, BASE, flower)


def test_another_key_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client comes back with a key that its lock was not trained with."""
    grid, flower = prepared(tmp_path)
    serve(grid, BASE, flower)
    path = tmp_path / "run" / "keys" / "client-00001.key"
    fixed_key(77, 64).save(path, overwrite=True)
    more = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=3))
    grid, flower = prepared(tmp_path)
    caplog.clear()
    found = serve(loopback(more, flower), more, flower)
    assert found.config.federation.rounds == 3
    both = lines(caplog, "the key key is")
    assert any(line.startswith("refused:") for line in both)  # the client's side
    assert any(line.startswith("node 999") for line in both)  # the server's side
    assert len(both) == 2


def test_another_group_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flower = FlowerConfig(folder=str(tmp_path / "server"), retries=0, timeout=2.0)
    for number in range(3):
        folder = with_keys(tmp_path / f"n{number}", make_keys(tmp_path / f"k{number}", 3, 64))
        if number == 1:
            fixed_key(55, 64).save(folder / "keys" / "group.key", overwrite=True)
    grid = loopback(BASE, flower, folders=lambda n: tmp_path / f"n{n}")
    found = serve(grid, BASE, flower)
    assert len(found.accuracy.own_per_client) == 2
    assert len(lines(caplog, "another group key")) == 1


@pytest.mark.parametrize("what", ["model", "settings"])
def test_another_model(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)
    serve(grid, BASE, flower)
    other = {
        "model": dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, name="lenet")),
        "settings": dataclasses.replace(BASE, training=dataclasses.replace(BASE.training, lr=0.5)),
    }[what]
    more = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=3))
    grid = loopback(more, flower)
    wrong = Node(client_app(other, flower), grid.nodes[BAD].config)

    def after_the_introduction(node: int, message: Message) -> bool:
        if message.metadata.message_type != "query":
            grid.nodes[BAD] = wrong
        return False

    grid.lose = after_the_introduction
    caplog.clear()
    serve(grid, more, flower)
    both = lines(caplog, "other settings or another model")
    assert any(line.startswith("refused: client 1") for line in both)
    assert any(line.startswith("node 999") for line in both)


def test_an_old_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)

    def tamper(node: int, reply: Message) -> None:
        if node == BAD and "protocol" in reply.content.config_records.get("config", {}):
            reply.content["config"]["protocol"] = 0

    grid.tamper = tamper
    assert len(serve(grid, BASE, flower).accuracy.own_per_client) == 2
    assert len(lines(caplog, "speaks version 0")) == 1


def test_an_old_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    grid, flower = prepared(tmp_path)
    monkeypatch.setattr("fedkl.flower.pool.PROTOCOL", 0)
    with pytest.raises(FederationError, match="0 of 3 clients"):
        serve(grid, BASE, flower)
    assert len(lines(caplog, "the server speaks version 0")) == 6


def test_two_nodes_that_are_one_client(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)
    grid.nodes[2000] = Node(grid.nodes[BAD].app, dict(grid.nodes[BAD].config))
    serve(grid, BASE, flower)
    assert len(lines(caplog, "partition-id of its own")) == 1


def test_a_client_that_never_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, flower = prepared(tmp_path)
    grid.lose = lambda node, message: node == BAD and message.metadata.message_type == "train"
    found = serve(grid, BASE, flower)
    assert len(lines(caplog, "did not answer")) == 2
    assert found.accuracy.own_per_client


def test_a_lost_message_is_sent_again(tmp_path: Path) -> None:
    """With a retry, a client that was cut off once changes nothing at all."""
    grid, flower = prepared(tmp_path)
    plain = serve(grid, BASE, flower)
    folder = with_keys(tmp_path / "again", tmp_path / "keys")
    flower = FlowerConfig(folder=str(folder), retries=1, timeout=2.0)
    grid = loopback(BASE, flower)
    lost: list[int] = []

    def lose(node: int, message: Message) -> bool:
        if node == BAD and message.metadata.message_type == "train" and not lost:
            lost.append(node)
            return True
        return False

    grid.lose = lose
    assert_same(serve(grid, BASE, flower).shared, plain.shared)
    assert lost


def test_a_node_that_is_gone(tmp_path: Path) -> None:
    grid, flower = prepared(tmp_path)
    grid.lose = lambda node, message: (
        grid.down.add(BAD) or False if message.metadata.message_type == "train" else False
    )
    found = serve(grid, BASE, flower)
    assert len(found.accuracy.own_per_client) == 2


@pytest.mark.parametrize("number", [None, -1, 3, "0", True])
def test_a_bad_partition_id(number: Any) -> None:
    with pytest.raises(ConfigError, match="partition-id"):
        place_of({"partition-id": number}, "x", 3)


def test_key_files_of_the_node_config(tmp_path: Path) -> None:
    fixed_key(0, 64).save(tmp_path / "my.key")
    fixed_key(-1, 64).save(tmp_path / "group.key")
    node = {
        "partition-id": 1,
        "fedkl-folder": str(tmp_path / "n"),
        "key-file": str(tmp_path / "my.key"),
        "group-key-file": str(tmp_path / "group.key"),
    }
    session = node_at(place_of(node, "", 3), BASE, None).session
    assert session.store.key(1) == fixed_key(0, 64)
    assert session.workspace.group == fixed_key(-1, 64)
    assert (tmp_path / "n" / "keys" / "client-00001.key").is_symlink()
    node["key-file"] = str(tmp_path / "nowhere.key")
    with pytest.raises(KeyFileError, match=r"nowhere\.key"):
        node_at(place_of(node, "", 3), BASE, None)
    (tmp_path / "n" / "keys" / "client-00001.key").unlink()
    fixed_key(3, 64).save(tmp_path / "n" / "keys" / "client-00001.key")
    node["key-file"] = str(tmp_path / "my.key")
    with pytest.raises(KeyFileError, match="keep one"):
        node_at(place_of(node, "", 3), BASE, None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"training.lrr": 0.1}, "lr"),
        ({"flower.sec": True}, "flower.sec"),
        ({"flower.timeout": "soon"}, "expected float"),
        ({"flower.secagg": 1}, "expected bool"),
        ({"federation.rounds": "three"}, "rounds"),
    ],
)
def test_bad_run_config(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from(settings)


def test_run_config() -> None:
    run, flower = settings_from(
        {
            "seed": 3,
            "training.lr": 1,
            "training.milestones": "3 5",
            "federation.clients": 7,
            "flower.timeout": 5,
            "flower.strategy": "fedadam",
            "flower.options.eta": 0.1,
        }
    )
    assert (run.seed, run.training.lr, run.training.milestones) == (3, 1.0, (3, 5))
    assert run.federation.clients == 7
    assert (flower.timeout, flower.options) == (5.0, (("eta", 0.1),))
    assert settings_from({}) == (RunConfig(), FlowerConfig())


def test_what_both_sides_agree_on() -> None:
    flower = FlowerConfig()
    base = digest(BASE, flower)
    same = dataclasses.replace(
        BASE,
        workers=2,
        checkpoint_every=2,
        federation=dataclasses.replace(BASE.federation, rounds=9),
        data=dataclasses.replace(BASE.data, root="/somewhere"),
    )
    assert digest(same, dataclasses.replace(flower, timeout=1.0, folder="x")) == base
    assert digest(dataclasses.replace(BASE, seed=1), flower) != base
    assert digest(BASE, dataclasses.replace(flower, secagg=True)) != base


def test_a_dtype_that_flower_cannot_carry() -> None:
    with pytest.raises(StateError, match="bfloat16"):
        encoded({"w": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_tensors_survive(dtype: torch.dtype) -> None:
    state = {"a": torch.arange(6).reshape(2, 3).t().to(dtype), "b": torch.ones((), dtype=dtype)}
    found = decoded(encoded(state), state)
    assert all(found[n].equal(t) and found[n].dtype == t.dtype for n, t in state.items())


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"protocol": 1, "client": 9, "examples": 1},
        {"protocol": 1, "client": 0, "examples": -1},
        {"protocol": 1, "client": "0", "examples": 1},
    ],
)
def test_bad_introductions(facts: Any) -> None:
    reply = message_of(RecordDict({"config": ConfigRecord(facts)}))
    with pytest.raises(UpdateError):
        introduction(reply, 3)


def message_of(content: RecordDict) -> Message:
    return Message(content, dst_node_id=1, message_type="query")


def test_a_result_that_is_none() -> None:
    with pytest.raises(UpdateError, match="round 4"):
        result_of(message_of(RecordDict()), Job("train", 2, 4), {}, packed=False)


@pytest.mark.parametrize("number", [torch.float16, torch.float32, torch.float64])
def test_a_client_that_would_send_its_lock(
    number: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever put it there, a piece of the lock under a permitted name does not leave."""
    plain = FlowerNode.run

    def leaky(self: FlowerNode, job: Any, shared: Any, **more: Any) -> Any:
        found = plain(self, job, shared, **more)
        if job.client == 1 and job.kind == "train":
            private = self.session.workspace.private
            lock = next(t for n, t in private.items() if n.endswith("scale_weight"))
            name = next(n for n in found.tensors if n.endswith("weight"))
            body = lock.detach().to(number).numpy().tobytes()
            room = found.tensors[name].numel() * 4
            forged = torch.frombuffer(bytearray(body[:room]), dtype=torch.float32)
            values = found.tensors[name].clone().reshape(-1)
            values[: len(forged)] = forged.nan_to_num(0.0)
            found = dataclasses.replace(
                found, tensors={**found.tensors, name: values.reshape(found.tensors[name].shape)}
            )
        return found

    monkeypatch.setattr(FlowerNode, "run", leaky)
    grid, flower = prepared(tmp_path)
    serve(grid, BASE, flower)
    refused = lines(caplog, "private; nothing was sent")
    assert sum(line.startswith("refused: tensor") for line in refused) == 2
    assert sum(line.startswith("node 999") for line in refused) == 2


def test_clients_warn_of_crafted_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier with one living row: an honest server never sends that, a fishing one does."""
    grid, flower = prepared(tmp_path)
    caplog.set_level(logging.WARNING, "flwr.fedkl")
    serve(grid, BASE, flower)
    assert not lines(caplog, "looks crafted")

    def crafted(*args: Any) -> dict[str, torch.Tensor]:
        shared = decoded(*args)
        name = [n for n, tensor in shared.items() if tensor.ndim == 2][-1]
        shared[name][1:] = 0
        shared[name.replace("weight", "bias")][0] = -60
        return shared

    monkeypatch.setattr("fedkl.flower.client.decoded", crafted)
    flower = dataclasses.replace(flower, folder=str(tmp_path / "b"))
    with_keys(tmp_path / "b", make_keys(tmp_path / "more", 3, 64))
    serve(loopback(BASE, flower), BASE, flower)
    assert lines(caplog, "looks crafted")


@pytest.mark.parametrize("defense", ["noise", "norm + noise", "prune+noise"])
def test_noise_from_a_seed_that_the_server_has_is_refused_on_both_sides(
    defense: str, tmp_path: Path
) -> None:
    wanted = config(defense, data={"samples": 64})
    flower = FlowerConfig(folder=str(tmp_path / "run"))
    words = r"over Flower: its noise follows from the run's seed.*flower\.dp = 'local'"
    grid = loopback(wanted, flower)
    with pytest.raises(ConfigError, match=words):
        serve(grid, wanted, flower)
    with pytest.raises(ConfigError, match=words):
        check_together(wanted, flower)
    check_together(config("norm+prune"), flower)
    assert not (tmp_path / "run").exists()
