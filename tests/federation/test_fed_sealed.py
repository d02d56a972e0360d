"""Sealed private layers: what the server hands on unread, and what clients make of it."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import (
    Stopped,
    assert_outcome,
    assert_same,
    config,
    digits,
    fixed_key,
    fixed_seed,
    outcome,
    stop_after,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkl.audit import AuditConfig
from fedkl.audit.victims import Victims
from fedkl.errors import ConfigError, FederationError, KeyFileError
from fedkl.federation import pool as pool_module
from fedkl.federation import run
from fedkl.federation import sealed as sealed_module
from fedkl.federation import session as session_module
from fedkl.federation.checkpoint import Checkpoint, Checkpoints
from fedkl.federation.client import ClientTask, client_update
from fedkl.federation.jobs import Job
from fedkl.federation.optim import learning_rate
from fedkl.federation.reevaluate import reevaluate
from fedkl.federation.sealed import seal, sealed_length, unsealed
from fedkl.federation.session import Session
from fedkl.key import Key
from fedkl.rng import derive

KEY = fixed_seed(-1)


def sealing(defense: str = "pad", **sections: Any) -> Any:
    """A run whose three clients have unequal numbers of images."""
    federation = {"clients": 3, "rounds": 3, "join_steps": 2, **sections.pop("federation", {})}
    return config(
        defense,
        defense_settings={"one_key": True},
        data={"samples": None, "partition": "dirichlet", **sections.pop("data", {})},
        federation={"seal_private": True, **federation},
        **sections,
    )


def placed(folder: Path) -> Path:
    """A run folder with the key that every run of these tests has."""
    (folder / "keys").mkdir(parents=True)
    KEY.save(folder / "keys" / "group.key")
    return folder


def layers(value: float) -> dict[str, Tensor]:
    return {
        "head.weight": torch.full((2, 3), value),
        "norm.keylock.epoch": torch.tensor(4),
        "stem": torch.arange(5.0) * value,
    }


def sealed_by(values: dict[int, float], round_: int = 7, key: Key = KEY) -> dict[str, str]:
    return {
        str(c): seal(layers(v), key, client=c, round_=round_, examples=10 * (c + 1))
        for c, v in values.items()
    }


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.integers(0, 300), st.floats(-8, 8, width=32), min_size=1, max_size=5))
def test_the_mean_of_what_was_sealed(values: dict[int, float]) -> None:
    for weighted in (True, False):
        mean = unsealed(sealed_by(values), KEY, round_=7, like=layers(0.0), weighted=weighted)
        weights = {c: 10 * (c + 1) if weighted else 1 for c in values}
        total = sum(weights.values())
        want = sum(v * weights[c] for c, v in values.items()) / total
        assert mean["norm.keylock.epoch"] == 4
        torch.testing.assert_close(mean["stem"], torch.arange(5.0) * want, atol=1e-5, rtol=1e-5)
        assert mean["head.weight"].dtype == torch.float32


def test_sealed_text_has_a_length_of_its_own_and_repeats() -> None:
    text = seal(layers(1.5), KEY, client=3, round_=2, examples=2**39)
    assert len(text) == sealed_length(layers(0.0)) == len(base64.b64encode(base64.b64decode(text)))
    assert text == seal(layers(1.5), KEY, client=3, round_=2, examples=2**39)
    others = [
        seal(layers(1.5), KEY, client=3, round_=3, examples=2**39),
        seal(layers(1.5), KEY, client=4, round_=2, examples=2**39),
        seal(layers(1.5), KEY, client=3, round_=2, examples=1),
        seal(layers(1.5), fixed_seed(5), client=3, round_=2, examples=2**39),
    ]
    assert len({text, *others}) == 5
    assert layers(1.5)["stem"].numpy().tobytes() not in base64.b64decode(text)


def test_tied_layers_are_sealed_under_both_names() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    tied = {"a": tensor, "b": tensor, "c": tensor.T, "d": tensor[:1]}
    text = seal(tied, KEY, client=0, round_=1, examples=2)
    assert len(text) == sealed_length(tied)
    assert_same(unsealed({"0": text}, KEY, round_=1, like=tied), tied)


def _flipped(text: str, at: int) -> str:
    data = bytearray(base64.b64decode(text))
    data[at] ^= 1
    return base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: {**s, "1": _flipped(s["1"], 0)},
        lambda s: {**s, "1": _flipped(s["1"], 40)},
        lambda s: {**s, "1": _flipped(s["1"], -1)},
        lambda s: {**s, "1": s["0"]},  # of another client
        lambda s: {**s, "1": sealed_by({1: 2.0}, round_=6)["1"]},  # of another round
        lambda s: {**s, "1": sealed_by({1: 2.0}, key=fixed_seed(3))["1"]},  # with another key
        lambda s: {**s, "1": "AAAA"},
        lambda s: {**s, "1": ""},
        lambda s: {**s, "1": "no base64!"},
        lambda s: {**s, "1": "ü"},
    ],
)
def test_what_was_altered_or_is_of_elsewhere_is_refused(spoil: Any) -> None:
    sealed = sealed_by({0: 1.0, 1: 2.0})
    unsealed(sealed, KEY, round_=7, like=layers(0.0))
    with pytest.raises(FederationError, match=r"client 1 .*round 7 cannot be opened") as caught:
        unsealed(spoil(sealed), KEY, round_=7, like=layers(0.0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["-1", str(2**64)])
def test_numbers_that_no_client_has(number: str) -> None:
    with pytest.raises(FederationError, match="cannot be opened"):
        unsealed({number: sealed_by({0: 1.0})["0"]}, KEY, round_=7, like=layers(0.0))


def test_layers_of_another_model_are_refused() -> None:
    like = {**layers(0.0), "stem": torch.zeros(6)}
    with pytest.raises(FederationError, match=r"client 0 .*do not fit: stem has shape"):
        unsealed(sealed_by({0: 1.0}), KEY, round_=7, like=like)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_layers_that_would_spoil_everybodys_are_refused(value: float) -> None:
    sealed = {**sealed_by({0: 1.0}), **sealed_by({1: value})}
    with pytest.raises(FederationError, match=r"client 1 .*do not fit: they hold NaN or infinity"):
        unsealed(sealed, KEY, round_=7, like=layers(0.0))


@pytest.mark.parametrize("examples", [0, 2**40, 2**64 - 1])
def test_counts_that_no_client_has(examples: int) -> None:
    text = seal(layers(1.0), KEY, client=1, round_=7, examples=examples)
    for weighted in (True, False):
        with pytest.raises(FederationError, match=rf"client 1 .*claims {examples} examples"):
            unsealed({"1": text}, KEY, round_=7, like=layers(0.0), weighted=weighted)


def test_a_key_that_can_be_guessed_seals_nothing(tmp_path: Path) -> None:
    """What is encrypted under it is in the checkpoints, which are nobody's secret."""
    (tmp_path / "keys").mkdir()
    fixed_key(-1).save(tmp_path / "keys" / "group.key")
    wanted = sealing("channel")
    with pytest.raises(KeyFileError, match=r"group.key is an imported vector.*keygen") as caught:
        run(wanted, tmp_path, bundle=digits())
    assert "\n" not in str(caught.value)
    keeping = dataclasses.replace(wanted.federation, seal_private=False)
    Session(dataclasses.replace(wanted, federation=keeping), tmp_path, digits())


