"""From rows to means with intervals, and from those to a verdict that is never better than them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from fedkl.audit.config import ALIKE, KEY_HOLDER
from fedkl.defenses import parts_of
from fedkl.metrics import mean_interval, proportion_interval
from fedkl.observation import THREATS

Row = Mapping[str, Any]

LEAKS, HOLDS, INCONCLUSIVE = "leaks", "holds", "inconclusive"
EXIT_CODES: Final = {HOLDS: 0, LEAKS: 1, INCONCLUSIVE: 3}

ADVANTAGE_LEAKS, ADVANTAGE_HOLDS = 0.05, 0.02
IDENTIFIED_LEAKS, IDENTIFIED_HOLDS = 0.02, 0.02
IDENTIFIED_HOLDS_FEW, FEW = 0.06, 100
FEWEST = 5  # victims: below, one lucky hit is a leak with 95 % confidence
CHANCE = 0.01  # among 100 candidates, which the bounds on identification are for
WORKS = 0.10
LOCKS: Final = {"norm", "fedbn", "channel", "pad", "open-pad"}
"""Defenses with a network of their own: that of ``none`` with norms put in where it has none."""

CELL: Final = (
    "attack", "defense", "threat", "stage", "batch", "steps", "observations", "aggregated",
    "presentations",
)  # fmt: skip
MEANS: Final = (
    "mse", "psnr", "ssim", "ssim_uniform", "ssim_aligned", "lpips", "paper_mse", "paper_psnr",
    "floor_ssim", "floor_ssim_aligned", "advantage",
)  # fmt: skip
RATES: Final = ("identified", "floor_identified", "success", "floor_success", "labels_right")


def summarize(
    rows: Sequence[Row],
    *,
    judged: Sequence[str],
    feed_forward: Sequence[str] = (),
    recognizing: Sequence[str] = (),
    candidates: int = 100,
) -> list[dict[str, Any]]:
    """One entry per attack, defense and threat: means, 95 % intervals, and a verdict.

    Args:
        rows: The audit's rows.
        judged: Defenses that a verdict is about; the others, and key holders, are controls.
        feed_forward: Attacks without an optimizer, which are cheap: their ``holds`` needs the
            identification bound of 2 % whatever the number of images.
        recognizing: Attacks that pick among images and draw none: what their pictures, public
            images, resemble is no part of ``holds``.
        candidates: Images among which the true one was to be found. The bounds are for 100, where
            chance is 1 %; with fewer they rise by as much as chance does, with more they fall.
    """
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in CELL), []).append(row)
    entries = []
    for place, members in cells.items():
        entry: dict[str, Any] = dict(zip(CELL, place, strict=True))
        entry["n"] = len({row["victim"] for row in members})
        entry["images"] = len(members)
        entry |= {name: _mean(members, name) for name in MEANS}
        entry |= {name: _rate(members, name) for name in RATES}
        entry |= _left_out(members)
        control = entry["defense"] not in judged or entry["threat"] == KEY_HOLDER
        entry["role"] = "control" if control else "defense"
        entries.append(entry)
    for entry in entries:
        entry["works"] = works(entry, entries)
        entry["verdict"], entry["reason"] = judge(
            entry,
            cheap=str(entry["attack"]) in feed_forward,
            draws=str(entry["attack"]) not in recognizing,
            chance=1 / candidates,
        )
        if absent := entry["left_out"]:
            entry["reason"] += (
                f" {absent} of {entry['n']} victims were beyond the attack: counted as guessed, "
                "and as given away wherever that could be read as holding."
            )
    return entries


def works(entry: Row, entries: Sequence[Row]) -> dict[str, bool]:
    """Whether the same attack surely (95 %) succeeds where nothing is secret, per metric.

    That is in the hands of who holds the key of the same defense. Where nobody does, it is on the
    same network: the ordinary norm if the defense has a lock, the undefended one if not. An attack
    that gets through another network alone proves nothing. What a server gets by crafting weights
    does not show that an honest one's attack works, nor the other way round.
    """
    same = [
        other
        for other in entries
        if all(
            other[name] == entry[name]
            for name in ("attack", "stage", "batch", "steps", "observations", "aggregated")
        )
        and _crafted(other) == _crafted(entry)
    ]
    defense = str(entry["defense"])
    holders = [o for o in same if o["defense"] == defense and o["threat"] == KEY_HOLDER]
    network = "norm" if LOCKS & {*parts_of(defense)} else "none"
    controls = holders or [o for o in same if o["defense"] == network]
    return {
        "advantage": any((o["advantage"]["low"] or 0.0) >= WORKS for o in controls),
        "identified": any(
            o["identified"]["low"] - o["floor_identified"]["mean"] >= WORKS for o in controls
        ),
    }


def _crafted(entry: Row) -> bool:
    return str(entry["threat"]) in THREATS and THREATS[str(entry["threat"])].crafting


def judge(
    entry: Row, *, cheap: bool = False, draws: bool = True, chance: float = CHANCE
) -> tuple[str, str]:
    """Verdict and one sentence. A missing bound counts as the worst it could be.

    So does a victim that was left out: a leak is found among the others, with that one guessed; but
    nothing is said to hold that would not hold with that one given away.

    Args:
        entry: Means and intervals of one attack.
        cheap: Whether the attack is feed-forward.
        draws: Whether its pictures are its own; else identification alone decides on ``holds``.
        chance: Of a guesser to identify: bounds are an excess over it, so they rise by what it is
            above :data:`CHANCE` and fall by what it is below. Multiplied, they would pass 1 with
            two candidates.
    """
    rise = chance - CHANCE
    if entry["n"] < FEWEST:
        return INCONCLUSIVE, (
            f"a verdict takes {FEWEST} victims, and there are {entry['n']}: of so few, one that is "
            "found by luck would be a leak. Attack more."
        )
    if leak := _leak(entry, IDENTIFIED_LEAKS + rise):
        return LEAKS, leak
    counted = ("advantage", "identified") if draws else ("identified",)
    if missing := [name for name in counted if not entry["works"][name]]:
        what = {"advantage": "aligned SSIM", "identified": "identification"}
        return INCONCLUSIVE, (
            f"the attack does not surely (95 %) beat the floor by {WORKS} in "
            f"{' or '.join(what[name] for name in missing)} with the key either (where there is "
            "none: on the same network in the open), so its failure says nothing."
        )
    few = not cheap and entry["n"] >= FEW
    bound = rise + (IDENTIFIED_HOLDS_FEW if few else IDENTIFIED_HOLDS)
    return _held(entry, bound, draws=draws)


def _leak(entry: Row, bound: float) -> str:
    """What shows that it leaks, ``bound`` being that on identification; "" if nothing does."""
    advantage, identified = entry["advantage"], entry["identified"]
    low = advantage["low"]
    if low is not None and low > ADVANTAGE_LEAKS:
        return (
            f"aligned SSIM beats the floor by {advantage['mean']:.3f} "
            f"(95 % from {low:.3f}), more than {ADVANTAGE_LEAKS}."
        )
    if identified["low"] > bound:
        return (
            f"{identified['mean']:.0%} of the images are identified among others of their class "
            f"(95 % from {identified['low']:.1%}), more than {100 * bound:.3g}%."
        )
    return ""


def _held(entry: Row, bound: float, *, draws: bool) -> tuple[str, str]:
    """Whether the upper bounds are low enough, ``bound`` being that on identification."""
    high, found = entry["ceiling"]["advantage"], entry["ceiling"]["identified"]
    room = []
    if draws and (high is None or high > ADVANTAGE_HOLDS):
        room.append(f"an advantage up to {'–' if high is None else f'{high:.3f}'}")
    if found > bound:
        room.append(f"identification up to {found:.1%}")
    if not room:
        most = f"advantage at most {high:.3f} and " if draws else ""
        return HOLDS, (
            f"{most}identification at most {found:.1%} (95 %), while the same attack succeeds "
            "where it should."
        )
    return INCONCLUSIVE, (
        f"{entry['n']} victims leave room for {' and '.join(room)} (95 %); "
        "more of them would narrow it."
    )


def overall(
    entries: Sequence[Row],
    judged: Sequence[str],
    skipped: Sequence[Row] = (),
    *,
    feed_forward: Sequence[str] = (),
) -> dict[str, Any]:
    """The verdict on every judged defense, and the worst of them.

    One leak is a leak. ``holds`` needs at least one attack that was able to fail, no attack that is
    inconclusive, and under every threat model an attack that could be mounted. Those that could not
    (``skipped``, with ``defense``, ``attack`` and ``threat``) are named in the reason and under
    ``left_out``: a defense is not said to withstand them. Attacks without an optimizer
    (``feed_forward``) are mounted under one of :data:`fedkl.audit.config.ALIKE` for all of them.
    """
    defenses = {}
    for name in judged:
        mine = [
            (i, e) for i, e in enumerate(entries) if e["defense"] == name and e["role"] == "defense"
        ]
        # Key holders are controls: one that could not attack shows in what `works`.
        absent = {
            (str(s["attack"]), str(s["threat"]))
            for s in skipped
            if s["defense"] == name and s["threat"] != KEY_HOLDER
        }
        mounted = {(str(e["attack"]), str(e["threat"])) for _, e in mine}
        threats = {threat for _, threat in mounted}
        if any(attack in feed_forward and threat in ALIKE for attack, threat in mounted):
            threats |= set(ALIKE)
        defenses[name] = _without(_worst(mine), sorted(absent), mounted, threats)
    order = (LEAKS, INCONCLUSIVE, HOLDS)
    found = {verdict["verdict"] for verdict in defenses.values()}
    worst = next((v for v in order if v in found), INCONCLUSIVE)
    return {"overall": worst, "defenses": defenses}


def _without(
    found: dict[str, Any],
    absent: Sequence[tuple[str, str]],
    mounted: Collection[tuple[str, str]],
    threats: Collection[str],
) -> dict[str, Any]:
    """The verdict ``found`` where the attacks ``absent``, with their threats, were not mounted.

    Others were ``mounted``, under ``threats``.
    """
    unmounted = [pair for pair in absent if pair not in mounted]
    bare = list(dict.fromkeys(threat for _, threat in unmounted if threat not in threats))
    if bare and found["verdict"] == HOLDS:
        found = {
            "verdict": INCONCLUSIVE,
            "worst": None,
            "reason": f"no attack could be mounted under {', '.join(bare)}. As far as others go, "
            f"it holds; {found['reason']}",
        }
    reason = found["reason"]
    if unmounted:
        reason += f" Not mounted, so nothing is said of: {_pairs(unmounted)}."
    if parts := [pair for pair in absent if pair in mounted]:
        reason += f" Mounted with some of the seeds alone: {_pairs(parts)}."
    names = [{"attack": attack, "threat": threat} for attack, threat in absent]
    return {**found, "reason": reason, "left_out": names}


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{attack} ({threat})" for attack, threat in pairs)


def _worst(entries: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    for verdict in (LEAKS, INCONCLUSIVE, HOLDS):
        having = [(i, e) for i, e in entries if e["verdict"] == verdict]
        if having:
            i, entry = max(having, key=lambda pair: _strength(pair[1]))
            reason = f"{entry['attack']} ({entry['threat']}): {entry['reason']}"
            return {"verdict": verdict, "worst": i, "reason": reason}
    return {
        "verdict": INCONCLUSIVE,
        "worst": None,
        "reason": "no attack that was asked for applies to this defense.",
    }


def _strength(entry: Row) -> float:
    """What an attack has beyond the floor, 1 being all: of advantage half an SSIM is."""
    more = float(entry["identified"]["mean"] - entry["floor_identified"]["mean"])
    return max(2 * float(entry["advantage"]["mean"] or 0.0), more)


def _left_out(rows: Sequence[Row]) -> dict[str, Any]:
    """How many victims the attack could not treat, and the upper bounds if it had all of them.

    Their rows hold the floor's figures, by which alone a defense would seem to hold against an
    attack that merely fails.
    """
    absent = [row for row in rows if row.get("left_out") is not None]
    given = [
        row
        if row.get("left_out") is None
        else {**row, "identified": True, "advantage": 1.0 - row["floor_ssim_aligned"]}
        for row in rows
    ]
    high = {
        "advantage": _mean(given, "advantage")["high"],
        "identified": _rate(given, "identified")["high"],
    }
    return {"left_out": len({row["victim"] for row in absent}), "ceiling": high}


def _by_victim(rows: Sequence[Row], values: Sequence[float]) -> list[float]:
    """Means per victim: images of one update, of one lock or of several seeds hang together."""
    found: dict[Any, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row["victim"], []).append(value)
    return [sum(mine) / len(mine) for mine in found.values()]


def _mean(rows: Sequence[Row], name: str) -> dict[str, float | None]:
    """Mean over victims with Student's interval, over several federations the wider one."""
    known = [row for row in rows if row.get(name) is not None]
    if not known:
        return {"mean": None, "low": None, "high": None}
    values = [row[name] for row in known]
    mean, half = mean_interval(_by_victim(known, values))
    if half is None:
        return {"mean": mean, "low": None, "high": None}
    low, high = _wider(mean - half, mean + half, known, values)
    return {"mean": mean, "low": low, "high": high}


