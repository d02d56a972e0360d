"""One key for all clients, over a grid: the key that everybody's node config names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fedhelp import assert_same, config, fixed_seed
from flowhelp import loopback, serve
from flwr.app import Message, MessageType

from fedkl.errors import KeyFileError
from fedkl.federation import run
from fedkl.federation.store import ClientStore
from fedkl.flower import FlowerConfig
from fedkl.flower.node import node_at, place_of
from fedkl.key import Key

ONE = config(
    "pad",
    defense_settings={"one_key": True},
    data={"samples": 64},
    federation={"clients": 3, "rounds": 2, "min_clients": 2},
    evaluation={"every": 0, "images": 20, "wrong_keys": 1},
)


def group_in(folder: Path, number: int) -> Path:
    keys = folder / "keys"
    keys.mkdir(parents=True)
    fixed_seed(number).save(keys / "group.key")
    return folder


def test_the_same_bits_as_in_one_process(tmp_path: Path) -> None:
    here, there = group_in(tmp_path / "here", -1), group_in(tmp_path / "there", -1)
    flower = FlowerConfig(folder=str(there))
    one, two = run(ONE, here), serve(loopback(ONE, flower), ONE, flower)
    assert_same(one.shared, two.shared)
    assert Key.load(there / "keys" / "client-00002.key") == fixed_seed(-1)


def test_secure_aggregation_beside_it(tmp_path: Path) -> None:
    """Against each other: what is summed under one pad is the same as without."""
    wanted = dataclasses.replace(ONE, federation=dataclasses.replace(ONE.federation, rounds=1))
    here, there = group_in(tmp_path / "here", -1), group_in(tmp_path / "there", -1)
    flower = FlowerConfig(folder=str(there), secagg=True, retries=0)
    one, two = run(wanted, here), serve(loopback(wanted, flower), wanted, flower)
    step = 2 * 4.0 / 2**22  # of the quantization
    apart = max(float((one.shared[n] - two.shared[n]).abs().max()) for n in one.shared)
    assert 0 < apart <= step


def test_a_client_that_was_cut_off_has_the_pad_of_the_others_again(tmp_path: Path) -> None:
    federation = dataclasses.replace(ONE.federation, rounds=3)
    renewal = dataclasses.replace(ONE.renewal, every=1)
    wanted = dataclasses.replace(ONE, federation=federation, renewal=renewal)
    flower = FlowerConfig(folder=str(group_in(tmp_path / "run", -1)), retries=0, timeout=2.0)
    grid, asked = loopback(wanted, flower), []

    def lost(node: int, message: Message) -> bool:
        if node != 999 or message.metadata.message_type != MessageType.TRAIN:
            return False
        asked.append(node)
        return len(asked) == 2

    grid.lose = lost
    serve(grid, wanted, flower)
    store = ClientStore(tmp_path / "run", keyed=True, one=True)
    assert store.rounds(1) == [1, 3]
    for client in range(3):
        private = store.load(client, before=4).private or {}
        assert {int(t) for n, t in private.items() if n.endswith("keylock.epoch")} == {2}


def test_a_client_with_a_key_of_its_own_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pad would be another one: what it teaches does not add up with the others'."""
    flower = FlowerConfig(folder=str(tmp_path / "server"), retries=0, timeout=2.0)
    for number in range(3):
        group_in(tmp_path / f"n{number}", 5 if number == 1 else -1)
    grid = loopback(ONE, flower, folders=lambda n: tmp_path / f"n{n}")
    assert len(serve(grid, ONE, flower).accuracy.own_per_client) == 2
    told = [r.getMessage() for r in caplog.records if "another group key" in r.getMessage()]
    assert len(told) == 1


def test_a_key_that_can_be_guessed_by_its_fingerprint_is_not_shown(tmp_path: Path) -> None:
    """Of sixteen signs there are 65,536, and the server would have what tells the right one."""
    Key.from_vector([1.0, -1.0] * 8).save(tmp_path / "all.key")
    channel = config("channel", defense_settings={"one_key": True, "length": 16})
    node = {
        "partition-id": 1,
        "fedkl-folder": str(tmp_path / "n"),
        "group-key-file": str(tmp_path / "all.key"),
    }
    with pytest.raises(KeyFileError, match=r"imported vector.*fingerprint"):
        node_at(place_of(node, "", 3), channel, None)


def test_the_node_config_names_it_once(tmp_path: Path) -> None:
    fixed_seed(-1).save(tmp_path / "all.key")
    node = {
        "partition-id": 1,
        "fedkl-folder": str(tmp_path / "n"),
        "group-key-file": str(tmp_path / "all.key"),
    }
    session = node_at(place_of(node, "", 3), ONE, None).session
    assert session.store.key(1) == session.group == fixed_seed(-1)
    fixed_seed(7).save(tmp_path / "own.key")
    node |= {"fedkl-folder": str(tmp_path / "m"), "key-file": str(tmp_path / "own.key")}
    with pytest.raises(KeyFileError, match="all clients are to have one"):
        node_at(place_of(node, "", 3), ONE, None)
    node = {k: v for k, v in node.items() if k != "group-key-file"}
    node |= {"fedkl-folder": str(tmp_path / "o")}
    with pytest.raises(KeyFileError, match=r"group.key is missing, but there is"):
        node_at(place_of(node, "", 3), ONE, None)
    assert not (tmp_path / "o" / "keys" / "group.key").exists()