def by_hand(wanted: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The naive reference: FedAvg of the whole network, private layers and all."""
    session = Session(wanted, placed(folder), digits())
    space, parts = session.workspace, session.parts
    assert len({len(p) for p in parts}) > 1
    shared, private = session.initial(), None
    for number in range(1, wanted.federation.rounds + 1):
        sums: dict[str, dict[str, Tensor]] = {"shared": {}, "private": {}}
        for client, rows in enumerate(parts):
            lr = learning_rate(wanted.training, number, wanted.federation.rounds)
            task = ClientTask(client, number, rows, KEY, private, {}, private is None, lr)
            generator = derive(wanted.seed, "client", client, "round", number)
            got = client_update(space, shared, task, generator)
            for part, state in (("shared", got.update.tensors), ("private", got.private)):
                for name, tensor in state.items():
                    weight = len(rows) if wanted.federation.weighted else 1
                    old, wide = sums[part].get(name, 0), tensor.double() * weight
                    sums[part][name] = wide + old if tensor.is_floating_point() else tensor.clone()
        total = sum(map(len, parts)) if wanted.federation.weighted else len(parts)

        def mean(part: dict[str, Tensor], like: dict[str, Tensor], total: int) -> dict[str, Tensor]:
            floats = {n: (t / total).to(like[n].dtype) for n, t in part.items() if n in like}
            return {n: floats[n] if like[n].is_floating_point() else t for n, t in part.items()}

        shared = mean(sums["shared"], dict(space.shared), total)
        private = mean(sums["private"], dict(space.private), total)
    assert private is not None
    return shared, private


@pytest.mark.parametrize("defense, weighted", [("pad", True), ("channel", True), ("pad", False)])
def test_all_train_one_network(defense: str, weighted: bool, tmp_path: Path) -> None:
    wanted = sealing(defense, federation={"weighted": weighted})
    result = run(wanted, placed(tmp_path / "run"), bundle=digits())
    shared, private = by_hand(wanted, tmp_path / "by-hand")
    floats = {n: t for n, t in result.shared.items() if t.is_floating_point()}
    for name, tensor in floats.items():
        torch.testing.assert_close(tensor, shared[name], rtol=1e-5, atol=1e-6)
    checkpoint, _ = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint is not None
    sealed = checkpoint.facts["sealed"]
    assert set(sealed) == {"0", "1", "2"}
    session = Session(wanted, tmp_path / "run", digits())
    for client in range(3):
        state = session.state(client, after=3, sealed=sealed)
        assert state.round == 3
        assert state.private is not None
        for name, tensor in state.private.items():
            torch.testing.assert_close(tensor, private[name], rtol=1e-5, atol=1e-6)
    audit = AuditConfig(run=wanted, images=2)
    victims = Victims(wanted, tmp_path / "run", digits(), audit)
    assert victims.private is not None
    assert_same(victims.private, state.private)


def test_the_engine_gets_nothing_in_the_clear(tmp_path: Path) -> None:
    wanted = sealing()
    run(wanted, placed(tmp_path), bundle=digits())
    session = Session(wanted, tmp_path, digits())
    latest, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None
    secret = [
        t.numpy().tobytes()
        for state in [
            *(session.store.load(c, before=4) for c in range(3)),
            session.state(0, after=3, sealed=latest.facts["sealed"]),
        ]
        for t in (state.private or {}).values()
        if t.is_floating_point() and t.numel() > 3 and float(t.std()) > 0
    ]
    assert len(secret) > 8
    seen = [p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()]
    seen += [p.read_bytes() for p in tmp_path.iterdir() if p.is_file()]
    seen += [base64.b64decode(t) for t in latest.facts["sealed"].values()]
    assert len(seen) > 6
    assert not [s for s in secret if any(s in data for data in seen)]


def test_any_number_of_workers_and_any_interruption(tmp_path: Path) -> None:
    wanted = sealing(federation={"rounds": 4, "fraction": 0.67}, checkpoint_every=1)
    whole = placed(tmp_path / "whole")
    run(wanted, whole, bundle=digits())
    two = placed(tmp_path / "two")
    run(dataclasses.replace(wanted, workers=2), two, bundle=digits())
    assert_outcome(outcome(two), outcome(whole))
    cut = placed(tmp_path / "cut")

    with pytest.raises(Stopped):
        run(wanted, cut, bundle=digits(), on_event=stop_after(2))
    run(wanted, cut, bundle=digits(), resume=True)
    assert_outcome(outcome(cut), outcome(whole))


def test_of_a_client_that_was_refused_nothing_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its private layers may be finite, but belong to an update that is in no mean."""
    update = session_module.client_update

    def broken(space: Any, shared: Any, task: Any, generator: Any) -> Any:
        found = update(space, shared, task, generator)
        if task.client != 1 or task.round != 2:
            return found
        tensors = {n: t * float("nan") for n, t in found.update.tensors.items()}
        spoilt = dataclasses.replace(found.update, tensors=tensors)
        return dataclasses.replace(found, update=spoilt)

    monkeypatch.setattr(session_module, "client_update", broken)
    result = run(sealing(federation={"rounds": 2}), placed(tmp_path), bundle=digits())
    assert result.counts["refused"] == 1
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert set(checkpoints.load(1).facts["sealed"]) == {"0", "1", "2"}
    assert set(checkpoints.load(2).facts["sealed"]) == {"0", "2"}


def test_workers_get_what_was_sealed_once_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with every job: a hundred clients would send a hundred times a hundred of them."""
    wanted = sealing(evaluation={"every": 0, "images": 20, "wrong_keys": 1}, workers=2)
    sizes: list[int] = []
    encode = pool_module._encode

    def encoded(facts: Any, tensors: Any) -> bytes:
        sizes.append(len(json.dumps(facts.get("sealed") or {})))
        return encode(facts, tensors)

    monkeypatch.setattr(pool_module, "_encode", encoded)
    result = run(wanted, placed(tmp_path), bundle=digits())
    one = 3 * sealed_length(Session(wanted, tmp_path, digits()).workspace.private)
    # Of three rounds and an exam, the first has nothing.
    assert sum(size > one for size in sizes) == 3
    assert len(sizes) == 4 + 4 * 3
    alone = run(dataclasses.replace(wanted, workers=1), placed(tmp_path / "1"), bundle=digits())
    assert_same(result.shared, alone.shared)


def test_measured_again_as_the_run_measured(tmp_path: Path) -> None:
    wanted = sealing(federation={"rounds": 4})
    result = run(wanted, placed(tmp_path), bundle=digits())
    again = reevaluate(tmp_path, bundle=digits())
    assert again.accuracy.own_per_client == result.accuracy.own_per_client
    best = reevaluate(tmp_path, split="validation", checkpoint="best", bundle=digits())
    assert best.accuracy.own_key == result.best["own_key"]
    kept = Checkpoints(tmp_path / "checkpoints").load_best()
    assert kept.shared.keys() == result.shared.keys()
    assert len(kept.facts["sealed"]) == 3


def test_the_best_checkpoint_holds_what_many_clients_sealed(tmp_path: Path) -> None:
    """More than the metadata of a tensor file, which ends at 100 MB."""
    sealed = {str(client): chr(65 + client) * 35 * 2**20 for client in range(3)}
    facts = {"best": {"own_key": 0.5}, "sealed": sealed}
    Checkpoints(tmp_path).save_best(Checkpoint(4, {"w": torch.ones(2)}, {}, facts))
    found = Checkpoints(tmp_path).load_best()
    assert (found.round, set(found.shared)) == (4, {"w"})
    assert found.facts == {"sealed": sealed}


def test_who_is_new_or_was_absent_goes_on_from_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no lock-only steps: its layers are everybody's."""
    wanted = sealing(federation={"rounds": 2})
    session = Session(wanted, placed(tmp_path), digits())
    shared = session.initial()
    sealed = {str(c): session.run(Job("train", c, 1), shared).facts["sealed"] for c in (0, 1)}
    monkeypatch.setattr(type(session.workspace), "join", lambda *a, **k: pytest.fail("it joined"))
    assert session.store.rounds(2) == []
    job = Job("train", 2, 2, sealed=sealed)
    mean = unsealed(sealed, KEY, round_=1, like=session.workspace.private)
    entered: list[Any] = []
    enter = session.workspace.enter

    def watched(shared: Any, key: Any, private: Any) -> None:
        entered.append(private)
        enter(shared, key, private)

    monkeypatch.setattr(session.workspace, "enter", watched)
    got = session.run(job, shared)
    assert_same(entered[0], mean)
    assert "sealed" in got.facts
    session.run(Job("examine", 0, 2, sealed={"2": got.facts["sealed"]}), shared)
    assert_same(entered[1], session.store.load(2, before=3).private)


def test_nobody_goes_on_alone(tmp_path: Path) -> None:
    session = Session(sealing(), placed(tmp_path), digits())
    shared = session.initial()
    first = session.run(Job("train", 0, 1), shared)
    for job in (Job("train", 0, 2), Job("examine", 0, 1)):
        with pytest.raises(FederationError, match=r"client 0 got none .*sealed in round 1"):
            session.run(job, shared)
    with pytest.raises(FederationError, match="cannot be opened"):
        session.run(Job("train", 0, 3, sealed={"0": first.facts["sealed"]}), shared)


@pytest.mark.parametrize("defense", ["pad", "channel"])
def test_a_client_that_diverged_seals_nothing(defense: str, tmp_path: Path) -> None:
    """Nor sends anything: its part of the middle has no private layers beside it."""
    session = Session(sealing(defense), placed(tmp_path), digits())
    shared = session.initial()
    sealed = {str(c): session.run(Job("train", c, 1), shared).facts["sealed"] for c in range(3)}
    weight = next(n for n, t in shared.items() if t.dim() > 1)
    broken = {**shared, weight: torch.full_like(shared[weight], float("inf"))}
    facts = session.run(Job("train", 0, 2, sealed=sealed), broken).facts
    assert "withheld" in facts
    assert "sealed" not in facts


@pytest.mark.parametrize("defense", ["none", "fedbn", "open-pad"])
def test_who_has_no_key_keeps_what_is_private(defense: str, tmp_path: Path) -> None:
    """One setting for all arms of an audit: without a key it means nothing, as --one-key does."""
    wanted = sealing(defense, training={"batch_size": 32, "keep_momentum": True})
    plain = dataclasses.replace(wanted.federation, seal_private=False)
    got = run(wanted, tmp_path / "sealing", bundle=digits())
    run(dataclasses.replace(wanted, federation=plain), tmp_path / "plain", bundle=digits())
    assert_same(got.shared, run(wanted, tmp_path / "sealing", bundle=digits(), resume=True).shared)
    assert not (tmp_path / "sealing" / "keys").exists()
    assert_outcome(
        outcome(tmp_path / "sealing") | {"summary": 0}, outcome(tmp_path / "plain") | {"summary": 0}
    )


def rounds_of(session: Session, *asked: list[int]) -> dict[str, str]:
    """Plays rounds on the initial state; what was sealed in the last."""
    sealed: dict[str, str] = {}
    for number, clients in enumerate(asked, 1):
        jobs = [Job("train", c, number, keep=[number - 1], sealed=sealed) for c in clients]
        done = [session.run(job, session.initial()) for job in jobs]
        sealed = {str(r.job.client): r.facts["sealed"] for r in done}
    return sealed


@pytest.mark.parametrize("keep_learned", [False, True])
def test_a_pad_that_was_renewed_in_ones_absence_begins_anew(
    keep_learned: bool, tmp_path: Path
) -> None:
    """With a count of its own, and without momentum of what was learned on top of another."""
    wanted = sealing(
        renewal={"every": 2, "steps": 2, "keep_learned": keep_learned},
        training={"batch_size": 32, "keep_momentum": True},
    )
    session = Session(wanted, placed(tmp_path), digits())
    sealed = rounds_of(session, [0, 1, 2], [0, 1, 2], [1, 2])
    own = session.store.load(0, before=4)
    assert (own.round, own.epoch) == (2, 0)
    assert own.spent > 0
    state = session.state(0, after=3, sealed=sealed)
    assert (state.round, state.epoch, state.spent) == (3, 1, 0)
    lost = {n for n in own.moments if ".keylock." in n}
    assert lost
    assert set(state.moments) == set(own.moments) - (set() if keep_learned else lost)
    there = session.state(1, after=3, sealed=sealed)
    assert there.spent == session.store.load(1, before=4).spent > 0
    assert_same(there.moments, session.store.load(1, before=4).moments)


def test_other_clients_have_the_mean_and_a_thief_among_them_too(tmp_path: Path) -> None:
    wanted = sealing(evaluation={"every": 0, "images": 400, "wrong_key_images": 400})
    result = run(wanted, placed(tmp_path), bundle=digits())
    latest, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None
    sealed = latest.facts["sealed"]
    session = Session(wanted, tmp_path, digits())
    mean = unsealed(sealed, KEY, round_=3, like=session.workspace.private)
    ((key, private),) = session._others(
        Job("examine", 0, 3, sealed=sealed), session.state(0, after=3, sealed=sealed)
    )
    assert key == KEY
    assert_same(private, mean)
    assert result.accuracy.other_client == pytest.approx(result.accuracy.own_key, abs=1e-9)
    assert session._others(Job("examine", 0, 0), session.state(0, after=0, sealed={})) == []


def test_what_was_sealed_is_opened_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(sealing(), placed(tmp_path), digits())
    sealed = rounds_of(session, [0, 1, 2])
    opened: list[Any] = []
    whole = sealed_module.unsealed
    monkeypatch.setattr(
        sealed_module, "unsealed", lambda *a, **k: opened.append(k) or whole(*a, **k)
    )
    first = session.state(0, after=1, sealed=sealed)
    assert_same(session.state(2, after=1, sealed=dict(sealed)).private, first.private)
    assert len(opened) == 1
    fewer = session.state(1, after=1, sealed={"1": sealed["1"]})
    assert_same(fewer.private, session.store.load(1, before=2).private)
    assert len(opened) == 2
    with pytest.raises(FederationError, match="cannot be opened"):
        session.state(1, after=2, sealed={"1": sealed["1"]})


def test_renewed_together(tmp_path: Path) -> None:
    wanted = sealing(federation={"rounds": 4, "fraction": 0.67}, renewal={"every": 2, "steps": 2})
    run(wanted, placed(tmp_path), bundle=digits())
    latest, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None
    state = Session(wanted, tmp_path, digits()).state(0, after=4, sealed=latest.facts["sealed"])
    assert state.epoch == 1


def test_it_takes_one_key() -> None:
    with pytest.raises(ConfigError, match=r"--seal-private without --one-key"):
        config("pad", federation={"seal_private": True})


def test_the_mean_settles_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then for the client's own labels; without, nobody's own steps move it."""
    assert sealing().federation.settle_steps == 0
    assert config("pad").federation.settle_steps == 50
    wanted = sealing(federation={"rounds": 2})
    result = run(wanted, placed(tmp_path), bundle=digits())
    latest, _ = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None
    sealed = latest.facts["sealed"]
    for steps in (0, 3):
        federation = dataclasses.replace(wanted.federation, settle_steps=steps)
        session = Session(dataclasses.replace(wanted, federation=federation), tmp_path, digits())
        space, calls = session.workspace, list[Any]()

        def join(*args: Any, calls: Any = calls, real: Any = space.join, **how: Any) -> None:
            calls.append(how)
            real(*args, **how)

        monkeypatch.setattr(space, "join", join)
        session.run(Job("examine", 0, 2, "test", sealed=sealed), result.shared)
        assert calls == ([{"steps": 3}] if steps else [])
