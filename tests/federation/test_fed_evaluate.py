"""Accuracies against counts by hand, and that looking changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import (
    DEFENSES,
    assert_same,
    config,
    digits,
    fixed_key,
    key_of,
    snapshot,
    task,
    workspace,
)
from torch import Tensor, nn

from fedkl.data import DataBundle, Images, TensorImages
from fedkl.federation import Accuracy, TrainingConfig, Workspace, client_update, run
from fedkl.federation import evaluate as evaluate_module
from fedkl.federation.evaluate import ClientAccuracy, Exam, combine, correct_share, examine
from fedkl.key import Key
from fedkl.locking import (
    affines,
    calibrate,
    replaced_affines,
    restart_lock,
    set_key,
    sources_of,
)
from fedkl.rng import derive

CPU = torch.device("cpu")


def exam(rows: int = 101, wrong: int = 60, keys: int = 3) -> Exam:
    order = torch.randperm(len(digits().test), generator=derive(0, "rows"))[:rows]
    return Exam(digits().test, order, order[:wrong], digits().public, torch.arange(120), keys)


def most_frequent(seen: Exam) -> float:
    labels = seen.images.labels[seen.wrong_rows].tolist()
    return max(labels.count(label) for label in labels) / len(labels)


def naive(net: nn.Module, rows: Tensor) -> float:
    """One image at a time."""
    net.eval()
    right = 0
    with torch.no_grad():
        for row in rows:
            x, y = digits().test.batch(row.view(1))
            right += int(net(x).argmax(1).item() == y.item())
    return right / len(rows)


def played(
    defense: str, *, group: Key | None = None, **lock: Any
) -> tuple[Workspace, Any, Key | None, list[Any]]:
    """A workspace as client 0 after a round of three clients, its key, and the others' locks."""
    settings = TrainingConfig(batch_size=32, local_epochs=4)
    space = workspace(defense, settings, lock=lock, group=group)
    shared, others = snapshot(space.shared), []
    for client in (0, 1, 2):
        key = key_of(defense, client)
        result = client_update(
            space, shared, task(client, key=key, rows=250), derive(0, "client", client)
        )
        others.append((key, result.private))
        shared = dict(result.update.tensors)
    key, private = others.pop(0)
    space.enter(shared, key, private if private else None)
    return space, shared, key, others


@pytest.mark.parametrize("rows", [1, 249, 250, 251, 300])
def test_exact_on_the_last_partial_batch(rows: int) -> None:
    space = workspace("none", TrainingConfig())
    order = torch.arange(rows)
    got = correct_share(space.model, digits().test, order, CPU)
    assert got == pytest.approx(naive(space.model, order), abs=1e-12)
    assert not space.model.training


@pytest.mark.parametrize("layers", ["first", "all"])  # first: another norm's statistics are shared
@pytest.mark.parametrize("defense", DEFENSES)
def test_the_model_is_as_it_was(defense: str, layers: str) -> None:
    space, shared, key, others = played(defense, layers=layers)
    before = snapshot(space.model.state_dict())
    x = digits().test.batch(torch.arange(40))[0]
    space.model.eval()
    with torch.no_grad():
        output = space.model(x)
    found = examine(space, exam(), key, others if space.private else [], torch.arange(100))
    assert_same(space.model.state_dict(), before)
    assert_same(space.shared, shared)
    with torch.no_grad():
        assert torch.equal(space.model(x), output)
    if defense in ("none", "norm"):
        assert found == ClientAccuracy(
            naive(space.model, exam().rows), (), None, {}, most_frequent(exam())
        )


@pytest.mark.parametrize("defense", ["fedbn", "channel", "pad"])
def test_own_other_and_wrong_by_hand(defense: str) -> None:
    space, _, key, others = played(defense)
    own_rows = torch.arange(100)
    x = digits().train.batch(own_rows)[0]
    net = copy.deepcopy(space.model)
    calibrate(net, [x])
    test = exam()
    want_own = naive(net, test.rows)
    if key is not None:
        set_key(net, key_of(defense, 9))
        assert naive(net, test.rows) < want_own
    other_key, other_private = others[0]
    if other_key is not None:
        set_key(net, other_key)
    own = net.state_dict()
    for name, tensor in other_private.items():
        own[name].copy_(tensor)
    calibrate(net, [x])
    want_other = naive(net, test.wrong_rows)
    found = examine(space, test, key, others, own_rows)
    assert found.own == pytest.approx(want_own, abs=1e-12)
    assert found.other == pytest.approx(want_other, abs=1e-12)
    assert len(found.wrong) == (0 if defense == "fedbn" else 3)
    assert all(wrong < found.own for wrong in found.wrong)
    # It has learned something, so the comparison means something.
    assert found.own > (0.2 if defense == "pad" else 0.3)


