"""What noise and pruning cost and hide, beside a pad: `python studies/baselines.py`.

LeNet on Fashion-MNIST, 3 clients IID x 6,000 images, 10 rounds of fedavg, as `lenet-iid` of
studies/pad.py. Arms: *norm*, the control; *norm+noise*, where clients clip what they send to an L2
norm of 2.5 and add noise of so many times that to every entry; *norm+prune*, where of every tensor
the largest entries of the change alone are sent; *pad*. Accuracy is over all seeds, paired with
norm's by seed.

Then what single images leak, of the first seed's final model: 1,000 test images, each in an update
of its own, which is one gradient, clipped, noised or pruned as the client does it. *replay* and
*replay-relations* are those of `fedkl audit`, which train what is private on public images; where
nothing is, *replay* weighs noised gradients as *nearest* does. *nearest* has nothing to train: of
the 100 candidates it takes the one whose gradient, clipped and pruned alike, is nearest to what was
sent. Against white noise on a network that is all public no way to choose is better. Under a pad it
is for the key holder alone. The control is norm, where all three should find every image. *Length*:
the median of what single images give, before the noise; *noise*: how long the noise is on average.
Clip and noise are of the same numbers in an epoch's change, some 2.5 long, as in a single gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy import interval, paired
from cells import merged, provenance, run_cells, say, table, write
from padarms import LENET

ROOT = Path(__file__).resolve().parent.parent
CLIP = 2.5
MULTIPLIERS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
RATIOS = (0.9, 0.99, 0.999)
ARMS: dict[str, dict[str, Any]] = {
    "norm": {"name": "norm"},
    **{
        f"norm+noise {z:g}": {"name": "norm+noise", "clip": CLIP, "noise_multiplier": z}
        for z in MULTIPLIERS
    },
    **{f"norm+prune {r:g}": {"name": "norm+prune", "prune_ratio": r} for r in RATIOS},
    "pad": {"name": "pad"},
}
PICKING = ("replay", "replay-relations")
HELD = ("open", "key-shared")  # threat models under which nothing is unknown
VICTIMS, CANDIDATES = 1_000, 100
TRAINING = 40.0  # seconds of a core
ATTACKING = {"pad": 300.0}
USUALLY = 80.0


@dataclass(frozen=True)
class Cell:
    """One federation, and what is tried on it: nothing where there are no victims."""

    arm: str
    seed: int
    settings: dict[str, Any]
    victims: int
    candidates: int = CANDIDATES
    effort: str = "standard"

    @property
    def name(self) -> str:
        """File name of the result."""
        return f"{self.arm.replace(' ', '-')}_seed{self.seed}_victims{self.victims}"

    @property
    def cost(self) -> float:
        """Seconds of one core."""
        spent = ATTACKING.get(self.arm, USUALLY) * self.victims / VICTIMS
        return TRAINING + spent


def cells_of(seeds: int, victims: int) -> list[Cell]:
    """A federation for each arm and seed; the first of each arm is attacked."""
    return [
        Cell(arm, seed, merged(LENET, {"defense": lock}), victims if seed == 0 else 0)
        for arm, lock in ARMS.items()
        for seed in range(seeds)
    ]


def work(name: str, job: tuple[Cell, str]) -> dict[str, Any]:
    """Trains one federation in a process of its own, and attacks it."""
    import torch

    from fedkl.federation import config_from, run

    torch.set_num_threads(1)
    cell, scratch = job
    config = config_from({**cell.settings, "seed": cell.seed}, source=name)
    folder = Path(scratch) / name
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    accuracy = run(config, folder).accuracy.to_dict()
    trained = time.process_time()
    found = {"cell": dataclasses.asdict(cell), "own_key": accuracy["own_key"]}
    if cell.victims:
        found |= {"identified": attacked(cell, config, folder)}
    shutil.rmtree(folder)  # keys and private states are of no further use
    seconds = {"training": trained - started, "attacks": time.process_time() - trained}
    return {**found, "seconds": {what: round(spent, 1) for what, spent in seconds.items()}}


def attacked(cell: Cell, config: Any, folder: Path) -> list[dict[str, Any]]:
    """Of every threat model: rates of every way to pick one of the candidates."""
    from fedkl.audit import AuditConfig
    from fedkl.audit.arsenal import applicable
    from fedkl.audit.measure import truth_of
    from fedkl.audit.observe import observe
    from fedkl.audit.victims import Victims, draw_victims
    from fedkl.federation.session import load_data

    audit = AuditConfig(
        run=config,
        defenses=(config.defense.name,),
        attacks=PICKING,
        images=cell.victims,
        candidates=cell.candidates,
        effort=cell.effort,
    )
    bundle = load_data(config)
    victims = Victims(config, folder, bundle, audit)
    rows = draw_victims(bundle, audit)
    truth = truth_of(bundle, rows, audit)
    sent = [victims.send(one) for one in rows]
    found = []
    for threat in applicable(audit.threats, victims):
        seen = observe(victims, sent, threat)
        one: dict[str, Any] = {"threat": threat.name, "victims": len(seen)}
        for way in PICKING:
            one |= _picked(way, threat, audit, bundle, folder, seen, truth)
        if threat.name in HELD:
            one |= nearest(seen, truth, bundle)
        found.append(one)
    return found


def _picked(way: str, threat: Any, audit: Any, bundle: Any, folder: Path, *of: Any) -> Any:
    """How often the attack's own score is highest for the truth; who is left out is not found."""
    import torch

    from fedkl.audit.arsenal import Arsenal
    from fedkl.audit.cells import on_each
    from fedkl.audit.measure import picked, subset
    from fedkl.rng import derive

    seen, truth = of
    attack = Arsenal(audit, bundle, folder, lambda *_: None).attack(way, threat, seen[0])
    made, failed = on_each(attack, seen, lambda: derive(audit.run.seed, "attack", way))
    hits = picked(list(made.values()), subset(truth, torch.tensor(sorted(made))))
    return {way: float(hits.sum()) / len(seen), f"{way}, left out": len(failed)}


