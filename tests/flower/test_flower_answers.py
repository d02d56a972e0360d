"""A pad answers every question once: rounds repeated, rewound, replayed after a restart."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import Stopped, assert_same, config, make_keys, outcome, stop_after, with_keys
from flowhelp import loopback, serve
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedkl.errors import CheckpointError, FederationError, UpdateError
from fedkl.federation import RunConfig, run
from fedkl.federation.jobs import Job, Result
from fedkl.flower import FlowerConfig
from fedkl.flower.answers import digest_of
from fedkl.flower.node import Node, job_text
from fedkl.flower.settings import PROTOCOL, digest
from fedkl.flower.wire import ARRAYS, CONFIG, encoded

EPOCH = "2.keylock.epoch"


def pads(**more: Any) -> RunConfig:
    """Rounds of 32 presentations; a pad serves one, or two."""
    given: dict[str, Any] = {
        "data": {"samples": 32},
        "federation": {"rounds": 9, "join_steps": 2},
        "renewal": {"budget": 64, "on_spent": "error", "every": 2},
        "evaluation": {"every": 0, "images": 20, "wrong_keys": 1},
    }
    return config("pad", **{**given, **more})


def other(shared: dict[str, Tensor]) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        n: t + 0.1 * torch.randn(t.shape, generator=noise) if t.is_floating_point() else t
        for n, t in shared.items()
    }


def ask(
    node: Node, round_: int, shared: dict[str, Tensor], keep: Sequence[int] = (), **more: Any
) -> Result:
    return node.run(Job("train", 0, round_, keep=keep), shared, **more)


def asked_thrice(folder: Path, wanted: RunConfig | None = None) -> tuple[Node, list[Result]]:
    """A client that answered rounds 1 to 3, under pads 0, 0 and 1, and still has all states."""
    node = Node(wanted or pads(), folder)
    return node, [ask(node, r, node.start, keep=range(r)) for r in (1, 2, 3)]


def epoch_after(node: Node, round_: int = 99) -> int:
    private = node.session.store.load(0, before=round_ + 1).private
    assert private is not None
    return int(private[EPOCH])


def test_the_same_question_gets_the_same_answer(tmp_path: Path) -> None:
    node, first = asked_thrice(tmp_path)
    again = Node(pads(), tmp_path)  # another process
    for round_ in (3, 1, 2, 3):
        found = ask(again, round_, node.start, keep=range(round_))
        assert_same(found.tensors, first[round_ - 1].tensors)
    assert epoch_after(node) == 1
    assert not ask(node, 4, other(node.start), keep=[3]).facts["renewed"]
    assert ask(node, 5, other(node.start), keep=[4]).facts["renewed"]
    path = tmp_path / "clients" / "00000" / "answered.json"
    assert os.stat(path).st_mode & 0o777 == 0o600
    rounds = json.loads(path.read_text())["rounds"]
    said = [(r, a["base"], a["epoch"], a["spent"]) for r, a in rounds.items()]
    assert said == [
        ("1", 0, 0, 32), ("2", 1, 0, 64), ("3", 2, 1, 32), ("4", 3, 1, 64), ("5", 4, 2, 32)
    ]  # fmt: skip


@pytest.mark.parametrize("round_", [3, 2, 1])
def test_another_question_of_an_answered_round_is_refused(round_: int, tmp_path: Path) -> None:
    node, _ = asked_thrice(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message = rf"client 0: got round {round_} again .* go on with round 4.* and a new key"
    with pytest.raises(FederationError, match=message):
        ask(node, round_, other(node.start), keep=range(round_))
    with pytest.raises(FederationError, match=message):
        ask(node, round_, node.start, keep=range(round_), proximal=0.1)
    seeded = Node(dataclasses.replace(pads(), seed=1), tmp_path)  # other images under the pad
    with pytest.raises(FederationError, match=message):
        ask(seeded, round_, node.start, keep=range(round_))
    assert {p: p.read_bytes() for p in before} == before
    assert ask(node, 4, other(node.start), keep=[3]).facts["spent"] == 64


@pytest.mark.parametrize("round_", [-1, 0, 1, 4])
def test_a_round_below_the_last_is_refused(round_: int, tmp_path: Path) -> None:
    """Those that a client was not there for are over."""
    node = Node(pads(), tmp_path)
    for number in (2, 3, 5):
        ask(node, number, node.start, keep=range(number))
    with pytest.raises(FederationError, match=rf"got round {round_}, .* expected round 6 or later"):
        ask(node, round_, node.start)
    assert epoch_after(node) == 2


def test_no_answer_without_the_state_it_was_given_from(tmp_path: Path) -> None:
    """The server says which states to keep: one that has the older ones dropped gains nothing."""
    node, _ = asked_thrice(tmp_path)
    ask(node, 4, node.start)  # keeps none
    for round_ in (2, 3, 4):
        with pytest.raises(FederationError, match=rf"state after round 0 .* expected {round_ - 1}"):
            ask(node, round_, node.start)
    assert ask(node, 5, node.start).facts["renewed"]


def test_a_lost_state_is_no_way_back_to_its_pad(tmp_path: Path) -> None:
    node, _ = asked_thrice(tmp_path)
    (tmp_path / "clients" / "00000" / "round-000003.safetensors").unlink()
    with pytest.raises(FederationError, match=r"after round 2 under pad 1, expected 3 .* Restore"):
        ask(node, 4, node.start)


def test_a_policy_may_change_and_old_answers_may_not(tmp_path: Path) -> None:
    spent = {"budget": 64, "on_spent": "error"}
    node, _ = asked_thrice(tmp_path / "a", pads(renewal={**spent, "budget": 96}))
    with pytest.raises(FederationError, match=r"96 presentations .* budget of 96"):
        ask(node, 4, node.start, keep=[3])
    more = Node(pads(renewal={**spent, "budget": 96, "on_spent": "renew"}), tmp_path / "a")
    assert ask(more, 4, node.start, keep=range(4)).facts["renewed"]
    kept = (tmp_path / "a" / "clients" / "00000" / "round-000004.safetensors").read_bytes()
    back = Node(pads(renewal={**spent, "budget": 500}), tmp_path / "a")
    with pytest.raises(FederationError, match=r"under pad 0, expected 3 and 1 as before"):
        ask(back, 4, node.start, keep=range(4))
    path = tmp_path / "a" / "clients" / "00000" / "round-000004.safetensors"
    assert path.read_bytes() == kept


def test_states_of_before_there_were_records(tmp_path: Path) -> None:
    node, _ = asked_thrice(tmp_path)
    (tmp_path / "clients" / "00000" / "answered.json").unlink()
    for _ in range(2):  # the second time there is a record again
        with pytest.raises(FederationError, match="rounds up to 3 are answered"):
            ask(node, 3, node.start, keep=[2])
    assert not ask(node, 4, node.start, keep=[3]).facts["renewed"]


@pytest.mark.parametrize("text", ["", "[]", '{"rounds": {}}', '{"before": 0, "rounds": {"1": 2}}'])
def test_a_damaged_record(text: str, tmp_path: Path) -> None:
    node, _ = asked_thrice(tmp_path)
    path = tmp_path / "clients" / "00000" / "answered.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"answered\.json"):
        ask(node, 4, node.start)


def test_a_killed_client_may_be_asked_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state was written, but nothing had been sent."""
    node, _ = asked_thrice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fedkl.flower.answers.Answers.add", _killed)
        with pytest.raises(KeyboardInterrupt):
            ask(node, 4, node.start, keep=[3])
    assert ask(node, 4, other(node.start), keep=[3]).facts["spent"] == 64


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_kept_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node, _ = asked_thrice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fedkl.federation.session._finite", lambda state: False)
        with pytest.raises(UpdateError, match="nothing was sent"):
            ask(node, 4, node.start, keep=[3])
    assert ask(node, 4, other(node.start), keep=[3]).facts["spent"] == 64