def test_thief_of_a_pad_has_nothing_of_the_victims() -> None:
    """Neither its pad nor its private layers; another victim of the same server looks the same."""
    space, shared, key, others = played("pad", head=True)
    test = exam()
    own = snapshot(space.private)
    first = examine(space, test, key, others, torch.arange(100))
    changed = {n: t + 0.5 if t.is_floating_point() else t for n, t in own.items()}
    space.enter(shared, key_of("pad", 9), changed)
    second = examine(space, test, key_of("pad", 9), others, torch.arange(100))
    assert second.thief == first.thief
    assert second.own != first.own
    # What an insider takes is the mean of the others' layers, which it has to be.
    changed = [
        (k, {n: t.flip(0) if t.is_floating_point() else t for n, t in p.items()}) for k, p in others
    ]
    third = examine(space, test, key_of("pad", 9), changed, torch.arange(100))
    outside = [n for n in first.thief if not n.startswith("others")]
    assert {n: third.thief[n] for n in outside} == {n: first.thief[n] for n in outside}
    assert third.thief != first.thief


def test_wrong_keys_are_repeatable_and_depend_on_the_key() -> None:
    space, _, key, others = played("channel")
    test = exam(rows=300, wrong=300, keys=10)
    first = examine(space, test, key, others, torch.arange(100))
    assert examine(space, test, key, others, torch.arange(100)) == first
    assert len(set(first.wrong)) > 3
    assert examine(space, test, fixed_key(9), others, torch.arange(100)).wrong != first.wrong


def thief_by_hand(net: nn.Module, guess: Any, test: Exam, *, again: bool, private: Any) -> float:
    net = copy.deepcopy(net)
    with replaced_affines(net, guess):
        for site in guess:
            if f"{site}.running_mean" in private:
                net.get_submodule(site).reset_running_stats()
        if again:
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
            net.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            with torch.no_grad():
                net(test.public.batch(test.public_rows)[0])
        return naive(net, test.wrong_rows)


@pytest.mark.parametrize("lock", [{}, {"layers": "first"}, {"share_statistics": True}])
@pytest.mark.parametrize("defense", ["fedbn", "channel"])
def test_the_thief_by_hand(defense: str, lock: dict[str, Any]) -> None:
    space, _, key, others = played(defense, **lock)
    test = exam()
    found = examine(space, test, key, others, torch.arange(100))
    sources = sources_of(space.model)
    ones = {s: (torch.ones(v.shape), torch.zeros(v.shape)) for s, v in sources.items()}
    guesses = {"neutral": ones, "negated": {s: (-g, b) for s, (g, b) in ones.items()}}
    scales: dict[str, list[Tensor]] = {s: [] for s in sources}
    shifts: dict[str, list[Tensor]] = {s: [] for s in sources}
    net = copy.deepcopy(space.model)
    for other_key, private in others:
        if other_key is not None:
            set_key(net, other_key)
        state = net.state_dict()
        for name, tensor in private.items():
            state[name].copy_(tensor)
        for site, source in sources_of(net).items():
            scales[site].append(source.scale().detach().clone())
            shifts[site].append(source.shift().detach().clone())
    guesses["others_mean"] = {
        s: (sum(scales[s]) / len(scales[s]), sum(shifts[s]) / len(shifts[s]))  # type: ignore[misc]
        for s in sources
    }
    assert set(found.thief) == {n + end for n in guesses for end in ("", "+statistics")}
    for name, guess in guesses.items():
        for again in (False, True):
            by_hand = thief_by_hand(space.model, guess, test, again=again, private=space.private)
            assert found.thief[name + "+statistics" * again] == pytest.approx(by_hand, abs=1e-12)


