"""The tables of results/breakpad.md."""

from __future__ import annotations

import statistics
from typing import Any

from cells import table

PARTS = (
    "curves", "resnet20", "gradient", "matching", "repeats", "depth", "transformer", "replay",
    "renewals", "replay-renewals", "likelihood", "optimizers",
)  # fmt: skip
SEVERAL = {  # parts over several federations of their own
    "depth": "with the first lock behind a whole stage and all before it private",
    "transformer": "on a small vision transformer",
}
EVERY = 16
PRESENTATIONS = (16, 64, 256, 1000, 2000)
REPLAYED = (16, 32, 64, 256, 1000, 2000)


def markdown(document: dict[str, Any]) -> str:
    """The tables."""
    found = {part: document["parts"][part]["arms"] for part in PARTS if part in document["parts"]}
    about = [
        f"- {part}: `{one['command']}` at commit {one['commit']}, {one['date']}"
        f"{one.get('note', '')}"
        for part, one in document["parts"].items()
    ]
    parts = [
        "# Attempts to break the pad\n",
        "\n".join(about) + "\n",
        "Percent of victims identified among 100 images of the same class (chance 1). n: "
        "presentations under one pad whose statistics and labels the attacker pools. *shadow*: "
        "three sets of secrets of the attacker's own, the closest kept; 2,000 public images (more: "
        "6,000). *insider*: a client of the same federation, with its own lock. Each in several "
        "ways: *plain* (n = 1), *global* (restandardized), *label* (class means matched), "
        "*average* (the same, mean over all shadows), *transport* (class means, then a rotation "
        "fitted to matched neighbours); the best is shown, which is a maximum of several noisy "
        "figures; ≤: upper end of its 95 % interval as if it were one. *key*: the same attack "
        "holding the key, the positive control.\n",
    ]
    for part in ("curves", "resnet20", "gradient", "matching"):
        if part in found:
            parts.append(f"## {part}\n\n{_curve_table(found[part])}\n")
    if "repeats" in found and "matching" in found:
        parts.append(
            "## repeats\n\nMatching against pads: the mean over three federations (that of "
            "*matching* and two more, each with images, keys and attackers of its own) with the "
            "95 % interval over them (Student's t), and ≤: the upper end of the interval of "
            "Clopper and Pearson over all victims. One way for each n: as it is at n = 1 (the "
            "better of two shadows), else by transport, the shadow's best way on the first "
            "federation. That one was attacked before the encoders' learning rate was made to end "
            "at the last step of training.\n\n"
            f"{_repeat_table(_federations(found))}\n"
        )
    for name, what in SEVERAL.items():
        if name in found:
            table_ = _repeat_table(by_seed(found[name]))
            parts.append(f"## {name}\n\nAs *repeats*, {what}.\n\n{table_}\n")
    if "replay" in found:
        parts.append(
            "## replay\n\nThe attacker repeats the step on every image in question with secrets "
            "of its own (two sets of a shadow's, or an insider's) and compares gradients: *plain* "
            "one by one (n = 1); *matched*: rotated by what public images tell, within groups of "
            "n; *candidates*: by the candidates of all n as well. Mean over federations ± 95 % "
            "(Student's t), and ≤: the upper end of Clopper and Pearson over all victims. *key*: "
            "the same holding the key. *shuffled*: a shadow that is given the gradients of other "
            "victims of the class, which no attack can do better on than guess.\n\n"
            f"{_replay_table(by_seed(found['replay']))}\n"
        )
    if "renewals" in found:
        parts.append(
            f"## renewals\n\nA pad serves {EVERY} presentations; statistics and labels of all "
            f"victims, over all pads, are pooled.\n\n{_renewal_table(found['renewals'])}\n"
        )
    if "replay-renewals" in found:
        parts.append(
            f"## replay-renewals\n\nAs *replay*, all victims pooled, a new pad every {EVERY} of "
            f"them.\n\n{_renewal_table(found['replay-renewals'])}\n"
        )
    if "likelihood" in found:
        rows = next(iter(found["likelihood"].values()))["identified"].items()
        cells = [[n, f"{100 * v['identified']:.1f}"] for n, v in rows]
        parts.append(f"## likelihood\n\n{table(['pad as drawn', 'identified'], cells)}\n")
    if "optimizers" in found:
        parts.append(f"## optimizers\n\n{_audit_table(found['optimizers'])}\n")
    return "\n".join(parts)


