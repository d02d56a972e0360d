"""What a pad cannot hide: sizes of gradients and cosines among them: `python studies/relations.py`.

Single images of one client, each in an update of its own, with `fedkl.attacks`' `replay-relations`:
an attacker who trains four clients of its own, and asks which of 100 images of a class has a
gradient of that size (*size*, one update), and lies so to those of the other victims under the same
lock (*pairs*; *both*). Rows: a lock and a network; columns: how many images one lock has served
(64: the first half of the images). *Insider*: the attacker has another client's secrets besides.
*Key*: it holds the victim's, the positive control. *Shuffled*: what victims gave away exchanged
within their classes, so that there is nothing to find. *norm* has no secrets, *fedbn* has
private ones without a key.

A second table asks what one gradient tells if updates are sent at one length (`--update-length`):
its *size* as it is; how much of it lies along the public *weights*, tensor by tensor; and its
*shape*, which is how it is spread over tensors, entries, rows and columns, whatever its size and
its coordinates (studies/shapes.py). Federations of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from accuracy import interval
from breakpad import ROOT, Cell, trained
from cells import provenance, run_cells, say, table, write
from padarms import BLOCK, ONE_KEY, ONE_SEALED, SEALED_SIGNS

FOUR = 4
EPOCHS = 8
COUNTS = (2, 4, 16, 64)
KINDS: dict[str, tuple[str, dict[str, Any], int, float]] = {  # network, lock, seeds, seconds
    "lenet, pad": ("lenet", {"name": "pad"}, 3, 400.0),
    "resnet20, pad": ("resnet20", {"name": "pad"}, 3, 800.0),
    "resnet20, pad behind stage 2": ("resnet20-deep", {"name": "pad"}, 3, 700.0),
    "vit, pad behind block 1": ("vit", {"name": "pad", **BLOCK}, 3, 600.0),
    "lenet, pad of one key": ("lenet", ONE_KEY, 3, 300.0),
    "resnet20, pad of one key": ("resnet20", ONE_KEY, 3, 700.0),
    "lenet, one key sealed": ("lenet", ONE_SEALED, 3, 300.0),
    "resnet20, sealed signs": ("resnet20", SEALED_SIGNS, 3, 700.0),
    "lenet, channel": ("lenet", {"name": "channel"}, 1, 400.0),
    "lenet, fedbn": ("lenet", {"name": "fedbn"}, 1, 400.0),
    "lenet, norm": ("lenet", {"name": "norm"}, 1, 100.0),
}


SHAPES: dict[str, tuple[str, dict[str, Any], int, float]] = {
    f"{name}, shape": (*KINDS[name][:2], most, cost)
    for name, most, cost in (
        ("lenet, pad", 3, 80.0),
        ("resnet20, pad", 1, 950.0),
        ("lenet, fedbn", 1, 90.0),
    )
}
MANY = 2_000
WAYS = ("size", "weights", "shape")


def cells_of(arms: str | None, seeds: int | None, victims: int) -> dict[str, Cell]:
    """One federation each, by name."""
    plan = {**KINDS, **SHAPES}
    names = arms.split(";") if arms else list(plan)
    if strange := [name for name in names if name not in plan]:
        raise SystemExit(f"got arms {strange}; expected some of {list(plan)}.")
    many = max(victims, MANY)
    cells = [
        Cell("relations", name, lock, many if name in SHAPES else victims, seed, 4_000, FOUR, model)
        for name, (model, lock, most, _) in plan.items()
        if name in names
        for seed in range(min(most, seeds or most))
    ]
    return {cell.name: cell for cell in cells}


def work(name: str, job: tuple[Cell, str]) -> dict[str, Any]:
    """Attacks one federation in a process of its own."""
    import torch
    from replayers import RelationBench, ShapeBench

    torch.set_num_threads(1)
    cell, scratch = job
    started = time.process_time()
    config, folder = trained(cell, Path(scratch))
    if cell.arm in SHAPES:
        shapes = ShapeBench(config, folder, cell.victims, public=cell.public, sketch=2048)
        return {**_shapes(cell, shapes), "seconds": round(time.process_time() - started, 1)}
    bench = RelationBench(config, folder, cell.victims, public=cell.public, sketch=2048)
    held = bench.sides(bench.held)
    found: dict[str, Any] = {
        "arm": cell.arm,
        "seed": cell.seed,
        "victims": cell.victims,
        "own_key": json.loads((folder / "summary.json").read_text())["accuracy"]["own_key"],
        "key": bench.rates([held], (16,)),
    }
    if bench.network.secrets:
        shadows = [bench.sides(bench.own(seed, EPOCHS)) for seed in range(cell.shadows)]
        found["shadow"] = bench.rates(shadows, COUNTS)
        found["insider"] = bench.rates([bench.sides(bench.inside()), *shadows], (16,))
        bench.seen = bench.shuffled()
        found["shuffled"] = bench.rates(shadows, (16,))
    return {**found, "seconds": round(time.process_time() - started, 1)}


def _shapes(cell: Cell, bench: Any) -> dict[str, Any]:
    """One gradient at a time."""
    shadows = [bench.sides(bench.own(seed, EPOCHS)) for seed in range(cell.shadows)]
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "victims": cell.victims,
        "key": bench.alone([bench.sides(bench.held)]),
        "shadow": bench.alone(shadows),
        "insider": bench.alone([bench.sides(bench.inside()), *shadows]),
    }


def markdown(document: dict[str, Any]) -> str:
    """The table."""
    header = ["network, lock", "attacker", "1: size", "ways"]
    header += [str(n) for n in COUNTS]
    header += ["seeds"]
    rows = []
    for arm, cells in document["arms"].items():
        for who in ("shadow", "insider", "key", "shuffled"):
            mine = [cell[who] for cell in cells if who in cell]
            for way in ("both", "pairs") if mine else ():
                one = interval([m["1"]["size"] for m in mine]) if way == "both" else ""
                many = [
                    interval([m[str(n)][way] for m in mine]) if str(n) in mine[0] else "–"
                    for n in COUNTS
                ]
                rows.append([arm, who, one, way, *many, str(len(mine))])
    shapes = [
        [arm.removesuffix(", shape"), who, *_of(cells, who), str(len(cells))]
        for arm, cells in document["shapes"].items()
        for who in ("shadow", "insider", "key")
    ]
    about = "\n\n".join(" ".join(p.split()) for p in (__doc__ or "").split("\n\n")[1:])
    return "\n".join(
        [
            "# Sizes and relations: what a pad cannot hide\n",
            "\n".join(_made(document)) + "\n",
            about + "\n",
            f"Percent of {document['victims']:,} images a federation, mean ± 95 % interval over "
            "federations (Student's t). Chance: 1 %.\n",
            table(header, rows) + "\n",
            "## One gradient, at one length\n",
            f"Percent of {MANY:,} images a federation, as above.\n",
            table(["network, lock", "attacker", *WAYS, "seeds"], shapes) + "\n",
        ]
    )


def _made(document: dict[str, Any]) -> list[str]:
    """Which arms came of which command, the last one first."""
    groups: dict[str, list[str]] = {}
    for arm, made in document["made"].items():
        how = f"`{made['command']}` at commit {made['commit']}, {made['date']}"
        groups.setdefault(how, []).append(arm)
    dated = sorted(groups.items(), key=lambda one: one[0].rpartition(" ")[2], reverse=True)
    return [f"- {'; '.join(arms)}: {how}" for how, arms in dated]


def _of(cells: list[dict[str, Any]], who: str) -> list[str]:
    return [interval([cell[who][way] for cell in cells]) for way in WAYS]


def main() -> None:
    """Runs what is missing and writes results/relations.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", help="separated by semicolons; others stay as they are")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--victims", type=int, default=640)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "relations")
    args = parser.parse_args()
    cells = cells_of(args.arms, args.seeds, args.victims)
    plan = {**KINDS, **SHAPES}
    costs = {name: plan[cell.arm][3] for name, cell in cells.items()}
    cost = sum(costs.values()) / 60 / args.processes
    say(f"cost: about {cost:.0f} minutes on {args.processes} idle cores")
    found = run_cells(
        {name: (cell, str(args.scratch)) for name, cell in cells.items()},
        work,
        args.scratch / "cells",
        processes=args.processes,
        costs=costs,
    )
    path = args.out / "relations.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    arms = {**known.get("arms", {}), **known.get("shapes", {})}
    command = f"python studies/relations.py --victims {args.victims}"
    command += f' --arms "{args.arms}"' if args.arms else ""
    command += f" --seeds {args.seeds}" if args.seeds else ""
    before = {name: known.get(name) for name in ("command", "commit", "date")}
    made = known.get("made", dict.fromkeys(arms, before))
    now = provenance(command)
    for arm in {cell.arm for cell in cells.values()}:
        arms[arm] = [one for one in found.values() if one["arm"] == arm]
        made[arm] = {name: now[name] for name in before}
    document = {
        **now,
        "victims": args.victims,
        "made": {arm: made[arm] for arm in plan if arm in arms},
        "arms": {arm: arms[arm] for arm in KINDS if arm in arms},
        "shapes": {arm: arms[arm] for arm in SHAPES if arm in arms},
    }
    write(path, document)
    (args.out / "relations.md").write_text(markdown(document))
    say(f"wrote {args.out / 'relations.md'}")


if __name__ == "__main__":
    main()