def test_a_thief_with_the_group_key_starts_where_all_locks_started() -> None:
    group = fixed_key(-1)
    space, _, key, others = played("channel", group=group)
    test = exam()
    found = examine(space, test, key, others, torch.arange(100))
    assert examine(space, test, key, others, torch.arange(100)) == found
    net = copy.deepcopy(space.model)
    starts = []
    for client in (0, 7):
        restart_lock(net, fixed_key(client), group)
        starts.append(affines(net))
    for site, (gamma, beta) in starts[0].items():
        torch.testing.assert_close(starts[1][site], (gamma, beta), rtol=1e-4, atol=1e-4)
    for again in (False, True):
        want = thief_by_hand(space.model, starts[0], test, again=again, private=space.private)
        # γ is the same up to rounding only, which may flip an image between two classes.
        got = found.thief["group" + "+statistics" * again]
        assert got == pytest.approx(want, abs=1.5 / len(test.wrong_rows))
    outside = [v for n, v in found.thief.items() if n.startswith(("neutral", "negated"))]
    assert combine([found]).outsider == max(outside)


def test_combined() -> None:
    a = ClientAccuracy(0.9, (0.1, 0.2), 0.3, {"neutral": 0.4, "others_mean": 0.6}, 0.2)
    b = ClientAccuracy(0.7, (0.0, 0.3), None, {"neutral": 0.5}, 0.2)  # nobody else has a lock yet
    got = combine([b, a])
    assert got == Accuracy(
        own_key=pytest.approx(0.8),
        wrong_key=pytest.approx(0.15),
        wrong_key_p95=pytest.approx(0.285),
        other_client=0.3,
        outsider=pytest.approx(0.45),
        no_lock=pytest.approx(0.55),
        own_per_client=(0.7, 0.9),
        no_lock_per_client=(0.5, 0.6),
        wrong_keys=(0.0, 0.1, 0.2, 0.3),
        guess=pytest.approx(0.2),
        thief={"neutral": pytest.approx(0.45), "others_mean": 0.6},
    )
    plain = combine([ClientAccuracy(0.6, (), None, {}, 0.2)])
    assert (plain.own_key, plain.no_lock, plain.outsider) == (0.6, 0.6, 0.6)
    assert (plain.wrong_key, plain.wrong_key_p95, plain.other_client) == (None, None, None)


def test_statistics_of_a_last_batch_of_one() -> None:
    space, _, key, others = played("channel")
    images = TensorImages(
        torch.randint(256, (251, 1, 16, 16), dtype=torch.uint8),
        torch.zeros(251, dtype=torch.int64),
        channels=1,
        image_size=16,
    )
    test = exam()
    spare = Exam(test.images, test.rows, test.wrong_rows, images, torch.arange(251), 1)
    assert "neutral+statistics" in examine(space, spare, key, others, torch.arange(251)).thief


class Spied:
    """Writes down when a split is read, and how many images of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bundle: DataBundle) -> None:
        self.read: list[tuple[str, int]] = []
        self.labels = {
            id(getattr(bundle, n).labels): n for n in ("train", "public", "validation", "test")
        }
        original = Images.batch

        def batch(images: Images, index: Tensor) -> tuple[Tensor, Tensor]:
            self.read.append((self.labels[id(images.labels)], len(index)))
            return original(images, index)

        monkeypatch.setattr(Images, "batch", batch)


@pytest.mark.parametrize("defense", ["none", "channel"])
def test_the_test_set_is_read_once_at_the_end(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied = Spied(monkeypatch, digits())
    ends: list[int] = []
    run(
        config(defense),
        tmp_path,
        bundle=digits(),
        on_event=lambda event: ends.append(len(spied.read)) if event.kind == "round" else None,
    )
    before, after = spied.read[: ends[-1]], spied.read[ends[-1] :]
    assert "test" not in {name for name, _ in before}
    assert {"train", "validation"} <= {name for name, _ in before}
    assert "validation" not in {name for name, _ in after}
    if defense == "none":
        assert sum(count for _, count in after) == len(digits().test)


def accuracies(accuracy: Accuracy) -> Sequence[float | None]:
    return accuracy.wrong_key, accuracy.wrong_key_p95, accuracy.other_client


def test_what_does_not_apply_is_none(tmp_path: Path) -> None:
    for defense in DEFENSES:
        result = run(config(defense), tmp_path / defense, bundle=digits())
        found = accuracies(result.accuracy)
        if defense in ("none", "norm"):
            assert found == (None, None, None)
            assert result.accuracy.no_lock == result.accuracy.own_key
        else:
            assert (found[0] is None) == (defense == "fedbn")
            assert found[2] is not None


def test_batches_of_the_evaluation_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    space = workspace("none", TrainingConfig())
    rows = torch.arange(300)
    whole = correct_share(space.model, digits().test, rows, CPU)
    monkeypatch.setattr(evaluate_module, "EVAL_BATCH", 7)
    assert correct_share(space.model, digits().test, rows, CPU) == whole
