"""How long a pad serves: counted, refused, renewed, and never counted twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import config, digits, fixed_seed, make_keys, snapshot, task, with_keys, workspace
from hypothesis import given
from hypothesis import strategies as st

from fedkl.errors import ConfigError, FederationError, LockError
from fedkl.federation import Event, RenewalConfig, RunConfig, TrainingConfig, client_update, run
from fedkl.federation.preflight import preflight
from fedkl.federation.renewal import due, excess, judge, presentations, raised
from fedkl.federation.session import Session
from fedkl.federation.store import ClientState, ClientStore
from fedkl.locking import affines, epoch_of, private_state, renew
from fedkl.rng import derive

EPOCH = "2.keylock.epoch"  # of fedhelp's model with two batch norms


def pads(**more: Any) -> RunConfig:
    given: dict[str, Any] = {"federation": {"rounds": 6, "join_steps": 2}, "data": {"samples": 64}}
    return config("pad", **{**given, **more})


def played(folder: Path, wanted: RunConfig) -> tuple[dict[int, list[int]], list[str], Any]:
    """Epochs of each client's pad after each round, notes, and the result."""
    notes: list[str] = []
    epochs: dict[int, list[int]] = {}

    def watch(event: Event) -> None:
        if event.kind == "note":
            notes.append(event.message)
        if event.kind == "round":
            store = ClientStore(folder, keyed=True)
            for client in range(wanted.federation.clients):
                private = store.load(client, before=event.round + 1).private
                assert private is not None
                epochs.setdefault(client, []).append(int(private[EPOCH]))

    result = run(wanted, folder, bundle=digits(), on_event=watch)
    return epochs, notes, result


@given(
    every=st.integers(1, 9),
    clients=st.integers(1, 12),
    stagger=st.booleans(),
    rounds=st.integers(1, 40),
)
def test_calendar_against_a_naive_one(every: int, clients: int, stagger: bool, rounds: int) -> None:
    config = RenewalConfig(every=every, stagger=stagger)
    for client in range(clients):
        later = (client * every) // clients if stagger else 0
        days = [1 + n * every + later for n in range(1, 50)]
        for round_ in range(2, rounds + 1):
            assert due(config, client, clients, round_, round_ - 1) == (round_ in days)
        last = max(1, rounds // 2)  # absent in between: once is enough
        missed = any(last < day <= rounds for day in days)
        assert due(config, client, clients, rounds, last) == missed
        assert not due(config, client, clients, rounds, 0)


def test_staggered_clients_renew_one_after_the_other() -> None:
    config = RenewalConfig(every=6, stagger=True)
    at = {r: [c for c in range(3) if due(config, c, 3, r, r - 1)] for r in range(2, 20)}
    assert [(r, c) for r, c in at.items() if c] == [
        (7, [0]), (9, [1]), (11, [2]), (13, [0]), (15, [1]), (17, [2]), (19, [0])
    ]  # fmt: skip


@pytest.mark.parametrize(
    "method, training, expected",
    [
        ("fedavg", {"batch_size": 32}, 64),
        ("fedavg", {"batch_size": 32, "local_epochs": 3}, 192),
        ("fedavg", {"batch_size": 16, "local_steps": 5}, 80),
        ("fedsgd", {"batch_size": 16}, 16),
        ("fedsgd", {"batch_size": 500}, 64),
    ],
)
def test_presentations_are_what_the_client_counts(
    method: str, training: dict[str, Any], expected: int
) -> None:
    settings = TrainingConfig(**training)
    assert presentations(settings, method, 64) == expected
    space = workspace("pad", settings, method=method, join_steps=3)
    given = task(0, key=fixed_seed(0), rows=64, join=True)
    # Lock-only steps are not counted: nothing of them is shared.
    got = client_update(space, snapshot(space.shared), given, derive(0, "x"))
    assert got.presentations == expected


def test_judged_by_the_budget() -> None:
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 3, "last": 2}
    warn, error, renewing = (
        RenewalConfig(budget=100, on_spent=what) for what in ("warn", "error", "renew")
    )
    for policy in (warn, error, renewing):
        assert judge(policy, spent=60, ahead=40, **facts) == judge(
            RenewalConfig(budget=None), spent=60, ahead=40, **facts
        )
    first = judge(warn, spent=61, ahead=40, **facts)
    assert (first.renew, "101 presentations" in first.note) == (False, True)
    assert judge(warn, spent=101, ahead=40, **facts).note == ""  # said once
    assert judge(renewing, spent=61, ahead=40, **facts).renew
    assert not judge(renewing, spent=0, ahead=101, **facts).renew  # a fresh pad is fresh already
    with pytest.raises(FederationError, match=r"client 0.*61.*40.*100.*on-spent renew"):
        judge(error, spent=61, ahead=40, **facts)
    with pytest.raises(FederationError):
        judge(error, spent=0, ahead=101, **facts)
    assert excess(warn, 100) == ""
    assert "201" in excess(warn, 201)
    assert "3 times" in excess(warn, 201)


