"""What a pad costs in accuracy, and what its key is worth: `python studies/pad.py`.

Blocks, every arm paired by seed with the same data, partition, batches and initial weights:

lenet-iid, lenet-dirichlet
    LeNet on Fashion-MNIST, 3 clients: norm, fedbn, channel, pad (its head private), pad with a
    shared head. IID, as on ResNet-20, also norm and pad with every update sent at one length.
tuning
    LeNet's learning rate, on validation images of a seed of its own.
resnet20-frontier
    The same for ResNet-20 after 4 rounds, and what each setting of the pad does there.
resnet20-iid, resnet20-dirichlet
    ResNet-20 at 16x16, 3 clients x 4,000 images, 10 rounds. IID also the channel lock, with and
    without a group key: what does it cost that locks start apart, as pads do?
resnet20-rates, resnet20-tuned-iid, resnet20-tuned-dirichlet
    Every arm at the rate that is best for it on validation after all 10 rounds, of a seed of its
    own: the rates above were chosen after 2 rounds, and a higher one is better for norm. IID norm
    and the sealed pad have 12 seeds (8 first, which left the end of the interval at -1.02).
resnet20-long
    The same over 20 rounds, IID: does a pad catch up?
resnet20-depth
    The first lock behind stage 1 or 2, all before it private: what is left to learn together?
vit-tuning, vit-iid, vit-depth
    A small vision transformer at 16x16, 3 clients x 4,000 images, 10 rounds: learning rates, the
    first lock behind the embedding of patches, and behind the first block, around all of which its
    residual stream would lead.
clients, resnet20-clients
    The same 18,000 images over 10 and 100 clients; 12,000 of ResNet-20, at the tuned rates.
renewal
    Pads renewed every 3 rounds, all at once or staggered, with few or more lock-only steps.

In lenet-*, resnet20-* and clients also a pad of one key, which all clients hold: against the server
alone; where labels are unequal, also with a shared head; and sealed, where clients send each other
their private layers encrypted and go on from the mean.

Every run also gives each client's accuracy on its own mix of labels. What a thief with a few
labelled images makes of the models: studies/thieves.py. Keys are fresh in every cell: figures
repeat within their intervals, not to the digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import merged, provenance, run_cells, say, write
from ownmix import alone, on_own_mix
from padarms import (
    ARMS,
    BEST,
    BLOCK,
    CAUSES,
    DEPTHS,
    DIRICHLET,
    FRONTIER,
    LENET,
    LENGTHS,
    LONG,
    MANY_CLIENTS,
    MANY_SEEDS,
    PAD,
    RENEWALS,
    RESNET,
    SAME_LENGTH,
    SEALED,
    TUNED,
    VIT,
    settings_of,
)
from padtables import joined, markdown, summarize

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 1000
SETTLE = 50  # steps
ALL, ONE, SHARED = ("alone", "norm", "fedbn"), "pad of one key", "one key and head"


@dataclass(frozen=True)
class Cell:
    """One run: everything it takes to repeat it."""

    block: str
    arm: str
    seed: int
    settings: dict[str, Any]
    cost: float

    @property
    def name(self) -> str:
        """File name of the result."""
        arm = self.arm.replace(" ", "-").replace(",", "").replace("'", "")
        return f"{self.block}_{arm}_seed{self.seed}"


def cells_of(block: str, seeds: int) -> list[Cell]:
    """The runs of a block."""
    make = {
        "tuning": _tuning,
        "lenet-iid": lambda n: _lenet(
            "lenet-iid",
            n,
            {},
            (*ALL, "channel", "pad", "pad-open-head", ONE, SEALED, *SAME_LENGTH),
        ),
        "lenet-dirichlet": lambda n: _lenet(
            "lenet-dirichlet", n, DIRICHLET, (*ALL, "pad", "pad-open-head", ONE, SHARED, SEALED)
        ),
        "resnet20-frontier": _frontier,
        "resnet20-iid": lambda n: _resnet("resnet20-iid", n, {}),
        "resnet20-dirichlet": lambda n: _resnet("resnet20-dirichlet", n, DIRICHLET),
        "resnet20-rates": _rates,
        "resnet20-tuned-iid": lambda n: _tuned("resnet20-tuned-iid", n, {}),
        "resnet20-tuned-dirichlet": lambda n: _tuned("resnet20-tuned-dirichlet", n, DIRICHLET),
        "resnet20-long": lambda n: _resnet("resnet20-long", n, LONG),
        "resnet20-depth": _depths,
        "vit-tuning": _vit_tuning,
        "vit-iid": lambda n: _vit("vit-iid", n, {}),
        "vit-depth": lambda n: _vit("vit-depth", n, BLOCK),
        "clients": lambda n: _clients("clients", n),
        "resnet20-clients": lambda n: _clients("resnet20-clients", n),
        "renewal": _renewal,
    }
    return make[block](seeds)


BLOCKS = (
    "tuning", "lenet-iid", "lenet-dirichlet", "clients", "renewal",
    "resnet20-frontier", "resnet20-iid", "resnet20-dirichlet", "resnet20-rates",
    "resnet20-tuned-iid", "resnet20-tuned-dirichlet", "resnet20-clients", "resnet20-long",
    "resnet20-depth", "vit-tuning", "vit-iid", "vit-depth",
)  # fmt: skip


def _tuning(seeds: int) -> list[Cell]:
    cells = []
    for lr in (0.02, 0.05, 0.1):
        over = {"defense": PAD, "training": {"lr": lr}, "evaluation": {"every": 10}}
        cells.append(Cell("tuning", f"lr {lr:g}", TUNING_SEED, merged(LENET, over), 35.0))
    return cells


def _lenet(block: str, seeds: int, over: dict[str, Any], arms: tuple[str, ...]) -> list[Cell]:
    return [
        Cell(
            block,
            arm,
            seed,
            merged(LENET, merged(over, _arm(arm, "lenet"))),
            35.0,
        )
        for seed in range(seeds)
        for arm in arms
    ]


def _clients(block: str, seeds: int) -> list[Cell]:
    total, cost, arms = MANY_CLIENTS[block]

    def settings(arm: str, clients: int) -> dict[str, Any]:
        tuned = {"alone": BEST["norm"], **BEST}
        lenet = block == "clients"
        base = merged(LENET, _arm(arm, "lenet")) if lenet else _at_rate(arm, tuned[arm])
        over = {"data": {"samples": total // clients}, "federation": {"clients": clients}}
        return merged(base, over)

    return [
        Cell(block, f"{arm}, {clients} clients", seed, settings(arm, clients), cost)
        for seed in range(seeds)
        for clients in (10, 100)
        for arm in arms
        if seed == 0 or (clients == 10 and arm in MANY_SEEDS and block != "clients")
    ]


def _renewal(seeds: int) -> list[Cell]:
    over = {
        "defense": PAD,
        "training": {"schedule": "constant"},  # at a falling rate late renewals would be unfair
        "federation": {"rounds": 8},
        "evaluation": {"every": 1, "wrong_keys": 1, "wrong_key_images": 100, "images": 1_000},
    }
    return [
        Cell("renewal", arm, 0, merged(LENET, merged(over, {"renewal": renewal})), 50.0)
        for arm, renewal in RENEWALS.items()
    ]


def _frontier(seeds: int) -> list[Cell]:
    return [
        Cell(
            "resnet20-frontier",
            arm,
            TUNING_SEED,
            merged(
                merged(LENET, RESNET),
                {
                    "defense": lock,
                    "training": {"lr": lr},
                    "federation": {"rounds": 4},
                    "evaluation": {"every": 4, "images": 5_000, "wrong_keys": 1},
                },
            ),
            100.0,
        )
        for arm, (lock, lr) in FRONTIER.items()
    ]


def _resnet(block: str, seeds: int, over: dict[str, Any]) -> list[Cell]:
    more = {"resnet20-iid": (*CAUSES, *SAME_LENGTH), "resnet20-dirichlet": (SHARED,)}
    return [
        Cell(
            block,
            arm,
            seed,
            merged(merged(LENET, RESNET), merged(over, _arm(arm, "resnet20"))),
            (250.0 if "pad" in arm else 150.0) * (2 if block == "resnet20-long" else 1),
        )
        for seed in range(seeds)
        for arm in (*ALL, "pad", ONE, *more.get(block, ()))
    ]


def _arm(arm: str, model: str) -> dict[str, Any]:
    """Settings of an arm."""
    if arm in SAME_LENGTH:
        # Weight decay on clients tells the size, since the server knows the weights.
        training = {"update_length": LENGTHS[model], "weight_decay": 0.0}
        return {"defense": ARMS[arm], "training": training}
    return settings_of(ARMS[arm])


def _rates(seeds: int) -> list[Cell]:
    """Rates of ResNet-20's arms, on validation images of a seed of its own."""
    few = {"evaluation": {"every": 10, "images": 5_000, "wrong_keys": 1}}
    return [
        Cell(
            "resnet20-rates",
            f"{arm}, lr {lr:g}",
            TUNING_SEED,
            merged(_at_rate(arm, lr), few),
            190.0,
        )
        for arm, rates in TUNED.items()
        for lr in rates
    ]