def nearest(seen: Any, truth: Any, bundle: Any) -> dict[str, Any]:
    """How often the true image's gradient is the nearest of the candidates'; and lengths.

    The likelihood of white noise, where nothing is unknown but the image.
    """
    import torch
    from torch import Tensor

    from fedkl.attacks.adaptive.shadow_client import ShadowClient
    from fedkl.attacks.network import Network

    network, first = Network.of(seen), seen[0]
    held = {name: first.known[name] for name in network.secrets}
    client = ShadowClient(network, held, first.num_classes)

    def flat(parts: Any) -> Tensor:
        return torch.cat([parts[n].flatten(1) for n in network.names], dim=1)

    def gradients(images: Tensor, label: int) -> Tensor:
        labels = torch.full((len(images),), label)
        return torch.cat([flat(chunk) for chunk in client.gradients(images, labels)])

    hits, lengths = 0, []
    changes = [{n: one.changes[0][n][None] for n in network.names} for one in seen]
    for label in truth.labels.unique().tolist():
        mine = (truth.labels == label).nonzero().flatten()
        own = gradients(truth.images[mine], label)
        lengths.append(own.norm(dim=1))
        places, where = truth.decoys[mine].unique(return_inverse=True)
        others = gradients(truth.pool[places], label)
        for i, victim in enumerate(mine.tolist()):
            told = flat(changes[victim])
            far = (others[where[i]] - told).square().sum(dim=1)
            hits += int((own[i] - told).square().sum() < far.min())
    size = sum(value.numel() for value in network.shared.values())
    return {
        "nearest": hits / len(seen),
        "length": float(torch.cat(lengths).median()),
        "noise": first.training.noise * size**0.5,
    }


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one arm, by seed."""
    results = sorted(results, key=lambda r: r["cell"]["seed"])
    (identified,) = [r["identified"] for r in results if "identified" in r] or [[]]
    return {
        "own_key": [r["own_key"] for r in results],
        "identified": identified,
        "settings": results[0]["cell"]["settings"]["defense"],
        "seconds": [r["seconds"] for r in results],
    }


def markdown(document: dict[str, Any]) -> str:
    """The tables."""
    arms = document["arms"]
    costs, leaks = [], []
    for arm, figures in arms.items():
        own = [interval(figures["own_key"]), str(len(figures["own_key"]))]
        versus = "" if arm == "norm" or "norm" not in arms else paired(arms, arm, "norm")[0]
        costs.append([arm, own[0], versus, own[1]])
        for one in figures["identified"]:
            rates = [_percent(one.get(way)) for way in (*PICKING, "nearest")]
            sizes = [f"{one[n]:.3g}" if n in one else "–" for n in ("length", "noise")]
            leaks.append([arm, one["threat"], *rates, *sizes, f"{one['victims']:,}"])
    spent = sum(sum(s.values()) for figures in arms.values() for s in figures["seconds"])
    about = "\n\n".join(" ".join(p.split()) for p in (__doc__ or "").split("\n\n")[1:])
    return "\n".join(
        [
            "# Noise and pruning\n",
            f"`{document['command']}` at commit {document['commit']}, {document['date']}; "
            f"{spent / 60:.0f} minutes of one core.\n",
            about + "\n",
            "## Accuracy\n",
            "Percent of the test set with the own key, mean ± 95 % interval over seeds (Student's "
            "t), and points to norm, paired by seed.\n",
            table(["arm", "own key", "− norm", "seeds"], costs) + "\n",
            "## Single images identified\n",
            f"Percent found among {document['candidates']} of their class, of one federation. "
            f"Chance: {100 / document['candidates']:.0f} %.\n",
            table(
                ["arm", "threat", *PICKING, "nearest", "length", "noise", "images"],
                leaks,
            )
            + "\n",
        ]
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def main() -> None:
    """Runs what is missing and writes results/baselines.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--victims", type=int, default=VICTIMS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "baselines")
    args = parser.parse_args()
    cells = cells_of(args.seeds, args.victims)
    cost = sum(cell.cost for cell in cells)
    say(f"cost: about {cost / 60 / args.processes:.0f} minutes on {args.processes} idle cores")
    found = run_cells(
        {c.name: (c, str(args.scratch)) for c in cells},
        work,
        args.scratch / "cells",
        processes=args.processes,
        costs={c.name: c.cost for c in cells},
    )
    command = f"python studies/baselines.py --seeds {args.seeds} --victims {args.victims}"
    document = {
        **provenance(command),
        "candidates": CANDIDATES,
        "arms": {
            arm: summarize([r for r in found.values() if r["cell"]["arm"] == arm])
            for arm in dict.fromkeys(c.arm for c in cells)
        },
    }
    write(args.out / "baselines.json", document)
    (args.out / "baselines.md").write_text(markdown(document))
    say(f"wrote {args.out / 'baselines.md'}")


if __name__ == "__main__":
    main()