def test_a_renewal_does_not_excuse_a_round_over_the_budget(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 3, "last": 2, "spent": 64}
    strict = RenewalConfig(budget=63, on_spent="error", every=1)
    assert due(strict, 0, 2, 3, 2)
    with pytest.raises(FederationError, match=r"round 3: this round alone takes 64 .*of 63"):
        judge(strict, ahead=64, **facts)
    assert judge(strict, ahead=63, **facts).renew
    assert judge(RenewalConfig(budget=63, every=1), ahead=64, **facts).renew
    # A budget may be tightened on resume, where the rounds that come are not played through.
    federation = {"rounds": 1, "join_steps": 2}
    run(pads(renewal={"every": 1}, federation=federation), tmp_path, bundle=digits())
    tight = pads(renewal={"every": 1, "budget": 63, "on_spent": "error"})
    with pytest.raises(FederationError, match="round 2: this round alone"):
        run(tight, tmp_path, resume=True, bundle=digits())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"on_spent": "renw"}, "renew"),
        ({"budget": 0}, "budget"),
        ({"every": -1}, "every"),
        ({"steps": -1}, "steps"),
    ],
)
def test_settings_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RenewalConfig(**bad)


def test_pads_are_renewed_by_the_calendar(tmp_path: Path) -> None:
    epochs, notes, result = played(
        tmp_path, pads(renewal={"every": 2, "stagger": True, "budget": None})
    )
    # ⌊c·2/3⌋ = 0, 0, 1 rounds later.
    assert epochs == {0: [0, 0, 1, 1, 2, 2], 1: [0, 0, 1, 1, 2, 2], 2: [0, 0, 0, 1, 1, 2]}
    assert notes == []
    assert result.pads == {"renewals": 6, "most_presentations": 192}
    assert result.to_dict()["pads"] == result.pads


def test_pads_are_renewed_when_spent(tmp_path: Path) -> None:
    epochs, notes, result = played(tmp_path, pads(renewal={"budget": 130, "on_spent": "renew"}))
    assert epochs[0] == [0, 0, 1, 1, 2, 2]
    assert result.pads == {"renewals": 6, "most_presentations": 128}
    assert notes == [raised(RenewalConfig(budget=130))]


def test_a_spent_pad_is_a_warning_or_an_error(tmp_path: Path) -> None:
    epochs, notes, result = played(tmp_path / "a", pads(renewal={"budget": 130}))
    assert epochs[0] == [0] * 6
    assert notes[0] == raised(RenewalConfig(budget=130))
    assert len(notes) == 1 + 3  # each client once
    assert all("192 presentations, budget 130" in note for note in notes[1:])
    assert result.pads["most_presentations"] == 384
    wanted = pads(renewal={"budget": 130, "on_spent": "error"})
    with pytest.raises(FederationError, match="round 3"):
        run(wanted, tmp_path / "b", bundle=digits())
    # Nothing is lost: with another policy the run goes on.
    more = pads(renewal={"budget": 130, "on_spent": "renew"})
    assert run(more, tmp_path / "b", resume=True, bundle=digits()).pads == {
        "renewals": 6, "most_presentations": 128
    }  # fmt: skip