def _at_rate(arm: str, lr: float) -> dict[str, Any]:
    return merged(merged(LENET, RESNET), merged(_arm(arm, "resnet20"), {"training": {"lr": lr}}))


def _tuned(block: str, seeds: int, over: dict[str, Any]) -> list[Cell]:
    return [
        Cell(block, arm, seed, merged(_at_rate(arm, lr), over), 190.0)
        for seed in range(max(seeds, 12))
        for arm, lr in BEST.items()
        if seed < seeds or (arm in MANY_SEEDS and not over)
    ]


def _depths(seeds: int) -> list[Cell]:
    return [
        Cell(
            "resnet20-depth",
            arm,
            seed,
            merged(merged(LENET, RESNET), {"defense": {**lock, "behind": f"layer{stage}"}}),
            180.0,
        )
        for seed in range(seeds)
        for arm, (stage, lock, most) in DEPTHS.items()
        if seed < most
    ]


def _vit_tuning(seeds: int) -> list[Cell]:
    return [
        Cell(
            "vit-tuning",
            f"{arm}{', behind block 1' if behind else ''}, lr {lr:g}",
            TUNING_SEED,
            merged(
                merged(LENET, VIT),
                {
                    "defense": {**ARMS[arm], **behind},
                    "training": {"lr": lr},
                    "evaluation": {"every": 10, "wrong_keys": 1},
                },
            ),
            40.0,
        )
        for arm, behind in (("norm", {}), ("pad", {}), ("norm", BLOCK), ("pad", BLOCK))
        for lr in (0.02, 0.05, 0.1)
    ]


