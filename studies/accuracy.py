"""What a lock costs in accuracy and what its key is worth: `make reproduce-accuracy`.

Four blocks, every arm paired by seed with the same data, partition, batches and initial weights:

lenet-fashion, lenet-mnist, resnet20-fashion
    centralized and FedAvg, without a lock, with the ordinary norm a lock would stand on (norm),
    with that norm private and keyless (fedbn), and locked (channel).
spread
    LeNet on Fashion-MNIST, the lock's spread and layers varied.
clients
    LeNet on Fashion-MNIST, the same 30,000 images over 3, 10 and 100 clients.

The learning rate of every arm is chosen on validation images with a seed of its own (in the
blocks spread and clients it is 0.05 throughout). The test set is read once per cell. Keys are fresh
from the operating system in every cell: figures repeat within their intervals, not to the digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import merged, provenance, run_cells, say, table, write

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 1000
PAPER = {
    "lenet-mnist": {
        "centralized": 0.9809,
        "centralized+channel": 0.9807,
        "none": 0.9814,
        "channel-paper": 0.9745,
    },
}

ARMS: dict[str, dict[str, Any]] = {
    "centralized": {"federation": {"method": "centralized"}},
    "centralized+channel": {
        "federation": {"method": "centralized"},
        "defense": {"name": "channel"},
    },
    "none": {},
    "norm": {"defense": {"name": "norm"}},
    "fedbn": {"defense": {"name": "fedbn"}},
    "channel": {"defense": {"name": "channel"}},
    "channel-first": {"defense": {"name": "channel", "layers": "first"}},
    "channel-paper": {"defense": {"name": "channel", "preset": "paper"}},
}


@dataclass(frozen=True)
class Block:
    """A model on a data set.

    ``seconds`` is what one round of 30,000 (LeNet) or 12,000 (ResNet-20) images takes on one core.
    ``seeds`` is a ceiling.
    """

    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    rounds: int
    tuning_rounds: int
    rates: tuple[float, ...]
    plain_rates: tuple[float, ...]
    seconds: float
    seeds: int = 99


def _variants() -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {"norm": ARMS["norm"]}
    for layers, spreads in (("all", (0.3, 1.0, 3.0, 5.0)), ("first", (1.0, 3.0))):
        for spread in spreads:
            lock = {"name": "channel", "layers": layers, "spread": spread}
            arms[f"channel-{layers}-{spread:g}"] = {"defense": lock}
    return arms


def _crowds() -> dict[str, dict[str, Any]]:
    arms = {}
    for clients in (3, 10, 100):
        for name in ("norm", "fedbn", "channel"):
            arms[f"{name}-{clients}"] = {
                **ARMS[name],
                "federation": {"clients": clients},
                "data": {"samples": 30_000 // clients},
            }
    return arms


COSINE = {"schedule": "cosine"}
LENET = {
    "model": {"name": "lenet"},
    "data": {"dataset": "fashion-mnist", "samples": 10_000, "channels": 1},
    "training": COSINE,
}
RESNET = {
    "model": {"name": "resnet20"},
    "data": {"dataset": "fashion-mnist", "samples": 4_000, "image_size": 16, "channels": 1},
    "training": COSINE,
}
MNIST = {**LENET, "data": {**LENET["data"], "dataset": "mnist"}}
# ResNet-20 has a norm behind every convolution: none and norm are the same network.
DEEP = {n: a for n, a in ARMS.items() if n not in ("none", "channel-first", "channel-paper")}
BLOCKS: dict[str, Block] = {
    "lenet-fashion": Block(
        LENET, ARMS, 10, 4, (0.01, 0.02, 0.05, 0.1), (0.01, 0.03, 0.1, 0.3), 3.0
    ),
    "resnet20-fashion": Block(RESNET, DEEP, 10, 2, (0.03, 0.1), (0.03, 0.1), 9.0),
    "lenet-mnist": Block(MNIST, ARMS, 6, 3, (0.02, 0.05), (0.01, 0.03), 3.0),
    "spread": Block(LENET, _variants(), 10, 4, (0.05,), (), 3.0, seeds=2),
    "clients": Block(LENET, _crowds(), 10, 4, (0.05,), (), 3.0, seeds=2),
}


@dataclass(frozen=True)
class Cell:
    """One run: everything it takes to repeat it."""

    block: str
    arm: str
    seed: int
    lr: float
    tuning: bool

    @property
    def name(self) -> str:
        """File name of the result."""
        kind = "tune" if self.tuning else "cell"
        return f"{kind}_{self.block}_{self.arm}_lr{self.lr:g}_seed{self.seed}"

    @property
    def plain(self) -> bool:
        """Without norms LeNet sits on a plateau for rounds: fewer of them tell nothing."""
        return "defense" not in BLOCKS[self.block].arms[self.arm]

    @property
    def cost(self) -> float:
        """Expected seconds on one core."""
        block = BLOCKS[self.block]
        return block.seconds * (block.tuning_rounds if self.tuning else block.rounds + 3)

    def settings(self, mnist: str | None) -> dict[str, Any]:
        """Nested settings of the run."""
        block = BLOCKS[self.block]
        found = merged(block.settings, block.arms[self.arm])
        rounds = block.tuning_rounds if self.tuning and not self.plain else block.rounds
        found = merged(
            found,
            {
                "seed": self.seed,
                "training": {"lr": self.lr},
                "federation": {"rounds": rounds},
                "evaluation": {"every": rounds, "wrong_keys": 1} if self.tuning else {"every": 0},
            },
        )
        if found["data"]["dataset"] == "mnist" and mnist:
            found["data"]["root"] = mnist
        return found


def work(name: str, job: tuple[Cell, str | None, str]) -> dict[str, Any]:
    """Runs one cell in a process of its own; an interrupted one goes on where it stopped."""
    from fedkl.errors import CheckpointError
    from fedkl.federation import config_from, run

    cell, mnist, scratch = job
    config = config_from(cell.settings(mnist), source=name)
    folder = Path(scratch) / name
    started = time.process_time()
    try:
        result = run(config, folder, resume=(folder / "config.json").exists())
    except CheckpointError:
        shutil.rmtree(folder)
        result = run(config, folder)
    shutil.rmtree(folder)  # keys and private states are of no further use
    return {
        "cell": dataclasses.asdict(cell),
        "accuracy": result.accuracy.to_dict(),
        "validation": result.best.get("own_key"),
        "data": result.origin,
        "seconds": round(time.process_time() - started, 1),
    }


def tuning_cells(name: str) -> list[Cell]:
    """Every arm of a block at every rate; none where there is only one to choose from."""
    block = BLOCKS[name]
    cells = []
    for arm, settings in block.arms.items():
        rates = _rates(block, settings)
        cells += [Cell(name, arm, TUNING_SEED, lr, True) for lr in rates if len(rates) > 1]
    return cells


def _rates(block: Block, settings: dict[str, Any]) -> tuple[float, ...]:
    # A network without norms takes higher rates than one with them.
    return block.plain_rates if "defense" not in settings else block.rates


def final_cells(name: str, seeds: int, rates: dict[str, float]) -> list[Cell]:
    """Every arm of a block at its chosen rate and every seed."""
    arms = BLOCKS[name].arms
    return [
        Cell(name, arm, seed, rates[arm], False)
        for arm in arms
        for seed in range(min(seeds, BLOCKS[name].seeds))
    ]


def estimate(name: str, seeds: int) -> float:
    """Expected seconds of a block on one core."""
    block = BLOCKS[name]
    tuning = sum(cell.cost for cell in tuning_cells(name))
    return tuning + len(block.arms) * min(seeds, block.seeds) * block.seconds * (block.rounds + 3)


def best_rates(name: str, tuned: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rate with the highest validation accuracy, for every arm."""
    block = BLOCKS[name]
    best = {arm: (-1.0, _rates(block, s)[0]) for arm, s in block.arms.items()}
    for result in tuned.values():
        arm, found = result["cell"]["arm"], (result["validation"], result["cell"]["lr"])
        best[arm] = max(best[arm], found)
    return {arm: lr for arm, (_, lr) in best.items()}


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % Student interval, in percent."""
    from fedkl.metrics import mean_interval

    mean, half = mean_interval(values)
    return f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one arm over its seeds."""
    accuracies = [r["accuracy"] for r in results]
    wrong = [w for a in accuracies for w in a["wrong_keys"]]
    thief = sorted({name for a in accuracies for name in a["thief"]})
    return {
        "lr": results[0]["cell"]["lr"],
        "own_key": [a["own_key"] for a in accuracies],
        "wrong_key": [a["wrong_key"] for a in accuracies if a["wrong_key"] is not None],
        "wrong_key_p95": statistics.quantiles(wrong, n=20)[-1] if len(wrong) > 1 else None,
        "other_client": [a["other_client"] for a in accuracies if a["other_client"] is not None],
        "no_lock": [a["no_lock"] for a in accuracies],
        "outsider": [a["outsider"] for a in accuracies],
        "thief": {n: [a["thief"][n] for a in accuracies] for n in thief},
    }


