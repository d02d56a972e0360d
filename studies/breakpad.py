"""Attempts to break the pad: `python studies/breakpad.py`.

Victims are single test images (batch 1, one step) of one client of a trained federation on
Fashion-MNIST, 3 clients IID: LeNet, 32x32, 6,000 images a client; ResNet-20, 16x16, 4,000 images a
client; 10 rounds. Parts:

curves, resnet20
    Feed-forward attackers on the classifier's input, which the last layer's gradient gives away:
    identification among 100 images of the same class against the number of presentations under one
    pad whose statistics and labels the attacker pools. Every lock variant beside the same attack
    holding the key, and beside the channel lock, which the same code breaks. A pad keeps the head
    private by default; here it is shared.
gradient
    The same on a sketch of the whole shared gradient: with a private head there are no features.
matching
    The same by an attacker who is given the candidates and learns which of them a gradient fits
    (the attack "retrieval"), instead of drawing an image: the strongest of these attackers.
repeats
    Matching against the pads of two more federations: from n = 16 on by transport, the shadow's
    best way on the first, so that no maximum over ways is taken.
transformer
    The same on a small vision transformer, 16x16, 4,000 images a client: three federations.
depth
    The same with the first lock of ResNet-20 behind stage 2, all before it private: three
    federations.
replay
    No learning but of the secrets: the attacker repeats the step on every image in question and
    compares gradients, across pads after rotations fitted to many victims (the attack "replay").
    Three federations of each network under a pad, one under the channel lock, and one of clients
    whose channel locks start apart, as pads do; three of each under a pad of one key, which all
    clients hold, and where they seal their private layers besides: insiders are key holders.
replay-renewals
    The same over pads that are renewed every 16 presentations.
renewals
    Matching over pads that are renewed every 16 presentations, statistics pooled over all of them.
likelihood
    Someone who is given z = γ·x̂ + β itself and the client's stem: what the drawn pad alone hides.
optimizers
    Verdicts of `fedkl audit` on inverting gradients with free secrets, T updates pooled.
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

from breakpadtables import EVERY, PARTS, PRESENTATIONS, REPLAYED, markdown
from cells import merged, provenance, run_cells, say, write
from padarms import LENET, ONE_KEY, ONE_SEALED, RESNET, SEALED_SIGNS, VIT, WIDE, settings_of
from padtables import joined

ROOT = Path(__file__).resolve().parent.parent
PAD = {"name": "pad"}
OPEN_HEAD = {**PAD, "head": False}
CHANNEL = {"name": "channel"}
OWN_STARTS = {**CHANNEL, "group_key": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "channel": CHANNEL,
    "pad, shared head": OPEN_HEAD,
    "wide throughout, shared head": {**OPEN_HEAD, **WIDE},
    "first block only, shared head": {**OPEN_HEAD, "layers": "first"},
    "lock on the head's input, shared head": {**OPEN_HEAD, "lock_head_input": True},
}
STRONG = "pad, shared head, more public images"
GRADIENT = {"channel": CHANNEL, "pad": PAD, "pad, shared head": OPEN_HEAD}
MODELS: dict[str, dict[str, Any]] = {"lenet": LENET, "resnet20": merged(LENET, RESNET)}
NETWORKS = tuple(MODELS)
MODELS["vit"] = merged(LENET, VIT)
PLAIN = tuple(MODELS)
MODELS["resnet20-deep"] = merged(MODELS["resnet20"], {"defense": {"behind": "layer2"}})
APART = ("repeats", "depth", "transformer", "replay")  # elsewhere cells share trained federations
POOLED = {1: 100, 4: 25, 16: 7, 64: 2}  # updates under one lock: victims' locks
COSTS = {
    "curves": 110.0, "resnet20": 450.0, "gradient": 300.0, "matching": 500.0, "repeats": 600.0,
    "depth": 600.0, "transformer": 600.0, "replay": 400.0, "renewals": 200.0,
    "replay-renewals": 400.0, "likelihood": 200.0, "optimizers": 600.0,
}  # fmt: skip
STEPS = 10
EPOCHS = 8
LAWS = ("near-one", "normal", "wide", "sign")
SPREADS = (1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Cell:
    """One trained federation and what is tried on it."""

    part: str
    arm: str
    lock: dict[str, Any]
    victims: int
    seed: int = 0
    public: int = 2_000
    shadows: int = 3
    model: str = "lenet"

    @property
    def name(self) -> str:
        """File name of the result."""
        arm = self.arm.replace(" ", "-").replace(",", "").replace("'", "")
        return f"{self.part}_{arm}_seed{self.seed}"


def cells_of(part: str, victims: int) -> list[Cell]:
    """The cells of a part."""
    if part == "curves":
        cells = [Cell(part, arm, lock, victims) for arm, lock in VARIANTS.items()]
        strong = Cell(part, STRONG, OPEN_HEAD, 2 * victims, public=6_000)
        return [*cells[:2], strong, *cells[2:]]
    if part == "resnet20":
        return [
            Cell(part, arm, VARIANTS[arm], victims, model=part)
            for arm in ("channel", "pad, shared head")
        ]
    if part == "gradient":
        return [
            # Twice the victims where the claim is: narrower intervals.
            Cell(part, f"{model}, {arm}", lock, (1 + (arm == "pad")) * victims, model=model)
            for model in NETWORKS
            for arm, lock in GRADIENT.items()
        ]
    if part == "matching":
        return [
            Cell(part, f"{m}, {a}", lock, 2 * victims, public=4_000, shadows=2, model=m)
            for a, lock in (("pad", PAD), ("channel", CHANNEL))
            for m in NETWORKS
        ]
    if part == "repeats":
        return [
            dataclasses.replace(cell, part=part, arm=f"{cell.arm}, seed {seed}", seed=seed)
            for seed in (1, 2)
            for cell in cells_of("matching", victims)
            if cell.lock == PAD
        ]
    if part == "depth":
        kind = {"public": 4_000, "shadows": 2, "model": "resnet20-deep"}
        arm = "resnet20, pad behind stage 2"
        return [Cell(part, f"{arm}, seed {n}", PAD, 2 * victims, n, **kind) for n in range(3)]
    if part == "transformer":
        kind = {"public": 4_000, "shadows": 2, "model": "vit"}
        return [Cell(part, f"vit, pad, seed {n}", PAD, 2 * victims, n, **kind) for n in range(3)]
    if part == "replay":
        kinds = [(m, "pad", PAD, 3) for m in MODELS] + [(m, "channel", CHANNEL, 1) for m in PLAIN]
        kinds += [("resnet20", "channel of own starts", OWN_STARTS, 1)]
        kinds += [(m, "pad of one key", ONE_KEY, 3) for m in NETWORKS]
        kinds += [("lenet", "one key sealed", ONE_SEALED, 3)]
        kinds += [("resnet20", "sealed signs", SEALED_SIGNS, 3)]
        return [
            Cell(part, f"{m}, {arm}, seed {n}", lock, 2 * victims, n, 4_000, 2, m)
            for m, arm, lock, seeds in kinds
            for n in range(seeds)
        ]
    if part == "replay-renewals":
        return [Cell(part, "lenet, pad", PAD, 2 * victims, public=4_000, shadows=2)]
    if part == "renewals":
        arms = {"pad": PAD, "pad, shared head": OPEN_HEAD}
        return [Cell(part, arm, lock, victims) for arm, lock in arms.items()]
    if part == "likelihood":
        return [Cell(part, "likelihood", PAD, 200)]
    return [
        Cell(part, f"{model}, T = {t}", PAD, count, model=model)
        for model, most in (("lenet", 64), ("resnet20", 1))
        for t, count in POOLED.items()
        if t <= most
    ]


def trained(cell: Cell, scratch: Path) -> tuple[Any, Path]:
    """Settings and folder of a federation under the cell's lock, trained unless it is there."""
    from fedkl.federation import config_from, run

    over = {**settings_of(cell.lock), "evaluation": {"wrong_keys": 1}}
    config = config_from({**merged(MODELS[cell.model], over), "seed": cell.seed})
    lock = "_".join(f"{k}-{v}" for k, v in cell.lock.items())
    folder = scratch / "runs" / f"{cell.model}_{lock}_seed{cell.seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(config, folder)
    return config, folder