def _vit(block: str, seeds: int, behind: dict[str, Any]) -> list[Cell]:
    return [
        Cell(
            block,
            arm,
            seed,
            merged(merged(LENET, VIT), {"defense": {**ARMS[arm], **behind}}),
            40.0,
        )
        for seed in range(seeds)
        for arm in ("alone", "norm", "fedbn", "channel", "pad", "no key")
    ]


def work(name: str, job: tuple[Cell, str]) -> dict[str, Any]:
    """Runs one cell in a process of its own."""
    from fedkl.federation import config_from, run

    cell, scratch = job
    config = config_from({**cell.settings, "seed": cell.seed}, source=name)
    folder = Path(scratch) / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    if cell.arm.startswith("alone"):
        by_itself = alone(config, folder)
        shutil.rmtree(folder)
        seconds = round(time.process_time() - started, 1)
        return {"cell": dataclasses.asdict(cell), **by_itself, "seconds": seconds}
    result = run(config, folder)
    found = {
        "cell": dataclasses.asdict(cell),
        "accuracy": result.accuracy.to_dict(),
        "validation": [line["accuracy"]["own_key"] for line in result.validation],
        "mixes": on_own_mix(config, folder, result.shared),
        "settled_mixes": on_own_mix(config, folder, result.shared, settle=SETTLE),
        "seconds": round(time.process_time() - started, 1),
    }
    shutil.rmtree(folder)  # keys and private states are of no further use
    return found


def asked(block: str, seeds: int, arms: str | None) -> list[Cell]:
    """The runs of a block, or those of ``arms``."""
    names = arms.split(",") if arms else None
    return [c for c in cells_of(block, seeds) if not names or c.arm.partition(",")[0] in names]


def main() -> None:
    """Runs what is missing and writes results/pad.json and .md after every block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="comma-separated")
    parser.add_argument("--arms", help="what their names begin with; others stay as they are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "pad")
    args = parser.parse_args()
    plan = {block: asked(block, args.seeds, args.arms) for block in args.blocks.split(",")}
    cost = sum(cell.cost for cells in plan.values() for cell in cells)
    say(f"cost: about {cost / 60 / args.processes:.0f} minutes on {args.processes} idle cores")
    path = args.out / "pad.json"
    known = json.loads(path.read_text())["blocks"] if path.exists() else {}
    document: dict[str, Any] = {"blocks": {b: known[b] for b in BLOCKS if b in known}}
    for block, cells in plan.items():
        found = run_cells(
            {c.name: (c, str(args.scratch)) for c in cells},
            work,
            args.scratch / "cells",
            processes=args.processes,
            costs={c.name: c.cost for c in cells},
        )
        arms = {
            arm: summarize([r for r in found.values() if r["cell"]["arm"] == arm])
            for arm in dict.fromkeys(c.arm for c in cells)
        }
        command = f"python studies/pad.py --blocks {block} --seeds {args.seeds}"
        made = provenance(command + (f" --arms {args.arms}" if args.arms else ""))
        before = document["blocks"].get(block) if args.arms else None
        order = [c.arm for c in cells_of(block, args.seeds)]
        document["blocks"][block] = joined(before, {**made, "arms": arms}, order)
        write(path, document)
        (args.out / "pad.md").write_text(markdown(json.loads(json.dumps(document))))
        say(f"{block}: wrote {args.out / 'pad.md'}")


if __name__ == "__main__":
    main()