def paired(block: dict[str, Any], arm: str, against: str) -> tuple[str, float | None]:
    """Difference in own-key accuracy by seed, in points, and the lower end of its interval.

    Over the seeds that both have: every arm's are counted from 0.
    """
    from fedkl.metrics import paired_interval

    ours, theirs = block[arm]["own_key"], block[against]["own_key"]
    both = min(len(ours), len(theirs))
    mean, half = paired_interval(ours[:both], theirs[:both])
    if half is None:
        return f"{100 * mean:+.1f}", None
    return f"{100 * mean:+.1f} ± {100 * half:.1f}", 100 * (mean - half)


def markdown(document: dict[str, Any]) -> str:
    """The tables."""
    parts = [
        "# Accuracy, and what the key is worth\n",
        f"`{document['command']}` at commit {document['commit']}, {document['date']}; "
        f"{document['cost']}. Percent of the test set, mean ± 95 % interval over "
        f"{document['seeds']} seeds (Student's t; 2 for spread and clients). *Wrong key*: own "
        "lock weights, ten fresh keys a client. *Outsider*: the global model with γ = ±1, β = 0, "
        "statistics re-estimated or not, the best. *No lock*: the best thief if insiders count, "
        "who have the other clients' mean lock or the group key. *Other client*: another "
        "client's key and lock. "
        "Without a lock anyone can use the model.\n",
    ]
    for name, block in document["blocks"].items():
        parts.append(f"## {name}\n\n{_describe(name)}\n\n{_block_table(name, block)}\n")
    return "\n".join(parts)


