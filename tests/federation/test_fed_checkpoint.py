"""Checkpoints and client states: damage is found, and what is needed is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fedhelp import assert_outcome, config, digits, make_keys, outcome, with_keys

from fedkl.errors import CheckpointError, ConfigError, KeyFileError
from fedkl.federation import Event, run
from fedkl.federation.checkpoint import Checkpoint, Checkpoints
from fedkl.federation.store import ClientState, ClientStore
from fedkl.files import read_tensors, write_tensors
from fedkl.key import Key


def save(place: Checkpoints, *rounds: int) -> None:
    for number in rounds:
        place.save(
            Checkpoint(
                number,
                {"a.weight": torch.full((3,), float(number)), "steps": torch.tensor(number)},
                {"momentum_buffer:a.weight": torch.ones(3)},
                {"seconds": 1.5, "best": {"round": 1, "own_key": 0.5}, "counts": {"refused": 0}},
            )
        )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"refused": 0', '"refused": 1'))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated tensors": (".safetensors", truncate),
    "empty tensors": (".safetensors", empty),
    "one bit": (".safetensors", flip),
    "no tensors": (".safetensors", Path.unlink),
    "truncated json": (".json", truncate),
    "empty json": (".json", empty),
    "edited json": (".json", edit),
    "no digest": (".json", lambda path: path.write_text("{}\n") and None),
    "not a table": (".json", lambda path: path.write_text("[1]\n") and None),
}


def test_round_trip(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path / "checkpoints")
    assert place.latest() == (None, [])
    save(place, 1, 2)
    found, problems = Checkpoints(tmp_path / "checkpoints").latest()
    assert found is not None
    assert (found.round, problems) == (2, [])
    assert found.shared["a.weight"].tolist() == [2.0] * 3
    assert found.shared["steps"].item() == 2
    assert found.server["momentum_buffer:a.weight"].tolist() == [1.0] * 3
    assert found.facts["best"] == {"round": 1, "own_key": 0.5}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path)
    save(place, 1, 2, 3, 7)
    (tmp_path / "round-000003 (copy).json").write_text("{}")
    (tmp_path / "round-last.json").write_text("{}")
    assert place.rounds() == [3, 7]
    assert len(list(tmp_path.glob("round-*.safetensors"))) == 2


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_a_damaged_one_is_used(kind: str, tmp_path: Path) -> None:
    suffix, damage = DAMAGE[kind]
    place = Checkpoints(tmp_path)
    save(place, 1, 2)
    damage(tmp_path / f"round-000002{suffix}")
    found, problems = place.latest()
    assert found is not None
    assert found.round == 1
    assert len(problems) == 1
    assert "round-000002" in problems[0]
    damage(tmp_path / f"round-000001{suffix}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used") as caught:
        place.latest()
    assert "without --resume" in str(caught.value)


def test_a_new_checkpoint_outlives_damaged_newer_ones(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path)
    save(place, 1, 5)
    for number in (8, 9):
        for suffix in (".json", ".safetensors"):
            source = tmp_path / f"round-000005{suffix}"
            shutil.copy(source, tmp_path / f"round-00000{number}{suffix}")
    found, problems = place.latest()
    assert found is not None
    assert (found.round, len(problems)) == (5, 2)
    save(place, 6)
    assert place.rounds() == [5, 6]
    found, problems = place.latest()
    assert found is not None
    assert (found.round, problems) == (6, [])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", ["truncated tensors", "edited json"])
def test_a_run_goes_on_from_the_one_before(kind: str, every: int, tmp_path: Path) -> None:
    """And ends as if nothing had happened, although the clients' files are newer."""
    keys = make_keys(tmp_path / "keys", 5)
    some = {"clients": 5, "fraction": 0.6}
    short = config("channel", federation={"rounds": 5, **some}, checkpoint_every=every)
    wanted = config("channel", federation={"rounds": 7, **some}, checkpoint_every=every)
    straight, folder = with_keys(tmp_path / "a", keys), with_keys(tmp_path / "b", keys)
    run(wanted, straight, bundle=digits())
    run(short, folder, bundle=digits())
    suffix, damage = DAMAGE[kind]
    damage(folder / "checkpoints" / f"round-000005{suffix}")
    events: list[Event] = []
    run(wanted, folder, resume=True, bundle=digits(), on_event=events.append)
    notes = [e.message for e in events if e.kind == "note"]
    assert any("checkpoint of round 5 not used" in note for note in notes)
    assert "resumed after round 4" in notes
    assert_outcome(outcome(folder), outcome(straight))


def test_a_damaged_client_state_is_named(tmp_path: Path) -> None:
    run(config("fedbn", federation={"rounds": 2}), tmp_path, bundle=digits())
    truncate(tmp_path / "clients" / "00001" / "round-000002.safetensors")
    with pytest.raises(CheckpointError, match=r"00001/round-000002.safetensors"):
        run(config("fedbn", federation={"rounds": 3}), tmp_path, resume=True, bundle=digits())
    more = config("fedbn", federation={"rounds": 3}, workers=2)
    with pytest.raises(CheckpointError, match=r"00001/round-000002.safetensors"):
        run(more, tmp_path, resume=True, bundle=digits())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"traning": {}}'])
def test_a_damaged_configuration(text: str, tmp_path: Path) -> None:
    run(config(federation={"rounds": 1}), tmp_path, bundle=digits())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        run(config(federation={"rounds": 2}), tmp_path, resume=True, bundle=digits())