def test_only_pads_have_a_record(tmp_path: Path) -> None:
    node = Node(config("channel"), tmp_path)
    ask(node, 1, node.start)
    ask(node, 1, other(node.start))
    assert not list(tmp_path.rglob("answered.json"))


def test_digest_is_of_every_bit() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}
    want = digest_of([1], state)
    assert digest_of([1], dict(reversed(state.items()))) == want
    assert digest_of([1], {**state, "a": torch.arange(6.0).reshape(3, 2)[:, [0, 1]].T}) != want
    wide = torch.arange(12.0).reshape(2, 3, 2) / 2
    assert digest_of([1], {**state, "a": wide[..., 0]}) == want
    assert digest_of([2], state) != want
    for changed in ({"b": torch.tensor(False)}, {"a": state["a"].nextafter(torch.tensor(9.0))}):
        assert digest_of([1], {**state, **changed}) != want


def test_a_refusal_reaches_the_server(tmp_path: Path) -> None:
    """Through the whole app: the reply is one line and holds no array."""
    wanted = pads(federation={"clients": 1, "rounds": 5, "join_steps": 2})
    flower = FlowerConfig(folder=str(tmp_path))
    grid = loopback(wanted, flower)
    start = Node(wanted, tmp_path).start

    def reply(round_: int, shared: dict[str, Tensor]) -> Message:
        facts = {"protocol": PROTOCOL, "settings": digest(wanted, flower), "packed": False}
        facts |= {"job": job_text(Job("train", 0, round_, keep=[round_ - 1]))}
        content = RecordDict({ARRAYS: encoded(shared), CONFIG: ConfigRecord(facts)})
        message = Message(content, dst_node_id=1000, message_type="train")
        return grid.send_and_receive([message])[0]

    assert not any(reply(r, start).has_error() for r in (1, 2, 3, 3))
    refused = [reply(3, other(start)), reply(1, other(start))]
    assert all(r.has_error() and "\n" not in r.error.reason for r in refused)
    assert all("go on with round 4" in r.error.reason for r in refused)


def test_a_restarted_server_may_repeat_its_rounds(tmp_path: Path) -> None:
    """From a checkpoint of long ago: the same bits as the engine, and no pad more."""
    wanted = dataclasses.replace(pads(), checkpoint_every=4)
    one = run(wanted, with_keys(tmp_path / "here", make_keys(tmp_path / "keys", 3, seeds=True)))
    folder = with_keys(tmp_path / "there", tmp_path / "keys")
    flower = FlowerConfig(folder=str(folder), retries=0, timeout=2.0)

    with pytest.raises(Stopped):
        serve(loopback(wanted, flower), wanted, flower, on_event=stop_after(7))
    assert [p.stem for p in (folder / "checkpoints").glob("round-*.json")] == ["round-000004"]
    grid = loopback(wanted, flower)
    two = serve(grid, wanted, flower)
    assert not any(reply.has_error() for reply in grid.received)
    assert_same(one.shared, two.shared)
    mine, theirs = outcome(tmp_path / "here"), outcome(folder)
    assert {n: t for n, t in mine.items() if n.startswith("clients")} == {
        n: t for n, t in theirs.items() if n.startswith("clients")
    }
