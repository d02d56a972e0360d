"""What presentations cost is said where a budget is raised and where it is spent."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from fedhelp import config, digits

from fedkl.errors import FederationError
from fedkl.federation import Event, RenewalConfig, run
from fedkl.federation.price import AT_ONE_LENGTH, FOUND, price
from fedkl.federation.renewal import Use, excess, foresee, judge, raised

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    "count, point, words",
    [
        (1, 1, "Of one image under one pad our best attack found 2.1 % on LeNet and "),
        (2, 16, "Of 16 images under one pad, the next number that was measured, our best attack"),
        (16, 16, "Of 16 images under one pad our best attack found 6.7 % on LeNet and "),
        (64, 64, "9.5 % on LeNet and "),
        (65, 256, "Of 256 images"),
        (256, 256, "10 % on LeNet and 12 % on ResNet-20"),
        (
            1_000,
            1_000,
            "Of 1,000 images under one pad our best attack found 49 % on LeNet and 36 %",
        ),
        (1_001, 2_000, "64 % on LeNet and 68 % on ResNet-20"),
        (2_001, 2_000, "Of 2,000 images under one pad already our best attack found 64 % on LeNet"),
    ],
)
def test_the_next_number_that_was_measured_is_said(count: int, point: int, words: str) -> None:
    assert words in price(count)
    assert (f"Of {point:,} images" if point > 1 else "Of one image ") in price(count)
    assert price(count).endswith("guessing finds 1 % (docs/findings.md).")
    assert price(count).count(". ") == 0  # one sentence


def test_the_table_is_that_of_the_results() -> None:
    text = (RESULTS / "breakpad.md").read_text(encoding="utf-8").partition("\n## replay\n")[2]
    head = next(line for line in text.splitlines() if line.startswith("| lock"))
    counts = [int(n) for n in re.findall(r"n = (\d+)", head)][1:]
    many = [point for point in FOUND if point.images > 64]
    few = [point for point in FOUND if point.images <= 64]
    assert counts[-3:] == [point.images for point in many]
    arms = json.loads((RESULTS / "relations.json").read_text(encoding="utf-8"))["arms"]
    for lock in ("lenet", "resnet20"):
        start = f"| {lock}, pad | shadow | candidates |"
        row = next(line for line in text.splitlines() if line.startswith(start))
        means = [float(cell) for cell in re.findall(r"\| (\d+\.\d) ±", row)][-3:]
        most = max(getattr(point, lock) for point in few)  # of many in groups of 64
        assert [max(most, mean) for mean in means] == [getattr(point, lock) for point in many]
        for point in few:
            found = [one["shadow"][str(point.images)] for one in arms[f"{lock}, pad"]]
            mean = statistics.fmean(f["size" if point.images == 1 else "both"] for f in found)
            assert getattr(point, lock) == pytest.approx(100 * mean, abs=0.051)


def test_the_table_at_one_length_is_that_of_the_results() -> None:
    document = json.loads((RESULTS / "relations.json").read_text(encoding="utf-8"))
    for lock in ("lenet", "resnet20"):
        alone = [one["shadow"] for one in document["shapes"][f"{lock}, pad, shape"]]
        best = max(statistics.fmean(one[way] for one in alone) for way in ("weights", "shape"))
        assert getattr(AT_ONE_LENGTH[0], lock) == pytest.approx(100 * best, abs=0.051)
        pairs = [one["shadow"] for one in document["arms"][f"{lock}, pad"]]
        for point in AT_ONE_LENGTH[1:3]:
            mean = statistics.fmean(one[str(point.images)]["pairs"] for one in pairs)
            assert getattr(point, lock) == pytest.approx(100 * mean, abs=0.051)
    # Rotations compare directions alone; of many in groups of 64 no less is found than of 64.
    assert [point.images for point in AT_ONE_LENGTH] == [1, 16, 64, 256, 1_000, 2_000]
    assert AT_ONE_LENGTH[-2:] == FOUND[-2:]
    assert FOUND[-3].lenet == AT_ONE_LENGTH[-3].lenet > AT_ONE_LENGTH[2].lenet
    assert AT_ONE_LENGTH[-3].resnet20 == AT_ONE_LENGTH[2].resnet20


def test_what_is_said_is_of_updates_as_they_are_sent() -> None:
    sent, use = {"at_length": True}, Use(at_length=True)
    assert price(1, **sent) == (
        "Of one image under one pad and at one length our best attack found 1.3 % on LeNet and "
        "1.1 % on ResNet-20, where guessing finds 1 % (docs/findings.md)."
    )
    assert "and at one length, the next number that was measured, our" in price(5, **sent)
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 3, "last": 2}
    strict = RenewalConfig(budget=1, on_spent="error")
    with pytest.raises(FederationError) as refused:
        judge(strict, spent=1, ahead=1, use=use, **facts)
    assert price(2, **sent) in str(refused.value)
    with pytest.raises(FederationError) as refused:
        judge(strict, spent=0, ahead=9, use=use, **facts)
    assert price(9, **sent) in str(refused.value)
    with pytest.raises(FederationError) as refused:
        foresee(strict, [1, 1], 2, use)
    assert price(2, **sent) in str(refused.value)
    assert (
        price(101, **sent)
        in judge(RenewalConfig(budget=100), spent=61, ahead=40, use=use, **facts).note
    )
    assert price(17, **sent) in raised(RenewalConfig(budget=17), use)
    assert price(240, **sent) in excess(RenewalConfig(budget=100), 240, use)
    assert "Keys were" not in excess(RenewalConfig(budget=100), 240, use)


def test_a_raised_budget_has_its_price() -> None:
    assert raised(RenewalConfig()) == raised(RenewalConfig(budget=1)) == ""
    assert raised(RenewalConfig(budget=None)) == ""
    text = raised(RenewalConfig(budget=17))
    assert "17 presentations" in text
    assert "above the default of 1." in text
    assert price(17) in text


def test_a_spent_budget_has_its_price() -> None:
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 3, "last": 2}
    note = judge(RenewalConfig(budget=100), spent=61, ahead=240, **facts).note
    assert note == ""  # a round over the budget by itself is said once, before the first
    assert price(240) in excess(RenewalConfig(budget=100), 240)
    note = judge(RenewalConfig(budget=100), spent=61, ahead=40, **facts).note
    assert price(101) in note


@pytest.mark.parametrize("budget, ahead", [(1, 128), (16, 17), (1, 6_000)])
def test_what_is_advised_takes_a_round_back_below_the_budget_or_says_what_it_costs(
    budget: int, ahead: int
) -> None:
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 1, "last": 0, "spent": 0}
    with pytest.raises(FederationError) as refused:
        judge(RenewalConfig(budget=budget, on_spent="error"), ahead=ahead, **facts)
    for text in (str(refused.value), excess(RenewalConfig(budget=budget), ahead)):
        assert price(ahead) in text
        assert f"accept that (--budget {ahead})" in text
        assert "(--batch-size times --local-steps; of fedsgd --batch-size alone)" in text
        assert f"--batch-size {budget}" not in text  # nobody trains on one image
    accepted = RenewalConfig(budget=ahead, on_spent="error")
    assert not judge(accepted, ahead=ahead, **facts).renew


def test_renewal_is_advised_where_it_helps_and_is_not_there_yet() -> None:
    advice = "a new pad every round (--renew-every 1)"
    assert advice in excess(RenewalConfig(), 128)
    assert advice in excess(RenewalConfig(every=2), 128)
    for there in (RenewalConfig(every=1), RenewalConfig(on_spent="renew")):
        assert "--renew-every" not in excess(there, 128)
    facts: dict[str, Any] = {"client": 0, "clients": 2, "round_": 3, "last": 2}
    with pytest.raises(FederationError) as refused:
        judge(RenewalConfig(budget=1, on_spent="error"), spent=1, ahead=1, **facts)
    assert "--on-spent renew" in str(refused.value)
    assert "fewer" not in str(refused.value)  # than one image
    assert f"accept that (--budget 2). {price(2)}" in str(refused.value)
    kept = RenewalConfig(budget=1, on_spent="renew")
    assert judge(kept, spent=1, ahead=1, **facts).renew


def test_a_run_says_it_before_its_first_round(tmp_path: Path) -> None:
    def notes(folder: str, length: float | None = None, **renewal: Any) -> list[str]:
        wanted = config(
            "pad",
            renewal=renewal,
            federation={"rounds": 1, "join_steps": 2},
            data={"samples": 64},
            training={
                "local_steps": 1,
                "batch_size": 16,
                "update_length": length,
                "weight_decay": 0.0,
            },
        )
        found: list[Event] = []
        run(wanted, tmp_path / folder, bundle=digits(), on_event=found.append)
        return [event.message for event in found if event.kind == "note"]

    assert notes("uncounted", budget=None) == []
    assert notes("raised", budget=64) == [raised(RenewalConfig(budget=64))]
    (usual,) = notes("usual")
    assert price(16) in usual
    (spent,) = notes("spent", budget=15)
    assert price(16) in spent
    (short,) = notes("short", length=1.0)
    assert price(16, at_length=True) in short