def _wider(
    low: float, high: float, rows: Sequence[Row], values: Sequence[float]
) -> tuple[float, float]:
    """An interval over victims, or Student's over federations as far as that one is wider.

    All victims of a federation are under its weights and keys: where those of several seeds
    differ, victims alone do not tell by how much.
    """
    found: dict[Any, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row.get("seed"), []).append(value)
    mean, half = mean_interval([sum(mine) / len(mine) for mine in found.values()])
    return (low, high) if half is None else (min(low, mean - half), max(high, mean + half))


def _labels_right(rows: Sequence[Row]) -> list[float]:
    """Of every row the share of its update's labels that were found, in whatever order.

    Rows stand in the order that fits their images, which is no matter of labels.
    """
    updates: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        updates.setdefault((row["victim"], row.get("seed")), []).append(i)
    hits = [0.0] * len(rows)
    for victim in updates.values():
        size = max(1, len(victim) // rows[victim[0]]["observations"])
        for at in range(0, len(victim), size):
            mine = victim[at : at + size]
            true = Counter(rows[i]["label"] for i in mine)
            found = Counter(rows[i]["label_found"] for i in mine)
            for i in mine:
                hits[i] = (true & found).total() / len(mine)
    return hits


def _rate(rows: Sequence[Row], name: str) -> dict[str, float | None]:
    """Rate over victims with the interval of Clopper and Pearson; of labels that were granted none.

    A victim with several images or seeds counts as one trial, by its share: to the next victim
    up for the upper bound and down for the lower one, so the interval is never too narrow. Of
    several federations it is at least as wide as Student's over these.
    """
    if name == "labels_right":
        if any(row.get("labels_granted") for row in rows):
            return {"mean": None, "low": None, "high": None}
        hits = _labels_right(rows)
    else:
        hits = [float(row[name]) for row in rows]
    shares = _by_victim(rows, hits)
    total = sum(shares)
    low, _ = proportion_interval(math.floor(total + 1e-9), len(shares))
    _, high = proportion_interval(math.ceil(total - 1e-9), len(shares))
    low, high = _wider(low, high, rows, hits)
    return {"mean": total / len(shares), "low": max(0.0, low), "high": min(1.0, high)}