def test_budgets_are_on_record_with_their_rounds(tmp_path: Path) -> None:
    short = {"rounds": 2, "join_steps": 2}
    run(pads(renewal={"budget": 130}, federation=short), tmp_path, bundle=digits())
    before = {n: (tmp_path / n).read_bytes() for n in ("config.json", "summary.json")}
    done = pads(renewal={"budget": 500}, federation=short)
    with pytest.raises(ConfigError, match=r"renewal\.budget: 130 → 500 .* --rounds"):
        run(done, tmp_path, resume=True, bundle=digits())
    with pytest.raises(ConfigError, match=r"renewal\.budget: 130 → 500"):
        preflight(done, tmp_path, resume=True, bundle=digits())
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    more = pads(renewal={"budget": 500}, federation={**short, "rounds": 3})
    run(more, tmp_path, resume=True, bundle=digits())
    assert json.loads((tmp_path / "summary.json").read_text())["budgets"] == [
        {"from_round": 1, "budget": 130, "on_spent": "warn"},
        {"from_round": 3, "budget": 500, "on_spent": "warn"},
    ]


def test_a_round_over_the_budget_is_said_once_before_the_first(tmp_path: Path) -> None:
    _, notes, _ = played(tmp_path, pads())
    assert len(notes) == 1
    assert (
        "up to 64 presentations (images × steps) under one pad, 64 times its budget of 1."
        in notes[0]
    )
    quiet = config("norm", data={"samples": 64})
    events: list[Event] = []
    result = run(quiet, tmp_path / "quiet", bundle=digits(), on_event=events.append)
    assert not [e for e in events if e.kind == "note"]
    assert result.pads is None