def work(name: str, job: tuple[Cell, str]) -> dict[str, Any]:
    """Runs one cell in a process of its own."""
    import torch

    torch.set_num_threads(1)
    cell, scratch = job
    started = time.process_time()
    parts = {
        "curves": _features,
        "resnet20": _features,
        "gradient": _gradients,
        "matching": _gradients,
        "repeats": _gradients,
        "depth": _gradients,
        "transformer": _gradients,
        "replay": _replay,
        "renewals": _renewals,
        "replay-renewals": _replay_renewals,
        "likelihood": _likelihood,
        "optimizers": _audit,
    }
    found = parts[cell.part](cell, Path(scratch))
    seconds = round(time.process_time() - started, 1)
    return {"part": cell.part, "arm": cell.arm, "lock": cell.lock, **found, "seconds": seconds}


def _features(cell: Cell, scratch: Path) -> dict[str, Any]:
    from intruders import Bench

    config, folder = trained(cell, scratch)
    bench = Bench(config, folder, cell.victims, public=cell.public)
    counts = [n for n in PRESENTATIONS if n <= cell.victims]
    return {
        "own_key": json.loads((folder / "summary.json").read_text())["accuracy"]["own_key"],
        "victims": cell.victims,
        "floor": bench.floor(),
        "key": bench.holding_the_key(),
        "shadow": bench.curves(bench.shadows(cell.shadows, EPOCHS), counts),
        "insider": bench.curves(bench.insider(), counts),
    }