def _describe(name: str) -> str:
    block = BLOCKS[name]
    data = block.settings["data"]
    return (
        f"{block.settings['model']['name']} on {data['dataset']}, "
        f"{data.get('image_size', 32)}×{data.get('image_size', 32)}, 3 clients IID × "
        f"{data['samples']:,} images unless said otherwise, {block.rounds} rounds."
    )


def _block_table(name: str, block: dict[str, Any]) -> str:
    paper = PAPER.get(name, {})
    rows = []
    for arm, figures in block.items():
        crowd = arm.rpartition("-")[2] if name == "clients" else ""
        against = f"norm-{crowd}" if crowd else "norm"
        if arm == "centralized+channel":
            against = "centralized"
        versus = "" if arm == against or arm == "centralized" else paired(block, arm, against)[0]
        p95 = figures["wrong_key_p95"]
        rows.append(
            [
                arm,
                f"{figures['lr']:g}",
                interval(figures["own_key"]),
                versus,
                interval(figures["wrong_key"]) if figures["wrong_key"] else "–",
                f"{100 * p95:.1f}" if p95 is not None else "–",
                interval(figures["outsider"]),
                interval(figures["no_lock"]),
                interval(figures["other_client"]) if figures["other_client"] else "–",
                f"{100 * paper[arm]:.2f}" if arm in paper else "–",
            ]
        )
    header = ["arm", "lr", "own key", "− norm (centralized)", "wrong key", "p95", "outsider"]
    return table([*header, "no lock", "other client", "paper"], rows)


def main() -> None:
    """Runs what is missing and writes results/accuracy.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "accuracy")
    args = parser.parse_args()
    blocks = args.blocks.split(",")
    folder = ROOT / ".data" / "mnist"
    mnist = str(folder) if folder.is_dir() else None
    if mnist is None and "lenet-mnist" in blocks:
        say(f"{folder} is not here (make reproduce-accuracy fetches it); lenet-mnist is left out")
        blocks.remove("lenet-mnist")
    cost = sum(estimate(block, args.seeds) for block in blocks) / 60 / args.processes
    say(f"cost: about {cost:.0f} minutes on {args.processes} idle cores")

    def all_of(cells: list[Cell]) -> dict[str, dict[str, Any]]:
        return run_cells(
            {c.name: (c, mnist, str(args.scratch)) for c in cells},
            work,
            args.scratch / "cells",
            processes=args.processes,
            costs={c.name: c.cost for c in cells},
        )

    document = {
        **provenance(f"python studies/accuracy.py --blocks {args.blocks} --seeds {args.seeds}"),
        "cost": f"about {cost:.0f} minutes on {args.processes} idle cores",
        "seeds": args.seeds,
        "tuning": {},
        "blocks": {},
    }
    for block in blocks:
        tuned = all_of(tuning_cells(block))
        found = all_of(final_cells(block, args.seeds, best_rates(block, tuned)))
        document["tuning"] |= {
            n: {"validation": r["validation"], **r["cell"]} for n, r in tuned.items()
        }
        document["blocks"][block] = {
            arm: summarize([r for r in found.values() if r["cell"]["arm"] == arm])
            for arm in BLOCKS[block].arms
        }
        write(args.out / "accuracy.json", document)
        (args.out / "accuracy.md").write_text(markdown(json.loads(json.dumps(document))))
        say(f"{block}: wrote {args.out / 'accuracy.md'}")


if __name__ == "__main__":
    main()