def test_damaged_metrics_cost_no_more_than_their_line(tmp_path: Path) -> None:
    run(config(federation={"rounds": 2}), tmp_path, bundle=digits())
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text() + '{"round": 9, "cut')
    got = run(config(federation={"rounds": 3}), tmp_path, resume=True, bundle=digits())
    assert [line["round"] for line in got.validation] == [1, 2, 3]
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("defense", ["fedbn", "channel"])
def test_locks_lost_are_not_replaced(defense: str, tmp_path: Path) -> None:
    run(config(defense, federation={"rounds": 1}), tmp_path, bundle=digits())
    more = config(defense, federation={"rounds": 2})
    for name in ("00001", ""):
        shutil.rmtree(tmp_path / "clients" / name)
        with pytest.raises(CheckpointError, match="Restore clients/"):
            run(more, tmp_path, resume=True, bundle=digits())
    assert json.loads((tmp_path / "config.json").read_text())["federation"]["rounds"] == 1
    forget(tmp_path, "kept")  # as an older version wrote it
    with pytest.raises(CheckpointError, match="no private state of any client"):
        run(more, tmp_path, resume=True, bundle=digits())


def forget(run: Path, name: str) -> None:
    """Takes a fact out of the newest checkpoint, as if it had never been written."""
    place = Checkpoints(run / "checkpoints")
    found, _ = place.latest()
    assert found is not None
    facts = {n: value for n, value in found.facts.items() if n != name}
    place.save(Checkpoint(found.round, found.shared, found.server, facts))


def test_clients_that_never_took_part_need_no_lock(tmp_path: Path) -> None:
    some = {"clients": 4, "fraction": 0.25}
    run(config("channel", federation={"rounds": 1, **some}), tmp_path, bundle=digits())
    assert len(list((tmp_path / "clients").iterdir())) == 1
    run(config("channel", federation={"rounds": 2, **some}), tmp_path, resume=True, bundle=digits())


def test_states_of_the_rounds_before_the_first_checkpoint_stop_nothing(tmp_path: Path) -> None:
    wanted = config("channel", federation={"rounds": 3}, checkpoint_every=3)
    run(wanted, tmp_path, bundle=digits())
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"summary\.json is there"):
        run(wanted, tmp_path, resume=True, bundle=digits())
    (tmp_path / "summary.json").unlink()  # killed in round 3, just before its checkpoint
    assert run(wanted, tmp_path, resume=True, bundle=digits()).validation[-1]["round"] == 3


def test_looking_for_checkpoints_makes_no_folder(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints").latest() == (None, [])
    assert not (tmp_path / "checkpoints").exists()


def test_a_state_belongs_to_the_key_it_was_made_with(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=True)
    group, own = store.group(), store.key(3)
    assert own is not None
    store.save(3, state(1), keep=[])
    assert store.load(3, before=2).round == 1
    Key.generate().save(store.keys / "client-00003.key", overwrite=True)
    with pytest.raises(KeyFileError, match=rf"client-00003.key .*client 3.*{own.fingerprint}"):
        store.load(3, before=2)
    own.save(store.keys / "client-00003.key", overwrite=True)
    Key.generate().save(store.keys / "group.key", overwrite=True)
    other = ClientStore(tmp_path, keyed=True)
    assert other.group() != group
    with pytest.raises(KeyFileError, match=rf"group.key .*{group.fingerprint}"):
        other.load(3, before=2)


def test_a_state_of_an_older_version_names_no_key(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=True)
    store.key(0)
    store.save(0, state(1), keep=[])
    path = tmp_path / "clients" / "00000" / "round-000001.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors(path, tensors, {"spent": "0"}, private=True)
    assert store.load(0, before=2).round == 1


def state(round_: int) -> ClientState:
    return ClientState(round_, {"w": torch.full((2,), float(round_))}, {"m:w": torch.ones(2)})


def test_a_store_gives_back_the_state_before_a_round(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=False)
    assert store.load(3, before=10).private is None
    for number in (2, 5, 9):
        store.save(3, state(number), keep=range(20))
    found = {before: store.load(3, before=before).round for before in (2, 3, 5, 6, 9, 10, 99)}
    assert found == {2: 0, 3: 2, 5: 2, 6: 5, 9: 5, 10: 9, 99: 9}
    loaded = store.load(3, before=6)
    assert loaded.private is not None
    assert loaded.private["w"].tolist() == [5.0, 5.0]
    assert loaded.moments["m:w"].tolist() == [1.0, 1.0]
    assert not (tmp_path / "keys").exists()
    assert repr(loaded) == "ClientState(round=5)"


@pytest.mark.parametrize(
    "keep, left",
    [
        ([], [9]),
        ([8], [7, 9]),
        ([4, 8], [4, 7, 9]),
        ([5, 6], [4, 9]),
        ([1], [9]),  # before its first round there is nothing to go back to
        ([2, 7, 8], [2, 7, 9]),
        ([9], [7, 9]),  # round 9 is repeated: what it starts from stays
    ],
)
def test_a_store_keeps_what_can_be_returned_to(
    keep: list[int], left: list[int], tmp_path: Path
) -> None:
    store = ClientStore(tmp_path, keyed=False)
    for number in (2, 4, 7):
        store.save(0, state(number), keep=range(20))
    store.save(0, state(9), keep=keep)
    assert store.rounds(0) == left


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    run(config("channel", federation={"rounds": 1}), tmp_path, bundle=digits())
    for name in ("keys", "clients"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
        files = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        assert len(files) >= 3
        assert all(p.stat().st_mode & 0o777 == 0o600 for p in files)


def test_keys_that_are_there_are_used(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", 3)
    folder = with_keys(tmp_path / "run", keys)
    run(config("channel", federation={"rounds": 1}), folder, bundle=digits())
    for path in keys.iterdir():
        assert (folder / "keys" / path.name).read_bytes() == path.read_bytes()