def _gradients(cell: Cell, scratch: Path) -> dict[str, Any]:
    from intruders import Bench

    config, folder = trained(cell, scratch)
    matching = cell.part != "gradient"
    sketch = 2048 if matching else 1024
    bench = Bench(
        config, folder, cell.victims, public=cell.public, sketch=sketch, matching=matching
    )
    counts = [n for n in PRESENTATIONS if n <= cell.victims]
    return {
        "own_key": json.loads((folder / "summary.json").read_text())["accuracy"]["own_key"],
        "victims": cell.victims,
        "floor": bench.floor(),
        "key": bench.holding_the_key(),
        "shadow": bench.curves(bench.shadows(cell.shadows, EPOCHS), counts),
        "insider": bench.curves(bench.insider(), counts),
    }


def _renewals(cell: Cell, scratch: Path) -> dict[str, Any]:
    from intruders import Bench

    config, folder = trained(cell, scratch)
    sketch = 2048 if cell.lock.get("head") is None else None
    bench = Bench(
        config, folder, cell.victims, public=cell.public, sketch=sketch, matching=sketch is not None
    )
    return {
        "victims": cell.victims,
        "floor": bench.floor(),
        "key": bench.holding_the_key(),
        "shadow": bench.renewals(bench.shadows(cell.shadows, EPOCHS), EVERY, STEPS),
        "insider": bench.renewals(bench.insider(), EVERY, STEPS),
    }


def _replay(cell: Cell, scratch: Path) -> dict[str, Any]:
    from replayers import ReplayBench, Replayer

    config, folder = trained(cell, scratch)
    bench = ReplayBench(config, folder, cell.victims, public=cell.public, sketch=2048)
    counts = [n for n in REPLAYED if n <= cell.victims]
    shadows = bench.replayers(cell.shadows, EPOCHS)
    found = {
        "own_key": json.loads((folder / "summary.json").read_text())["accuracy"]["own_key"],
        "victims": cell.victims,
        "key": bench.rates([Replayer(bench, bench.held)], counts),
        "shadow": bench.rates(shadows, counts),
        "insider": bench.rates([Replayer(bench, bench.inside())], counts),
    }
    bench.seen = bench.shuffled()
    return {**found, "shuffled": bench.rates(shadows, counts)}


