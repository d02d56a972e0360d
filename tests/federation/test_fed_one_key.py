"""One key for all clients: one pad, counted once for all, and nobody with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import assert_outcome, config, digits, fixed_key, outcome

from fedkl.errors import ConfigError, FederationError, FedKLError, KeyFileError
from fedkl.federation import run
from fedkl.federation.jobs import Job
from fedkl.federation.preflight import preflight
from fedkl.federation.session import Session
from fedkl.federation.store import ClientStore
from fedkl.key import Key
from fedkl.locking import affines

ONE = {"one_key": True}


@pytest.mark.parametrize("defense", ["pad", "channel"])
def test_all_locks_start_alike_and_are_learned_by_each_client(defense: str, tmp_path: Path) -> None:
    wanted = config(defense, defense_settings=ONE, data={"samples": 64})
    result = run(wanted, tmp_path, bundle=digits())
    keys = sorted((tmp_path / "keys").iterdir())
    assert [k.name for k in keys] == [*(f"client-0000{n}.key" for n in range(3)), "group.key"]
    assert len({Key.load(k).fingerprint for k in keys}) == 1
    session = Session(wanted, tmp_path, digits())
    assert session.group == Key.load(tmp_path / "keys" / "group.key")
    starts, learned = [], []
    for client in range(3):
        key, state = session.store.key(client), session.store.load(client, before=3)
        session.workspace.enter(result.shared, key, None)
        starts.append(
            [t.clone() for pair in affines(session.workspace.model).values() for t in pair]
        )
        session.workspace.enter(result.shared, key, state.private)
        learned.append([t.clone() for p in affines(session.workspace.model).values() for t in p])
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(learned[0], learned[1], strict=True))


def test_clients_have_keys_of_their_own_otherwise(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=True)
    assert store.key(0) != store.key(1)
    assert not (tmp_path / "keys" / "group.key").exists()
    none = ClientStore(tmp_path / "none", keyed=False, one=True)
    assert none.key(0) is None
    assert not none.one


def test_the_images_of_all_clients_count(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": {"samples": 64}, "federation": {"rounds": 2, "clients": 3}}
    own = run(config("pad", **settings), tmp_path / "own", bundle=digits())
    settings = {"data": {"samples": 64}, "federation": {"rounds": 2, "clients": 3}}
    one = run(config("pad", defense_settings=ONE, **settings), tmp_path / "one", bundle=digits())
    assert own.pads["most_presentations"] == 2 * 64
    assert one.pads["most_presentations"] == 3 * 2 * 64
    strict = config(
        "pad",
        defense_settings=ONE,
        data={"samples": 64},
        federation={"rounds": 1},
        renewal={"budget": 191, "on_spent": "error"},
    )
    with pytest.raises(FederationError, match=r"192 presentations .*budget of 191"):
        run(strict, tmp_path / "strict", bundle=digits())


def test_what_is_said_of_a_budget_can_be_done(tmp_path: Path) -> None:
    """Of one image each the count is that of the clients; and nobody renews alone."""
    settings: dict[str, Any] = {
        "defense_settings": ONE,
        "data": {"samples": 8},
        "training": {"batch_size": 8, "local_steps": 1},
        "model": {"name": "fedhelp:mlp"},
    }
    session = Session(config("pad", **settings), tmp_path, digits())
    (warning,) = session.warnings()
    assert "24 presentations (images × steps, times clients, who have one key)" in warning
    assert "fewer clients, or keys of their own" in warning
    assert "Keys were the clients' own" in warning
    federation = {"rounds": 2, "min_clients": 1}
    strict = config(
        "pad", federation=federation, renewal={"budget": 24, "on_spent": "error"}, **settings
    )
    with pytest.raises(FederationError, match=r"Renew pads \(--renew-every\)"):
        Session(strict, tmp_path, digits()).check_budget()
    warned = config("pad", federation=federation, renewal={"budget": 24}, **settings)
    notes: list[str] = []
    run(warned, tmp_path / "run", bundle=digits(), on_event=lambda e: notes.append(e.message))
    spent = [note for note in notes if "is spent (48 presentations, budget 24)" in note]
    assert len(spent) == 3
    assert all("; --renew-every would draw another" in note for note in spent)


def test_renewed_by_all_at_once_and_resumed(tmp_path: Path) -> None:
    def wanted(rounds: int) -> Any:
        federation = {"rounds": rounds, "join_steps": 2}
        return config(
            "pad",
            defense_settings=ONE,
            data={"samples": 64},
            federation=federation,
            renewal={"every": 1},
        )

    whole = tmp_path / "whole"
    run(wanted(2), whole, bundle=digits())
    part = tmp_path / "part"
    (part / "keys").mkdir(parents=True)
    Key.load(whole / "keys" / "group.key").save(part / "keys" / "group.key")
    run(wanted(1), part, bundle=digits())
    run(wanted(2), part, resume=True, bundle=digits())
    assert_outcome(outcome(part), outcome(whole))
    assert epochs(part, before=3) == {1}


def epochs(folder: Path, before: int) -> set[int]:
    """Of the pads that the three clients have after the round ``before`` - 1."""
    store = ClientStore(folder, keyed=True, one=True)
    states = [store.load(client, before=before).private or {} for client in range(3)]
    return {int(t) for s in states for name, t in s.items() if name.endswith("keylock.epoch")}


def test_who_diverged_or_comes_late_has_everybodys_pad(tmp_path: Path) -> None:
    wanted = config("pad", defense_settings=ONE, data={"samples": 64}, renewal={"every": 1})
    session = Session(wanted, tmp_path, digits())
    shared = session.initial()
    broken = {n: torch.full_like(t, float("nan")) for n, t in shared.items() if t.ndim == 2}
    for client in (0, 1):
        session.run(Job("train", client, 1), shared)
    session.run(Job("train", 0, 2), shared)
    withheld = session.run(Job("train", 1, 2), {**shared, **broken})
    assert "diverged in round 2" in withheld.facts["withheld"]
    for client in range(3):  # the third for the first time
        job = Job("train", client, 3)
        ahead = session.outlook(job)
        found = session.run(job, shared)
        assert (ahead[1], found.facts["renewed"], found.facts["spent"]) == (2, True, 3 * 64)
    assert epochs(tmp_path, before=4) == {2}
    session.run(Job("train", 0, 4), shared)
    session.run(Job("examine", 1, 4), shared)  # it has not taken part in the last round
    private = session.workspace.private.items()
    assert {int(t) for name, t in private if name.endswith("keylock.epoch")} == {3}


def test_the_key_is_there_before_workers_could_each_make_one(tmp_path: Path) -> None:
    wanted = config("pad", defense_settings=ONE, data={"samples": 64}, workers=2)
    Session(wanted, tmp_path, digits())
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["group.key"]
    run(wanted, tmp_path, bundle=digits())


def test_a_client_with_another_key_is_told_so(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=True, one=True)
    first = store.key(0)
    assert first == store.key(1) == store.group()
    path = tmp_path / "keys" / "client-00001.key"
    path.unlink()
    Key.generate().save(path)
    with pytest.raises(KeyFileError, match=r"client-00001.key .*one, .*without --one-key"):
        store.key(1)
    path.unlink()
    first.save(path)  # a copy does as well as a link
    assert store.key(1) == first


@pytest.mark.parametrize("linked", [True, False])
def test_one_key_is_nobodys_own(linked: bool, tmp_path: Path) -> None:
    """Keys taken from such a run: each client would count its own images alone."""
    first = ClientStore(tmp_path, keyed=True, one=True).key(0)
    path = tmp_path / "keys" / "client-00000.key"
    if not linked:
        path.unlink()
        first.save(path)
    with pytest.raises(KeyFileError, match="key of its own, or run with --one-key"):
        ClientStore(tmp_path, keyed=True).key(0)


def test_without_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.symlink", refused)
    store = ClientStore(tmp_path, keyed=True, one=True)
    assert store.key(0) == store.key(1) == store.group()
    assert not (tmp_path / "keys" / "client-00000.key").is_symlink()


def test_a_folder_that_was_copied_without_links_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"defense_settings": ONE, "data": {"samples": 64}}
    run(config("pad", federation={"rounds": 1}, **settings), tmp_path, bundle=digits())
    for path in (tmp_path / "keys").glob("client-*.key"):
        path.unlink()
    wanted = config("pad", federation={"rounds": 2}, **settings)
    preflight(wanted, tmp_path, resume=True, bundle=digits())
    run(wanted, tmp_path, resume=True, bundle=digits())
    (tmp_path / "keys" / "group.key").unlink()
    with pytest.raises(KeyFileError, match=r"group.key is missing, but client 0 has a lock"):
        run(wanted, tmp_path, resume=True, bundle=digits())


@pytest.mark.parametrize(
    "names, kind, said",
    [
        (["client-00000"], "seed", "group.key is missing, but there is .*client-00000.key"),
        (["group", "client-00001"], "seed", "client-00001.key is key .*to have one"),
        (["group"], "vector", "a pad takes a random key"),
        (["group"], "encrypted", "group.key is encrypted"),
    ],
)
def test_keys_that_do_not_do_are_found_before_a_run_begins(
    names: list[str], kind: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    for name in names:
        key = fixed_key(0) if kind == "vector" else Key.generate()
        words = "x" if kind == "encrypted" else None
        key.save(tmp_path / "keys" / f"{name}.key", passphrase=words)
    with pytest.raises(FedKLError, match=said):
        preflight(config("pad", defense_settings=ONE), tmp_path, bundle=digits())
    there = sorted(path.name for path in tmp_path.rglob("*"))
    assert there == sorted(["keys", *(f"{name}.key" for name in names)])
    with pytest.raises(FedKLError, match=said):
        run(config("pad", defense_settings=ONE), tmp_path, bundle=digits())


@pytest.mark.parametrize(
    "over, said",
    [
        ({"renewal": {"every": 2, "stagger": True}}, "--stagger"),
        ({"renewal": {"on_spent": "renew"}}, "--on-spent renew"),
    ],
)
def test_nobody_renews_alone(over: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"--one-key with {said}.*--renew-every"):
        config("pad", defense_settings=ONE, **over)
    config("pad", **over)


def test_absent_clients_come_back_to_everybodys_pad(tmp_path: Path) -> None:
    federation = {"rounds": 6, "fraction": 0.5, "clients": 4, "join_steps": 1}
    few = {"defense_settings": ONE, "data": {"samples": 16}, "renewal": {"every": 1}}
    run(config("pad", federation=federation, **few), tmp_path, bundle=digits())
    store, seen = ClientStore(tmp_path, keyed=True, one=True), 0
    for client in range(4):
        for last in store.rounds(client):
            private = store.load(client, before=last + 1).private or {}
            found = {int(t) for n, t in private.items() if n.endswith("keylock.epoch")}
            assert found == {last - 1}
            seen += 1
    assert seen >= 4
