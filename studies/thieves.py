"""What a lock leaves to a thief with a few labels: `python studies/thieves.py`.

The thief of science.md's claim b: an outsider with the global model, the public lock spec and k
labelled images a class. It trains secrets of its own, everything, or first those and then
everything; each at several learning rates. What counts is its *advantage over training from
scratch*: the same network with ordinary norms, from random weights, on the same images, in as many
steps, at the same rates. Rate and way are the best on the first draw of labelled images, by test
images, for the thief and for scratch alike; figures are means over the draws.

Controls: ``norm`` (nothing private: the model as it is), ``fedbn`` (private norms without a key),
and the channel lock, against which the thief is known to work. Without them a small advantage
could be the thief's weakness.

Settings of the federations are those of studies/pad.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy import interval
from cells import merged, provenance, run_cells, say, table, write
from padarms import LENET, ONE_KEY, ONE_SEALED, RESNET, SEALED_SIGNS, VIT, settings_of
from padtables import of_all

ROOT = Path(__file__).resolve().parent.parent
DRAWS = {1: 5, 10: 2, 100: 1}  # labels a class: how many draws of them
STEPS, BATCH, TEST_IMAGES = 300, 64, 2_000
AS_IT_IS = "as it is"
WAYS = ("own secrets", "everything", "secrets, then everything")
SCRATCH = "from scratch"

LOCKS: dict[str, dict[str, Any]] = {
    SCRATCH: {"name": "norm"},
    "norm": {"name": "norm"},
    "fedbn": {"name": "fedbn"},
    "channel": {"name": "channel"},
    "pad": {"name": "pad"},
    "pad, shared head": {"name": "pad", "head": False},
    "pad of one key": ONE_KEY,
    "one key sealed": ONE_SEALED,
    "sealed signs": SEALED_SIGNS,
    "pad, behind stage 2": {"name": "pad", "behind": "layer2"},
}


@dataclass(frozen=True)
class Part:
    """One model: its federation, the arms, learning rates to try, seeds, seconds of a cell."""

    settings: dict[str, Any]
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    cost: float


ALL = (SCRATCH, "norm", "fedbn", "channel", "pad")
PARTS: dict[str, Part] = {
    "lenet": Part(
        LENET,
        (*ALL, "pad of one key", "one key sealed", "pad, shared head"),
        (0.001, 0.003, 0.01),
        5,
        120.0,
    ),
    "vit": Part(merged(LENET, VIT), ALL, (0.001, 0.003, 0.01), 3, 250.0),
    "resnet20": Part(
        merged(LENET, RESNET),
        (*ALL, "pad of one key", "sealed signs", "pad, behind stage 2"),
        (0.003, 0.01),
        3,
        500.0,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One federation and what a thief makes of it, or the same images without one."""

    part: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """File name of the result."""
        return f"{self.part}_{self.arm.replace(' ', '-').replace(',', '')}_seed{self.seed}"


def cells_of(part: str, arms: str | None = None) -> list[Cell]:
    """The runs of a part, or those of ``arms``, which are separated by semicolons."""
    names = arms.split(";") if arms else PARTS[part].arms
    if strange := [name for name in names if name not in PARTS[part].arms]:
        raise SystemExit(f"{part} has no arms {strange}; expected some of {PARTS[part].arms}.")
    seeds = range(PARTS[part].seeds)
    return [Cell(part, arm, seed) for seed in seeds for arm in PARTS[part].arms if arm in names]


def work(name: str, job: tuple[Cell, str]) -> dict[str, Any]:
    """Runs one cell in a process of its own."""
    from fedkl.federation import config_from, run
    from fedkl.federation.session import load_data

    cell, scratch = job
    part = PARTS[cell.part]
    settings = merged(part.settings, {**settings_of(LOCKS[cell.arm]), "seed": cell.seed})
    config = config_from(settings, source=name)
    started, bundle = time.process_time(), load_data(config)
    if cell.arm == SCRATCH:
        makers = {"everything": lambda: fresh(config)}
        found = {"accuracy": None, **_of(makers, bundle, config.seed, part.rates)}
    else:
        folder = Path(scratch) / name
        shutil.rmtree(folder, ignore_errors=True)
        result = run(config, folder, bundle=bundle)
        victims = _victims(config, folder, bundle, result.shared)
        secrets = victims.secrets(victims.public_model())
        makers = dict.fromkeys((AS_IT_IS, *(WAYS if secrets else WAYS[1:2])), victims.public_model)
        tries = _of(makers, bundle, config.seed, part.rates, secrets)
        found = {"accuracy": result.accuracy.own_key, **tries}
        shutil.rmtree(folder)
    return {"cell": asdict(cell), **found, "seconds": round(time.process_time() - started, 1)}