def _curve_table(arms: dict[str, Any]) -> str:
    counts = [str(n) for n in PRESENTATIONS]
    rows = []
    for arm, one in arms.items():
        for who in ("shadow", "insider"):
            if who not in one:
                continue
            row = [arm, who, f"{100 * one['own_key']:.1f}", str(one["victims"])]
            row += [f"{100 * one['floor']:.1f}", f"{100 * one['key']:.1f}"]
            for n in ("1", *counts):
                ways = one[who].get(n)
                best = max(ways, key=lambda w: ways[w]) if ways else ""
                row.append(f"{_bounded(ways[best], one['victims'])} {best}" if ways else "–")
            rows.append(row)
    header = ["lock", "attacker", "own-key accuracy", "victims", "floor", "key", "n = 1"]
    return table([*header, *(f"n = {n}" for n in counts)], rows)


def _federations(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Results of the same lock in several federations: those of matching and of its repeats."""
    repeats = found["repeats"].items()
    groups = {
        first: [one, *(v for arm, v in repeats if arm.startswith(f"{first}, "))]
        for first, one in found["matching"].items()
    }
    return {first: mine for first, mine in groups.items() if len(mine) > 1}


def by_seed(arms: dict[str, Any]) -> dict[str, list[Any]]:
    """Results of the same lock, whose arms end in ``, seed n``."""
    groups: dict[str, list[Any]] = {}
    for arm, one in arms.items():
        groups.setdefault(arm.rpartition(", seed ")[0], []).append(one)
    return groups


def _replay_table(federations: dict[str, list[Any]]) -> str:
    rows = []
    for first, mine in federations.items():
        total = sum(each["victims"] for each in mine)
        for who in ("key", "shadow", "insider", "shuffled"):
            for way in ("matched", "candidates"):
                row = [first, who, way, str(total), "–"]
                if who != "shuffled":
                    row[-1] = _spread([each[who]["1"]["plain"] for each in mine], total)
                for n in (str(n) for n in REPLAYED):
                    rates = [each[who][n][way] for each in mine if n in each[who]]
                    row.append(_spread(rates, total) if rates else "–")
                rows.append(row)
    header = ["lock", "attacker", "way", "victims", "n = 1, plain"]
    return table([*header, *(f"n = {n}" for n in REPLAYED)], rows)


def _spread(rates: list[float], total: int) -> str:
    """Percent ± 95 % over federations, with the upper end over all victims."""
    from fedkl.metrics import mean_interval

    mean, half = mean_interval([100 * r for r in rates])
    high = _bounded(mean / 100, total).partition("(")[2]
    return f"{mean:.1f}{'' if half is None else f' ± {half:.1f}'} ({high}"


def _repeat_table(federations: dict[str, list[Any]]) -> str:
    rows = []
    for first, mine in federations.items():
        total = sum(each["victims"] for each in mine)
        for who in ("shadow", "insider"):
            row = [first, who, str(total)]
            row += [
                f"{100 * statistics.fmean(each[k] for each in mine):.1f}" for k in ("floor", "key")
            ]
            for n in ("1", *(str(n) for n in PRESENTATIONS)):
                rates = [each[who][n]["plain" if n == "1" else "transport"] for each in mine]
                row.append(_spread(rates, total))
            rows.append(row)
    header = ["lock", "attacker", "victims", "floor", "key", "n = 1, plain"]
    return table([*header, *(f"n = {n}, transport" for n in PRESENTATIONS)], rows)


def _bounded(rate: float, victims: int) -> str:
    """Percent, with the upper end of the 95 % interval of Clopper and Pearson."""
    from fedkl.metrics import proportion_interval

    high = proportion_interval(round(rate * victims), victims)[1]
    return f"{100 * rate:.1f} (≤ {100 * high:.1f})"


def _renewal_table(arms: dict[str, Any]) -> str:
    rows = []
    for arm, one in arms.items():
        for who in ("shadow", "insider"):
            ways = [_bounded(v, one["victims"]) for v in one[who].values()]
            percent = [f"{100 * one[k]:.1f}" for k in ("floor", "key")]
            rows.append([arm, who, str(one["victims"]), *percent, *ways])
    ways = list(next(iter(arms.values()))["shadow"])
    return table(["lock", "attacker", "victims", "floor", "key", *ways], rows)


def _audit_table(arms: dict[str, Any]) -> str:
    rows = []
    for arm, one in arms.items():
        for entry in one["summary"]:
            advantage, identified = entry["advantage"], entry["identified"]
            bounds = "–" if advantage["low"] is None else f"{advantage['high']:.3f}"
            rows.append(
                [
                    arm,
                    entry["attack"],
                    entry["defense"],
                    entry["threat"],
                    str(entry["n"]),
                    f"{advantage['mean']:+.3f} (to {bounds})",
                    f"{100 * identified['mean']:.1f} (to {100 * identified['high']:.1f})",
                    entry["verdict"],
                ]
            )
    header = ["audit", "attack", "defense", "threat", "n", "advantage", "identified", "verdict"]
    return table(header, rows)
