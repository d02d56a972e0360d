"""The figures and tables of results/pad.md."""

from __future__ import annotations

import statistics
from typing import Any

from accuracy import interval, paired
from cells import table


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one arm over its seeds."""
    accuracies = [r["accuracy"] for r in results]
    wrong = [w for a in accuracies for w in a["wrong_keys"]]
    return {
        "own_key": [a["own_key"] for a in accuracies],
        "own_mix": [statistics.fmean(r["mixes"]) for r in results],
        "settled_mix": [
            statistics.fmean(r["settled_mixes"])
            for r in results
            if all("settled_mixes" in one for one in results)  # else some are of before
        ],
        "wrong_key": [a["wrong_key"] for a in accuracies if a["wrong_key"] is not None],
        "wrong_key_p95": statistics.quantiles(wrong, n=20)[-1] if len(wrong) > 1 else None,
        "outsider": [a["outsider"] for a in accuracies],
        "no_lock": [a["no_lock"] for a in accuracies],
        "validation": [r["validation"] for r in results],
        "settings": results[0]["cell"]["settings"],
        "seconds": [r["seconds"] for r in results],
    }


def joined(before: dict[str, Any] | None, now: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """A block some of whose arms were run again, the others as they were; arms in ``order``."""
    arms = {**(before or {}).get("arms", {}), **now["arms"]}
    if before is not None:
        again = f"; again `{now['command']}` at {now['commit']}, {now['date']}"
        now = {**before, "note": before.get("note", "") + again}
    return {**now, "arms": {arm: arms[arm] for arm in dict.fromkeys(order) if arm in arms}}


def markdown(document: dict[str, Any]) -> str:
    """The tables."""
    about = [
        f"- {name}: `{block['command']}` at commit {block['commit']}, {block['date']}"
        f"{block.get('note', '')}"
        for name, block in document["blocks"].items()
    ]
    parts = [
        "# The pad: accuracy, and what the key is worth\n",
        "\n".join(about) + "\n",
        "Percent of the test set, mean ± 95 % interval over seeds (Student's t). *Own mix*: test "
        "images weighted as each client's own labels; *settled*: after 50 slow steps of what is "
        "private, on the client's own images. *alone*: no federation, every client trains "
        "by itself, as long; what a federation is worth is measured against it. *Outsider*: the "
        "global model with γ = ±1, β = 0, random stem, statistics re-estimated or not, the best. "
        "*No lock*: insiders included, who have the other clients' mean lock and stem.\n",
    ]
    for name, block in document["blocks"].items():
        parts.append(f"## {name}\n\n{_table(name, block['arms'])}\n")
    return "\n".join(parts)


def _table(name: str, block: dict[str, Any]) -> str:
    if name == "renewal":
        rows = [
            [arm, *(f"{100 * v:.1f}" for v in f["validation"][0]), interval(f["own_key"])]
            for arm, f in block.items()
        ]
        rounds = max(len(f["validation"][0]) for f in block.values())
        return table(["renewal", *(f"r{i + 1}" for i in range(rounds)), "test"], rows)
    rows = []
    for arm, figures in block.items():
        against = f"norm,{arm.partition(',')[2]}" if name.endswith("clients") else "norm"
        other = block.get(against)
        versus = "" if other is None or arm == against else paired(block, arm, against)[0]
        p95, validation = figures["wrong_key_p95"], [v[-1] for v in figures["validation"] if v]
        rows.append(
            [
                arm,
                interval(figures["own_key"]),
                versus,
                interval(figures["own_mix"]),
                interval(settled) if (settled := figures.get("settled_mix")) else "–",
                of_all(figures["wrong_key"]),
                f"{100 * p95:.1f}" if p95 is not None else "–",
                of_all(figures["outsider"]),
                of_all(figures["no_lock"]),
                interval(validation) if validation else "–",
                str(len(figures["own_key"])),
            ]
        )
    header = [
        "arm",
        "own key",
        "− norm",
        "own mix",
        "settled",
        "wrong key",
        "p95",
        "outsider",
        "no lock",
    ]
    return table([*header, "validation", "seeds"], rows)


def of_all(values: list[float | None]) -> str:
    """Mean and interval, or a dash where there is nothing to measure."""
    found = [value for value in values if value is not None]
    return interval(found) if found else "–"