def _victims(config: Any, folder: Path, bundle: Any, shared: Any) -> Any:
    from fedkl.audit.config import AuditConfig
    from fedkl.audit.victims import Victims

    return Victims(config, folder, bundle, AuditConfig(run=config), shared=shared)


def fresh(config: Any) -> Any:
    """The architecture with ordinary norms where locks would stand, from random weights."""
    import torch

    from fedkl.locking import lock
    from fedkl.models import build
    from fedkl.rng import derive

    channels, size = config.data.channels, config.data.image_size
    plain = build(
        config.model.name,
        num_classes=10,
        channels=channels,
        image_size=size,
        generator=derive(config.seed, "scratch"),
    )
    example = torch.zeros(4, channels, size, size)
    return lock(plain, None, scheme="norm", layers="all", example=example)


def _of(
    makers: dict[str, Any], bundle: Any, seed: int, rates: tuple[float, ...], secrets: Any = ()
) -> dict[str, Any]:
    """Accuracies by labels a class: the best way and rate of the first draw, on every draw."""
    import torch

    test = bundle.test.batch(torch.arange(TEST_IMAGES))
    found: dict[str, Any] = {}
    for k, draws in DRAWS.items():
        images = [drawn(bundle.public, k, seed, draw) for draw in range(draws)]

        def score(way: str, rate: float, draw: int, images: Any = images) -> float:
            return trained(makers[way](), way, secrets, images[draw], test, rate)

        tried = {
            (way, rate): score(way, rate, 0)
            for way in makers
            for rate in (rates if way != AS_IT_IS else (0.0,))
        }
        way, rate = max(tried, key=lambda pair: tried[pair])
        values = [tried[way, rate], *(score(way, rate, draw) for draw in range(1, draws))]
        found[str(k)] = {
            "draws": values,
            "way": way,
            "rate": rate,
            "first_draw": {f"{w}, {r:g}": value for (w, r), value in tried.items()},
        }
    return {"labels": found}


def drawn(public: Any, k: int, seed: int, draw: int) -> Any:
    """k labelled public images a class, the same for every arm."""
    import torch

    from fedkl.rng import derive

    order = torch.randperm(len(public), generator=derive(seed, "labels of a thief", k, draw))
    labels = public.labels[order]
    rows = torch.cat([order[labels == c][:k] for c in labels.unique()])
    return public.batch(rows)


def trained(model: Any, way: str, secrets: Any, images: Any, test: Any, rate: float) -> float:
    """Accuracy of ``model`` after training on ``images`` with Adam and a cosine schedule.

    A thief classifies many images at once, so the statistics of the test batches count.
    """
    import torch

    from fedkl.rng import derive

    generator = derive(0, "thief", len(images[1]))
    everything = list(model.parameters())
    own = [p for n, p in model.named_parameters() if n in set(secrets)]
    half = STEPS // 2
    phases = {
        AS_IT_IS: [],
        "own secrets": [(own, STEPS)],
        "everything": [(everything, STEPS)],
        "secrets, then everything": [(own, half), (everything, STEPS - half)],
    }[way]
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.reset_running_stats()
    model.train()
    for parameters, steps in phases:
        _fit(model, parameters, images, steps, rate, generator)
    with torch.inference_mode():
        parts = zip(torch.split(test[0], 500), torch.split(test[1], 500), strict=True)
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in parts)
    return right / len(test[1])


