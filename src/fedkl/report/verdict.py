"""The sentences on top of a report: computed from the figures, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# A lock keeps others out if neither a wrong key nor the best outsider gets beyond these.
WRONG_KEY_MEAN: Final = 0.20
WRONG_KEY_P95: Final = 0.35
NO_LOCK: Final = 0.20
COST: Final = 0.01  # accuracy that a lock may cost
# Of a model that is right less often with its own key there is nothing that a lock could keep.
LEARNED: Final = WRONG_KEY_P95


@dataclass(frozen=True)
class Verdict:
    """``holds`` or ``does not hold`` or ``open``, and why: a paragraph a lock, and one more."""

    word: str
    paragraphs: tuple[str, ...]


def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """What the rows say about the locked models among them, each by name.

    Args:
        rows: Summaries with ``name``, ``defense``, ``method`` and ``accuracy``.

    Returns:
        ``holds`` if outsiders are kept out at no more than ``COST`` against the same network with
        an ordinary norm; ``does not hold`` if they are not; ``open`` if there is nothing to
        compare, the cost is higher or the locked model has learned little. Of several locks the
        worst word.
    """
    locks = [row for row in rows if row["accuracy"]["wrong_key"] is not None]
    if not locks:
        return Verdict("open", ("No row here is locked, so there is nothing to judge.",))
    judged = [_judge(row, rows) for row in locks]
    word = next(w for w in ("does not hold", "open", "holds") if any(w == j.word for j in judged))
    last = "What the updates leak about the images is another question, not asked here."
    return Verdict(word, (*(p for one in judged for p in one.paragraphs), last))


def _judge(locked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Verdict:
    found = locked["accuracy"]
    sentences = [
        f"With its own key the locked model ({locked['name']}) is right on "
        f"{_percent(found['own_key'])} of the test images; with a wrong key on "
        f"{_percent(found['wrong_key'])} on average (95th percentile "
        f"{_percent(found['wrong_key_p95'])}); the best thief who has the "
        f"global model alone gets {_percent(found['outsider'])}."
    ]
    outside, learned = _outsiders(found), found["own_key"] > LEARNED
    if outside or learned:
        sentences.append(outside or "Whoever has neither key nor lock cannot use the model.")
    else:
        sentences.append(
            f"That is not more than {100 * LEARNED:.0f} % with the key either: the model has "
            "learned too little to say what the lock keeps from others. Train it for more rounds."
        )
    if found["no_lock"] > max(NO_LOCK, found["outsider"]):
        sentences.append(
            f"Insiders are not kept out: with the other clients' mean lock a thief gets "
            f"{_percent(found['no_lock'])}."
        )
    cost, sentence = _cost(locked, rows)
    sentences.append(sentence)
    if outside:
        return Verdict("does not hold", (" ".join(sentences),))
    holds = learned and cost is not None and cost <= COST
    return Verdict("holds" if holds else "open", (" ".join(sentences),))


def _outsiders(found: Mapping[str, Any]) -> str:
    """Why outsiders are not kept out; "" if they are."""
    faults = []
    if found["wrong_key"] > WRONG_KEY_MEAN or found["wrong_key_p95"] > WRONG_KEY_P95:
        mean, high = 100 * WRONG_KEY_MEAN, 100 * WRONG_KEY_P95
        faults.append(
            f"wrong keys get more than {mean:.0f} % on average or {high:.0f} % at the 95th "
            "percentile"
        )
    if found["outsider"] > NO_LOCK:
        faults.append(f"a thief without a key gets more than {100 * NO_LOCK:.0f} %")
    return f"The lock does not keep others from using the model: {'; '.join(faults)}." * bool(
        faults
    )


def _cost(locked: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    def same(row: Mapping[str, Any]) -> bool:
        return (row["defense"], row["method"]) == ("norm", locked["method"])

    norm = next((row for row in rows if same(row)), None)
    if norm is None:
        return None, "What the lock costs is not known: no row has the same norm without a lock."
    cost = norm["accuracy"]["own_key"] - locked["accuracy"]["own_key"]
    points = f"{abs(100 * cost):.1f} points"
    word = f"costs {points} of accuracy" if cost > 0 else f"gains {points} of accuracy"
    return cost, (
        f"Against the same network with an ordinary shared norm ({norm['name']}) the lock {word}, "
        "in one run with one seed each: a difference of a point may be chance."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
