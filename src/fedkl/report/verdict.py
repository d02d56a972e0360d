"""The sentences on top of a report: computed from the figures, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

# A lock keeps others out if neither a wrong key nor the best outsider gets beyond these, where a
# guesser is right once in ten. Where he is right more or less often, they are as far on the way
# from what he gets to 1.
GUESS: Final = 0.1
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
        rows: Summaries with ``name``, ``defense``, ``method`` and ``accuracy``, whose ``guess`` is
            taken for 0.1 where it is absent, as in runs of earlier versions.

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
    enough = _bound(LEARNED, found)
    outside, learned = _outsiders(found), found["own_key"] > enough
    if outside or learned:
        sentences.append(outside or "Whoever has neither key nor lock cannot use the model.")
    else:
        sentences.append(
            f"That is not more than {100 * enough:.0f} % with the key either: the model has "
            "learned too little to say what the lock keeps from others. Train it for more rounds."
        )
    if found["no_lock"] > max(_bound(NO_LOCK, found), found["outsider"]):
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


def _bound(of_ten: float, found: Mapping[str, Any]) -> float:
    """What ``of_ten`` is where a guesser is right as often as here."""
    guess = found.get("guess", GUESS)
    return float(guess + (of_ten - GUESS) / (1 - GUESS) * (1 - guess))


def _outsiders(found: Mapping[str, Any]) -> str:
    """Why outsiders are not kept out; "" if they are."""
    mean, high = _bound(WRONG_KEY_MEAN, found), _bound(WRONG_KEY_P95, found)
    most = _bound(NO_LOCK, found)
    faults = []
    if found["wrong_key"] > mean or found["wrong_key_p95"] > high:
        faults.append(
            f"wrong keys get more than {100 * mean:.0f} % on average or {100 * high:.0f} % at the "
            "95th percentile"
        )
    if found["outsider"] > most:
        faults.append(f"a thief without a key gets more than {100 * most:.0f} %")
    if not faults:
        return ""
    guess = f"whoever always says one class gets {_percent(found.get('guess', GUESS))}"
    return f"The lock does not keep others from using the model: {'; '.join(faults)} ({guess})."


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
