"""Sealed private layers over a grid: what the server hands on, and what it cannot do with it."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fedhelp import Stopped, assert_same, config, fixed_seed, stop_after
from flowhelp import loopback, serve
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedkl.errors import ConfigError, UpdateError
from fedkl.federation import RunConfig, run
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.jobs import Job
from fedkl.federation.sealed import sealed_length
from fedkl.federation.session import Session
from fedkl.federation.store import ClientStore
from fedkl.flower import FlowerConfig
from fedkl.flower.node import job_from, job_text
from fedkl.flower.replies import sealed_in
from fedkl.flower.settings import PROTOCOL, digest
from fedkl.flower.wire import ARRAYS, CONFIG, SEALED, encoded

SEALING = config(
    "pad",
    defense_settings={"one_key": True},
    data={"samples": 64},
    federation={"clients": 3, "rounds": 3, "min_clients": 2, "seal_private": True},
    evaluation={"every": 0, "images": 20, "wrong_keys": 1},
)


def group_in(folder: Path) -> Path:
    (folder / "keys").mkdir(parents=True)
    fixed_seed(-1).save(folder / "keys" / "group.key")
    return folder


def sealed_at(folder: Path) -> dict[str, str]:
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    assert latest is not None
    return dict(latest.facts["sealed"])


def test_the_same_bits_as_in_one_process(tmp_path: Path) -> None:
    here, there = group_in(tmp_path / "here"), tmp_path / "there"
    flower = FlowerConfig(folder=str(there))
    grid = loopback(SEALING, flower, folders=lambda n: group_in(tmp_path / f"node-{n}"))
    one, two = run(SEALING, here, bundle=None), serve(grid, SEALING, flower)
    assert_same(one.shared, two.shared)
    assert one.accuracy.other_client is not None
    assert one.accuracy == two.accuracy  # a node has nobody else's lock but the mean
    assert sealed_at(here) == sealed_at(there)
    # The server has passed all of it on, and none of it in the clear.
    secret = [
        tensor.numpy().tobytes()
        for n in range(3)
        for tensor in (ClientStore(tmp_path / f"node-{n}", keyed=True, one=True)
                       .load(n, before=4).private or {}).values()
        if tensor.is_floating_point() and tensor.numel() > 3 and float(tensor.std()) > 0
    ]  # fmt: skip
    wire = list(grid.sent)
    for reply in grid.received:
        wire += [a.data for r in reply.content.array_records.values() for a in r.values()]
        wire += [
            base64.b64decode(str(record[SEALED]))
            for record in reply.content.config_records.values()
            if SEALED in record
        ]
    assert len(secret) > 8
    assert sum(len(data) for data in wire) > 100_000
    assert not [s for s in secret if any(s in data for data in wire)]


def test_secure_aggregation_beside_it(tmp_path: Path) -> None:
    """The sums are masked, what is sealed goes along as it is."""
    federation = dataclasses.replace(SEALING.federation, rounds=2)
    wanted = dataclasses.replace(SEALING, federation=federation)
    here, there = group_in(tmp_path / "here"), group_in(tmp_path / "there")
    flower = FlowerConfig(folder=str(there), secagg=True, retries=0)
    one, two = run(wanted, here), serve(loopback(wanted, flower), wanted, flower)
    apart = max(float((one.shared[n] - two.shared[n]).abs().max()) for n in one.shared)
    assert 0 < apart < 1e-3
    assert set(sealed_at(there)) == {"0", "1", "2"}


def test_secure_aggregation_goes_on_without_what_one_client_sealed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = dataclasses.replace(SEALING.federation, rounds=1)
    wanted = dataclasses.replace(SEALING, federation=federation)
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")), secagg=True, retries=0)
    grid = loopback(wanted, flower)

    def tamper(node: int, reply: Message) -> Message | None:
        for record in [] if reply.has_error() else reply.content.config_records.values():
            for name in [n for n in record if node == 999 and n.endswith(SEALED)]:
                record[name] = "AAAA"
        return None

    grid.tamper = tamper
    serve(grid, wanted, flower)
    assert set(sealed_at(tmp_path / "run")) == {"0", "2"}
    (said,) = [r.getMessage() for r in caplog.records if "got 4 characters" in r.getMessage()]
    assert said.startswith("client 1, round 1: sealed private layers")


def test_a_server_that_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")))

    with pytest.raises(Stopped):
        serve(loopback(SEALING, flower), SEALING, flower, on_event=stop_after(2))
    two = serve(loopback(SEALING, flower), SEALING, flower)
    assert_same(run(SEALING, group_in(tmp_path / "here")).shared, two.shared)


def asked(
    grid: Any, flower: FlowerConfig, shared: Any, job: Job, config: RunConfig = SEALING
) -> Message:
    facts = {"protocol": PROTOCOL, "settings": digest(config, flower), "packed": False}
    content = RecordDict(
        {ARRAYS: encoded(shared), CONFIG: ConfigRecord({**facts, "job": job_text(job)})}
    )
    node = 1000 - job.client
    message = Message(content, dst_node_id=node, message_type=MessageType.TRAIN)
    return grid.send_and_receive([message])[0]


def test_a_server_cannot_choose_what_clients_go_on_from(tmp_path: Path) -> None:
    """Of its own making, of another round, of nobody, or another set for the same round."""
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")))
    grid = loopback(SEALING, flower)
    shared = Session(SEALING, tmp_path / "server", None).initial()
    first = [asked(grid, flower, shared, Job("train", n, 1)) for n in range(3)]
    sealed = {str(n): str(r.content[CONFIG][SEALED]) for n, r in enumerate(first)}
    swapped = {**sealed, "1": sealed["2"]}
    length = len(sealed["0"])
    for wrong, said in (
        ({}, "got none of the private layers"),
        (swapped, "cannot be opened"),
        ({"0": "A" * length}, "cannot be opened"),
    ):
        reply = asked(grid, flower, shared, Job("train", 0, 2, sealed=wrong))
        assert reply.has_error()
        assert said in reply.error.reason
        assert "\n" not in reply.error.reason
    good = asked(grid, flower, shared, Job("train", 0, 2, keep=[1], sealed=sealed))
    assert not good.has_error()
    assert len(str(good.content[CONFIG][SEALED])) == length
    again = asked(grid, flower, shared, Job("train", 0, 2, keep=[1], sealed=sealed))
    assert again.content[CONFIG][SEALED] == good.content[CONFIG][SEALED]
    # One client's alone would have its answer to the same question a second time.
    other = asked(grid, flower, shared, Job("train", 0, 2, sealed={"1": sealed["1"]}))
    assert other.has_error()
    assert "again with another global state" in other.error.reason
    old = asked(grid, flower, shared, Job("train", 0, 3, sealed=sealed))
    assert "cannot be opened" in old.error.reason


def test_a_channel_lock_that_diverged_sends_nothing(tmp_path: Path) -> None:
    """As a pad does: its layers in the middle have no private ones beside them."""
    settings = dataclasses.replace(SEALING.defense, name="channel")
    wanted = dataclasses.replace(SEALING, defense=settings)
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")))
    grid = loopback(wanted, flower)
    shared = Session(wanted, tmp_path / "server", None).initial()
    good = asked(grid, flower, shared, Job("train", 0, 1), wanted)
    assert len(str(good.content[CONFIG][SEALED])) > 1000
    broken = {n: t * float("inf") if t.is_floating_point() else t for n, t in shared.items()}
    reply = asked(grid, flower, broken, Job("train", 1, 1), wanted)
    assert reply.has_error()
    assert "client 1: training diverged in round 1" in reply.error.reason


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedmedian"])
def test_strategies_leave_what_is_sealed_alone(strategy: str, tmp_path: Path) -> None:
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")), strategy=strategy)
    serve(loopback(SEALING, flower), SEALING, flower)
    assert set(sealed_at(tmp_path / "run")) == {"0", "1", "2"}


def test_no_second_answer_once_the_state_before_is_gone(tmp_path: Path) -> None:
    """The layers of the middle would be the same, but not momentum and the count of the pad."""
    training = dataclasses.replace(SEALING.training, keep_momentum=True)
    wanted = dataclasses.replace(SEALING, training=training)
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")))
    grid = loopback(wanted, flower)
    shared = Session(wanted, tmp_path / "server", None).initial()
    first = asked(grid, flower, shared, Job("train", 0, 1), wanted)
    sealed = {"0": str(first.content[CONFIG][SEALED])}
    job = Job("train", 0, 2, sealed=sealed)  # keep=[]: nothing of the round before
    assert not asked(grid, flower, shared, job, wanted).has_error()
    store = ClientStore(tmp_path / "run", keyed=True, one=True)
    assert store.rounds(0) == [2]
    spent = store.load(0, before=3).spent
    again = asked(grid, flower, shared, job, wanted)
    assert again.has_error()
    assert "would be answered from the private state after round 0" in again.error.reason
    assert store.load(0, before=3).spent == spent


@pytest.mark.parametrize("text", [None, "", "AAAA", 7])
def test_what_a_client_sealed_must_have_its_size(
    text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(SEALING, tmp_path / "server", None)
    length = sealed_length(session.workspace.private)
    assert sealed_in({SEALED: "A" * length}, length) == {SEALED: "A" * length}
    assert sealed_in({SEALED: text}, 0) == {}
    with pytest.raises(UpdateError, match=rf"expected {length} characters"):
        sealed_in({SEALED: text}, length)
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")), retries=0, timeout=2.0)
    grid = loopback(SEALING, flower)

    def tamper(node: int, reply: Message) -> Message | None:
        if node == 999 and not reply.has_error() and SEALED in reply.content[CONFIG]:
            record = dict(reply.content[CONFIG])
            record.pop(SEALED)
            reply.content[CONFIG] = ConfigRecord(
                record if text is None else {**record, SEALED: text}
            )
        return None

    grid.tamper = tamper
    serve(grid, SEALING, flower)
    refused = [r.getMessage() for r in caplog.records if "sealed private layers" in r.getMessage()]
    assert len(refused) == 3
    assert set(sealed_at(tmp_path / "run")) == {"0", "2"}


def test_jobs_go_over_the_wire_whole() -> None:
    job = Job("train", 2, 5, keep=[3, 4], sealed={"0": "AA==", "11": "BB=="})
    assert job_from(job_text(job), "train", 2) == job
    for broken in ({"sealed": [1]}, {"sealed": {"x": "AA=="}}, {"sealed": None}):
        text = json.dumps({**json.loads(job_text(job)), **broken})
        with pytest.raises(ConfigError, match="holds no job"):
            job_from(text, "train", 2)


@pytest.mark.parametrize("dp", ["local", "client", "server"])
def test_no_noise_is_on_what_is_sealed(dp: str, tmp_path: Path) -> None:
    flower = FlowerConfig(folder=str(tmp_path / "run"), dp=dp)
    with pytest.raises(ConfigError, match=rf"seal_private with flower.dp '{dp}'"):
        serve(loopback(SEALING, flower), SEALING, flower)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("dp", ["local", "server"])
def test_a_client_sees_to_that_itself(dp: str, tmp_path: Path) -> None:
    """The server is whom the noise is against."""
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run")), dp=dp)
    grid = loopback(SEALING, flower)
    shared = Session(SEALING, tmp_path / "server", None).initial()
    reply = asked(grid, flower, shared, Job("train", 0, 1))
    assert reply.has_error()
    assert f"seal_private with flower.dp '{dp}'" in reply.error.reason
    assert not (tmp_path / "run" / "clients").exists()