def _replay_renewals(cell: Cell, scratch: Path) -> dict[str, Any]:
    from replayers import ReplayBench, Replayer

    config, folder = trained(cell, scratch)
    bench = ReplayBench(config, folder, cell.victims, public=cell.public, sketch=2048)
    held = Replayer(bench, bench.held)
    clients = {
        "shadow": bench.replayers(cell.shadows, EPOCHS),
        "insider": [Replayer(bench, bench.inside())],
    }
    key = bench.pooled([held], bench.seen)["plain"]  # before the first renewal
    seen = bench.renewed(EVERY, STEPS)
    found = {who: bench.pooled(mine, seen) for who, mine in clients.items()}
    return {"victims": cell.victims, "floor": bench.floor(), "key": key, **found}


def _likelihood(cell: Cell, scratch: Path) -> dict[str, Any]:
    from intruders import likelihood

    config, folder = trained(cell, scratch)
    found = {
        f"{law}, spread {spread:g}": likelihood(config, folder, cell.victims, law, spread)
        for law in LAWS
        for spread in SPREADS
    }
    return {"victims": cell.victims, "identified": found}


def _audit(cell: Cell, scratch: Path) -> dict[str, Any]:
    from fedkl.audit import AuditConfig, run_audit

    config, folder = trained(cell, scratch)
    sources = {"pad": folder}
    for name in ("none", "norm", "fedbn"):
        control = dataclasses.replace(cell, lock={"name": name})
        sources[name] = trained(control, scratch)[1]
    audit = AuditConfig(
        run=config,
        defenses=("pad",),
        attacks=("inverting-gradients",),
        images=cell.victims,
        observations=int(cell.arm.rpartition(" ")[2]),
        effort="quick",
        pictured=1,
    )
    place = scratch / "audits" / cell.name
    result = run_audit(audit, place, sources=sources, resume=(place / "audit-config.json").exists())
    return {"verdict": result["verdict"], "summary": result["summary"]}


def main() -> None:
    """Runs what is missing and writes results/breakpad.json and .md after every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--arms", help="separated by semicolons; others stay as they are")
    parser.add_argument("--victims", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "breakpad")
    args = parser.parse_args()
    wanted = args.parts.split(",")
    cost = sum(COSTS[part] * len(cells_of(part, args.victims)) for part in wanted)
    say(f"cost: about {cost / 60:.0f} minutes on one idle core, training included")
    path = args.out / "breakpad.json"
    known = json.loads(path.read_text())["parts"] if path.exists() else {}
    document: dict[str, Any] = {"parts": {p: known[p] for p in PARTS if p in known}}
    for part in wanted:
        every = cells_of(part, args.victims)
        cells = [c for c in every if not args.arms or c.arm in args.arms.split(";")]
        command = f"python studies/breakpad.py --parts {part} --victims {args.victims}"
        command += f' --arms "{args.arms}"' if args.arms else ""
        found = run_cells(
            {c.name: (c, str(args.scratch)) for c in cells},
            work,
            args.scratch / "cells",
            processes=2 if part in APART else 1,
            costs={c.name: COSTS[part] for c in cells},
        )
        now = {**provenance(command), "arms": {one["arm"]: one for one in found.values()}}
        before = document["parts"].get(part) if args.arms else None
        document["parts"][part] = joined(before, now, [c.arm for c in every])
        write(path, document)
        (args.out / "breakpad.md").write_text(markdown(json.loads(json.dumps(document))))
        say(f"{part}: wrote {args.out / 'breakpad.md'}")


if __name__ == "__main__":
    main()