def test_counter_is_in_the_private_folder_and_a_repeated_round_counts_once(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", 3, seeds=True)
    wanted = pads(renewal={"budget": None}, federation={"rounds": 3})
    folder = with_keys(tmp_path / "run", keys)
    run(wanted, folder, bundle=digits())
    store = ClientStore(folder, keyed=True)
    assert store.load(1, before=9).spent == 3 * 64
    # As after a kill between a client's file and the checkpoint: the round is played again.
    for path in (folder / "checkpoints").glob("round-000003*"):
        path.unlink()
    (folder / "summary.json").unlink()
    run(wanted, folder, resume=True, bundle=digits())
    assert store.load(1, before=9).spent == 3 * 64
    for path in folder.rglob("*"):
        if path.is_file() and path.parts[len(folder.parts)] not in ("clients", "keys"):
            assert b"keylock" not in path.read_bytes() or path.name == "summary.json"


def test_states_without_a_counter_start_at_zero(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, keyed=False)
    store.save(0, ClientState(1, {"a": torch.ones(2)}, {}, 7), keep=[])
    assert store.load(0, before=2).spent == 7
    assert store.load(1, before=2).spent == 0


def test_renewal_by_hand_is_what_a_client_does() -> None:
    settings = TrainingConfig(batch_size=32, keep_momentum=True)
    space = workspace("pad", settings)
    shared, key = snapshot(space.shared), fixed_seed(1)
    first = client_update(space, shared, task(key=key), derive(0, "a"))
    later = task(key=key, private=first.private, moments=first.moments, round_=2)
    given = {**later.__dict__, "renew": True, "renew_steps": 3}
    got = client_update(space, shared, type(later)(**given), derive(0, "b"))
    assert int(got.private[EPOCH]) == int(first.private[EPOCH]) + 1
    space.enter(shared, key, first.private)
    renew(space.model, key, 1)
    assert epoch_of(space.model) == 1
    generator = derive(0, "b")
    space.join(shared, later.index, generator, later.lr, steps=3)
    kept = {n: t for n, t in first.moments.items() if "keylock" not in n}
    assert 0 < len(kept) < len(first.moments)
    again = type(later)(**{**later.__dict__, "moments": kept})
    space.train(again, generator)
    for name, tensor in private_state(space.model).items():
        assert torch.equal(tensor, got.private[name]), name


def test_lock_only_steps_after_renewal_move_no_shared_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = workspace("pad", TrainingConfig(batch_size=32))
    shared, key = snapshot(space.shared), fixed_seed(1)
    first = client_update(space, shared, task(key=key), derive(0, "a"))
    seen: list[dict[str, torch.Tensor]] = []

    def train(*_: Any) -> Any:
        seen.append(snapshot(space.model.state_dict()))
        return 0.0, {}

    monkeypatch.setattr(space, "train", train)
    later = task(key=key, private=first.private, round_=2)
    given = {**later.__dict__, "renew": True, "renew_steps": 3}
    client_update(space, shared, type(later)(**given), derive(0, "b"))
    assert all(torch.equal(seen[0][n], t) for n, t in shared.items())
    moved = {n for n in first.private if not torch.equal(seen[0][n], first.private[n])}
    assert {"1.weight", "2.keylock.scale_learned", EPOCH} <= moved


def test_absent_clients_use_the_pad_they_have(tmp_path: Path) -> None:
    wanted = pads(
        renewal={"every": 1, "budget": None},
        federation={"rounds": 4, "clients": 4, "fraction": 0.5},
    )
    result = run(wanted, tmp_path, bundle=digits())
    session = Session(wanted, tmp_path, digits())
    epochs = []
    for client in range(4):
        state = session.store.load(client, before=9)
        session.workspace.enter(result.shared, session.store.key(client), state.private)
        epochs.append(epoch_of(session.workspace.model))
        assert affines(session.workspace.model)["2"][0].shape == (12,)
    assert result.pads is not None
    assert sum(epochs) == result.pads["renewals"]


def test_preflight_refuses_an_imported_key(tmp_path: Path) -> None:
    folder = with_keys(tmp_path / "run", make_keys(tmp_path / "keys", 3))
    with pytest.raises(LockError, match="imported vector"):
        preflight(pads(), folder, bundle=digits())
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize(
    "renewal, federation, message",
    [
        ({"budget": 63}, {}, r"round 1: this round alone takes 64 .*--budget 64"),
        ({"budget": 63}, {"fraction": 0.4}, r"round 1: .*budget of 63"),
        ({"budget": 128}, {"rounds": 6}, r"round 3: the pad of client 0 .*--on-spent renew"),
        ({"budget": 128, "every": 3}, {"rounds": 6}, r"round 3: "),
        ({"budget": 128, "every": 2}, {"rounds": 6}, None),
        ({"budget": 128}, {"rounds": 2}, None),
        ({"budget": 128}, {"rounds": 6, "fraction": 0.4}, None),  # who is asked is not certain
    ],
)
def test_preflight_knows_which_round_a_budget_does_not_cover(
    renewal: dict[str, Any], federation: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    wanted = pads(renewal={"on_spent": "error", **renewal}, federation=federation)
    if message is None:
        preflight(wanted, tmp_path / "run", bundle=digits())
    else:
        with pytest.raises(FederationError, match=message):
            preflight(wanted, tmp_path / "run", bundle=digits())
    assert not (tmp_path / "run").exists()


def test_initial_weights_are_said_to_weaken_the_claim(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    session = Session(config("norm"), tmp_path / "plain", digits())
    save_file(session.workspace.model.state_dict(), tmp_path / "init.safetensors")
    wanted = pads(model={"name": "fedhelp:normed", "init": str(tmp_path / "init.safetensors")})
    assert any("no claim" in w for w in Session(wanted, tmp_path / "b", digits()).warnings())
    assert not any("no claim" in w for w in Session(pads(), tmp_path / "c", digits()).warnings())