def _fit(
    model: Any, parameters: list[Any], images: Any, steps: int, rate: float, generator: Any
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randperm(len(images[1]), generator=generator)[:BATCH]
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images[0][rows]), images[1][rows]).backward()
        optimizer.step()
        schedule.step()


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one part by arm, over seeds; the advantage is paired with scratch by seed."""
    arms: dict[str, Any] = {}
    for one in results:
        cell = one["cell"]
        arm = arms.setdefault(cell["arm"], {"seeds": [], "accuracy": [], AS_IT_IS: []})
        arm["seeds"].append(cell["seed"])
        arm["accuracy"].append(one["accuracy"])
        arm[AS_IT_IS].append(one["labels"]["1"]["first_draw"].get(f"{AS_IT_IS}, 0"))
        for k, found in one["labels"].items():
            entry = arm.setdefault(k, {"draws": [], "ways": []})
            entry["draws"].append(found["draws"])
            entry["ways"].append(f"{found['way']}, {found['rate']:g}")
    return arms


def means(entry: dict[str, Any]) -> list[float]:
    """Mean over the draws of every seed."""
    return [sum(draws) / len(draws) for draws in entry["draws"]]


def markdown(document: dict[str, Any]) -> str:
    """The tables of results/thief.md."""
    about = [
        f"- {part}: `{block['command']}` at commit {block['commit']}, {block['date']}"
        f"{block.get('note', '')}"
        for part, block in document.items()
    ]
    parts = [
        "# A thief with a few labels\n",
        "\n".join(about) + "\n",
        "Percent of 2,000 test images, mean ± 95 % interval over seeds (Student's t). *Thief*: an "
        "outsider with the global model, the lock spec and so many labelled images a class, who "
        "trains secrets of its own, everything, or the one and then the other, at the best of "
        f"several rates. *Over scratch*: points more than {SCRATCH} on the same images, paired by "
        "seed: what the stolen model is worth. *As it is*: without labels, batch statistics. Way "
        "and rate are the best on the first draw of labels, by the same test images: of up to ten "
        "tries for the thief and three from scratch, which favours the thief.\n",
    ]
    for part, block in document.items():
        scratch = block["arms"].get(SCRATCH)
        rows = []
        for arm, figures in block["arms"].items():
            row = [arm, *(of_all(figures[name]) for name in ("accuracy", AS_IT_IS))]
            for k in map(str, DRAWS):
                row.append(interval(means(figures[k])))
                row.append("" if arm == SCRATCH or scratch is None else over(figures, scratch, k))
            rows.append([*row, str(len(figures["seeds"]))])
        header = ["arm", "own key", "as it is"]
        for k in DRAWS:
            header += [f"{k} a class", "over scratch"]
        parts.append(f"## {part}\n\n{table([*header, 'seeds'], rows)}\n")
    return "\n".join(parts)


def over(figures: dict[str, Any], scratch: dict[str, Any], k: str) -> str:
    """Advantage over scratch in points, paired by seed."""
    base = dict(zip(scratch["seeds"], means(scratch[k]), strict=True))
    pairs = zip(figures["seeds"], means(figures[k]), strict=True)
    text = interval([value - base[seed] for seed, value in pairs])
    return text if text.startswith("-") else f"+{text}"


def _said(arms: str | None) -> str:
    return f' --arms "{arms}"' if arms else ""


def main() -> None:
    """Runs what is missing and writes results/thief.json and .md after every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--arms", help="separated by semicolons; others stay as they are")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "thief")
    args = parser.parse_args()
    names = args.parts.split(",")
    cost = sum(PARTS[name].cost * len(cells_of(name, args.arms)) for name in names)
    say(f"cost: about {cost / 60 / args.processes:.0f} minutes on {args.processes} idle cores")
    path = args.out / "thief.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in names:
        cells = cells_of(part, args.arms)
        found = run_cells(
            {c.name: (c, str(args.scratch)) for c in cells},
            work,
            args.scratch / "cells",
            processes=args.processes,
            costs={c.name: PARTS[part].cost for c in cells},
        )
        made = provenance(f"python studies/thieves.py --parts {part}" + _said(args.arms))
        arms = summarize(list(found.values()))
        if args.arms and part in document:
            arms = {**document[part]["arms"], **arms}
            made = {**document[part], "note": f"; again `{made['command']}` at {made['commit']}"}
        ordered = {arm: arms[arm] for arm in PARTS[part].arms if arm in arms}
        document[part] = {**made, "arms": ordered}
        document = {name: document[name] for name in PARTS if name in document}
        write(path, document)
        (args.out / "thief.md").write_text(markdown(document))
        say(f"{part}: wrote {args.out / 'thief.md'}")


if __name__ == "__main__":
    main()
