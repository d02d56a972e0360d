"""What an update leaks, with and without a lock: `make reproduce-leakage`, second half.

The leakage table of the key-lock paper at our scale, and the attackers that the paper did not try.
Every figure comes out of `fedkl.audit.run_audit`, which attacks updates that the federation's own
client code made: batch 1, one step, the worst case, and in rows called *batch* and *steps* batches
of 16, one step or ten. Controls run in every audit: undefended, the ordinary norm (norm), that norm
private and keyless (fedbn), the holder of the key, and the floor, which is the mean public image of
the leaked label. Verdicts are the audit's.

Three models on Fashion-MNIST, 3 clients IID. LeNet, 1x32x32, 3 x 6,000 images, weights uniform in
±0.5 as in "Deep Leakage from Gradients" (without them LeNet without norms does not learn in so few
rounds). ResNet-20, 1x16x16, 3 x 2,000 images. *initial*: the untrained model, the paper's setting;
*final*: the model after the last round. `lenet-16` is LeNet on 1x16x16 with PyTorch's own initial
weights, 3 x 3,000 images: the recursive closed form (`peel`) takes minutes an image at 32x32.
`vit` is a small vision transformer on 1x16x16, 3 x 4,000 images, `vit-deep` the same with the first
lock behind its first block (and the controls' norm there too).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import commit, provenance, run_cells, say, write
from leakagetables import CONTROLS, contact_sheet, minutes, rows_table

from fedkl.audit import AuditConfig, run_audit
from fedkl.data import DataBundle
from fedkl.federation import RunConfig, config_from, run
from fedkl.federation.session import load_data
from fedkl.files import write_tensors
from fedkl.models import build
from fedkl.rng import derive

ROOT = Path(__file__).resolve().parent.parent

ARMS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "norm": {"name": "norm"},
    "fedbn": {"name": "fedbn"},
    "channel": {"name": "channel"},
    "paper-sigmoid": {"name": "channel", "preset": "paper-sigmoid"},
    "paper": {"name": "channel", "preset": "paper"},
    "pad": {"name": "pad"},
}
MODELS: dict[str, dict[str, Any]] = {
    "lenet": {
        "model": {"name": "lenet"},
        "data": {"dataset": "fashion-mnist", "samples": 6_000, "channels": 1},
        "federation": {"rounds": 8},
    },
    "resnet20": {
        "model": {"name": "resnet20"},
        "data": {"dataset": "fashion-mnist", "samples": 2_000, "channels": 1, "image_size": 16},
        "federation": {"rounds": 4},
    },
    "lenet-16": {
        "model": {"name": "lenet"},
        "data": {"dataset": "fashion-mnist", "samples": 3_000, "channels": 1, "image_size": 16},
        "federation": {"rounds": 3},
    },
}
MODELS["vit"] = {
    "model": {"name": "vit:tiny"},
    "data": {"dataset": "fashion-mnist", "samples": 4_000, "channels": 1, "image_size": 16},
    "federation": {"rounds": 6},
}
BEHIND = {"behind": "encoder.layers.encoder_layer_0"}
MODELS["vit-deep"] = {**MODELS["vit"], "defense": BEHIND}
# The paper's rows nearest to ours, without -> with the lock, by its own MSE, PSNR and SSIM.
PUBLISHED = {
    ("lenet", "dlg"): "MNIST: MSE 49.97 → 140.87, PSNR 32.71 → 26.64, SSIM .724 → −.003",
    ("lenet", "grnn"): "MNIST: MSE .35 → 103.46, PSNR 52.78 → 28.00, SSIM 1.0 → .108",
}


@dataclass(frozen=True)
class Audit:
    """One audit per arm; the cells of the controls are shared by all arms of a row here.

    ``images`` counts victims, whose updates are of ``batch`` images in each of ``steps``;
    ``seconds`` is what a cell takes on one idle core, about.
    """

    model: str
    stage: str
    attacks: tuple[str, ...]
    effort: str
    images: int
    arms: dict[str, tuple[str, ...]]
    seconds: float
    batch: int = 1
    steps: int = 1

    @property
    def cells(self) -> int:
        """Cells, shared ones once; a searched secret counts twice."""
        own = sum(1 + len(t) + ("adaptive" in t) for t in self.arms.values())
        return (len(CONTROLS) + 2 + own) * len(self.attacks)


ADAPTIVE = ("adaptive",)
SETTINGS = ("key-unknown", "key-regressed", "lock-gradient", "adaptive")  # the paper's, and ours
DLG, IG, GRNN, GGL = ("dlg",), ("inverting-gradients",), ("grnn",), ("ggl",)
SHADOW, PICK, REPLAY = ("shadow-label",), ("retrieval",), ("replay",)
CHANNEL, PAD = {"channel": ADAPTIVE}, {"pad": ADAPTIVE}
PAPER = {"paper-sigmoid": SETTINGS, "paper": ("key-unknown", "adaptive")}
FEW = {"paper-sigmoid": ("key-unknown", "adaptive")}
LOCKS = {**CHANNEL, "paper-sigmoid": ADAPTIVE}
AUDITS: dict[str, Audit] = {
    "lenet-initial": Audit("lenet", "initial", DLG, "quick", 20, {**CHANNEL, **PAPER, **PAD}, 45),
    "lenet-initial-grnn": Audit("lenet", "initial", GRNN, "standard", 5, FEW, 90),
    "lenet-initial-paper-effort": Audit("lenet", "initial", DLG, "paper", 1, FEW, 85),
    "lenet-final": Audit("lenet", "final", IG, "standard", 20, {**CHANNEL, **PAPER, **PAD}, 50),
    "lenet-final-shadow": Audit("lenet", "final", SHADOW, "quick", 200, {**LOCKS, **PAD}, 8),
    "lenet-final-retrieval": Audit("lenet", "final", PICK, "standard", 2000, {**LOCKS, **PAD}, 45),
    "lenet-16-final-peel": Audit("lenet-16", "final", ("peel",), "quick", 5, {**LOCKS, **PAD}, 20),
    "resnet20-final": Audit("resnet20", "final", GGL, "quick", 20, {**LOCKS, **PAD}, 80),
    "resnet20-final-shadow": Audit("resnet20", "final", SHADOW, "quick", 200, {**LOCKS, **PAD}, 30),
    "resnet20-final-retrieval": Audit(
        "resnet20", "final", PICK, "standard", 2000, {**CHANNEL, **PAD}, 65
    ),
    "vit-final-retrieval": Audit("vit", "final", PICK, "standard", 2000, {**CHANNEL, **PAD}, 40),
    "vit-deep-final-retrieval": Audit("vit-deep", "final", PICK, "standard", 2000, PAD, 60),
    "lenet-final-replay": Audit("lenet", "final", REPLAY, "standard", 2000, {**LOCKS, **PAD}, 45),
    "resnet20-final-replay": Audit(
        "resnet20", "final", REPLAY, "standard", 2000, {**CHANNEL, **PAD}, 200
    ),
    "lenet-batch-replay": Audit(
        "lenet", "final", REPLAY, "standard", 125, {**CHANNEL, **PAD}, 90, batch=16
    ),
    "lenet-steps-replay": Audit(
        "lenet", "final", REPLAY, "standard", 12, {**CHANNEL, **PAD}, 200, batch=16, steps=10
    ),
}


def settings_of(model: str, arm: str, scratch: Path) -> RunConfig:
    """The federation of one arm. LeNet's initial weights are written to ``scratch`` if absent."""
    settings: dict[str, Any] = {
        **MODELS[model],
        "defense": {**ARMS[arm], **MODELS[model].get("defense", {})},
        "evaluation": {"every": 0, "wrong_keys": 2},
        "renewal": {"budget": None},
    }
    if model == "lenet":
        path = scratch / "lenet.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, _uniform())
        settings["model"] = {**settings["model"], "init": str(path)}
    return config_from(settings, source=f"{model}-{arm}")


def _uniform() -> dict[str, torch.Tensor]:
    generator = derive(0, "uniform")
    net = build("lenet", num_classes=10, channels=1, image_size=32, generator=generator)
    return {n: torch.rand(t.shape, generator=generator) - 0.5 for n, t in net.state_dict().items()}


@cache
def data_of(model: str) -> DataBundle:
    """Images of one model."""
    return load_data(config_from(dict(MODELS[model])))


def trained(model: str, arm: str, scratch: Path) -> Path:
    """The run folder of an arm, trained if it is not there yet."""
    place = scratch / "federations" / f"{model}-{arm}"
    if not (place / "summary.json").exists():
        say(f"training {model}, {arm}")
        config = settings_of(model, arm, scratch)
        resume = (place / "config.json").exists()
        run(config, place, resume=resume, bundle=data_of(model))
    return place


def audited(name: str, arm: str, scratch: Path) -> dict[str, Any]:
    """The audit of one arm; cells of controls that another arm's audit has done are taken over."""
    plan = AUDITS[name]
    folders = folders_of(name, scratch)
    folder = folders[arm]
    defense = ARMS[arm]["name"]
    config = AuditConfig(
        run=settings_of(plan.model, arm, scratch),
        defenses=(*CONTROLS, defense),
        attacks=plan.attacks,
        threats=plan.arms[arm],
        stage=plan.stage,
        images=plan.images,
        batch_size=plan.batch,
        local_steps=plan.steps,
        effort=plan.effort,
    )
    for other in folders.values():
        _take_over(other, folder, plan.stage)

    def listen(event: Any) -> None:
        if event.kind in ("cell", "note"):
            say(f"  {event.text}")

    say(f"{name}, {arm}: {plan.images} victims, {', '.join(plan.attacks)}, {plan.effort}")
    started = time.process_time()
    sources = {d: trained(plan.model, d, scratch) for d in CONTROLS}
    sources[defense] = trained(plan.model, arm, scratch)
    found = run_audit(config, folder, sources=sources, resume=True, listen=listen)
    attacks = {
        path.stem: json.loads(path.read_text())["attack"]
        for path in sorted((folder / "cells").glob("*.json"))
    }
    # Of all attempts: one that is interrupted goes on where it stopped.
    spent = folder / "seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else 0.0
    write(spent, round(before + time.process_time() - started, 1))
    return {**found, "attacks": attacks, "seconds": json.loads(spent.read_text())}


def folders_of(name: str, scratch: Path) -> dict[str, Path]:
    """Where the audits of a row are, by what its own defense is called in its pictures."""
    return {arm: scratch / "audits" / f"{name}-{arm}" for arm in AUDITS[name].arms}


def _take_over(there: Path, here: Path, stage: str) -> None:
    """Copies what another audit found about the controls: same runs, victims and attacks."""
    for control in CONTROLS:
        # A control that is searched in one audit (fedbn, adaptive) is so in all of a row.
        for path in there.glob(f"cells/{stage}_{control}_*.json"):
            _copy(path, here / "cells" / path.name)
        for path in there.glob(f"pictures/{stage}_{control}_*.png"):
            _copy(path, here / "pictures" / path.name)


def _copy(path: Path, to: Path) -> None:
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)


def condensed(arm: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is committed of an audit: everything but the single images."""
    keep = ("verdict", "accuracy", "summary", "skipped", "attacks", "config", "data", "seconds")
    kept = {name: found[name] for name in keep}
    # A path of this machine; the weights follow from the seed.
    kept["config"]["run"]["model"]["init"] = None
    return {"arm": arm, "commit": commit(), **kept}


def rows_of(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Summaries of one row of audits, controls once; ``arm`` is added."""
    rows, seen = [], set()
    for arm, found in document["audits"][name].items():
        for entry in found["summary"]:
            own = entry["defense"] not in CONTROLS
            label = arm if own else entry["defense"]
            place = (label, entry["threat"], entry["attack"])
            if place not in seen:
                seen.add(place)
                rows.append({**entry, "arm": label})
    order = {label: i for i, label in enumerate((*CONTROLS, *ARMS))}
    return sorted(rows, key=lambda r: (r["attack"], order[r["arm"]]))


def markdown(document: dict[str, Any], reading: str = "") -> str:
    """The tables; on top what someone read in them."""
    about = (__doc__ or "").split("\n\n")
    parts = [
        "# What an update leaks\n",
        reading,
        f"`{document['command']}`, {document['date']}; {minutes(document):.0f} minutes of one "
        "core, training included.\n",
        *(" ".join(text.split()) + "\n" for text in about[1:]),
        "*Advantage*: aligned SSIM minus that of the floor. *Identified*: the true image is the "
        "nearest of 100 of its class (chance: 1 %). *Retrieval* picks it, and shows the public "
        "image that fits best. "
        "*Success*: SSIM ≥ 0.6, the floor's behind the slash. *Paper MSE, PSNR*: the paper's "
        "convention (a root on the scale 0 ... 255, and PSNR of that root). Brackets: 95 % "
        "intervals. Verdicts in brackets are of controls. LPIPS is "
        "left out: its backbones are not here.\n",
    ]
    for name, plan in AUDITS.items():
        if name in document["audits"]:
            parts.append(_section(document, name, plan))
    return "\n".join(parts)


def _section(document: dict[str, Any], name: str, plan: Audit) -> str:
    found = document["audits"][name]
    commits = sorted({one["commit"] for one in found.values()})
    lines = [f"## {name}\n\nAt commit {', '.join(commits)}.\n"]
    lines += [
        f"Published, {attack} on {plan.model} ({PUBLISHED[plan.model, attack]}).\n"
        for attack in plan.attacks
        if (plan.model, attack) in PUBLISHED
    ]
    repr_ = sorted({text for one in found.values() for text in one["attacks"].values()})
    plain = [r for r in repr_ if not r.startswith("Adaptive")]
    one = plan.batch * plan.steps == 1
    what = "images" if one else f"updates of {plan.steps} step(s) on {plan.batch} images"
    lines.append(f"{plan.images} {what}, `{'`, `'.join(plain)}`.\n")
    accuracy = {**next(iter(found.values()))["accuracy"]}
    accuracy = {a: v for a, v in accuracy.items() if a in CONTROLS}
    accuracy |= {arm: one["accuracy"][ARMS[arm]["name"]] for arm, one in found.items()}
    if plan.stage == "final":
        words = [f"{arm} {100 * v['own_key']:.1f} %" for arm, v in accuracy.items() if v]
        lines.append(f"Accuracy with the own key: {', '.join(words)}.\n")
    lines.append(rows_table(rows_of(document, name)))
    for arm, one in found.items():
        for defense, verdict in one["verdict"]["defenses"].items():
            lines.append(f"\n**{arm}** ({defense}): {verdict['verdict']}. {verdict['reason']}")
    lines.append(f"\n\n![{name}](leakage-{name}.png)\n")
    return "\n".join(lines)


def conclude(out: Path) -> None:
    """Writes leakage.md from leakage.json and leakage-reading.md, what someone made of it."""
    reading = out / "leakage-reading.md"
    words = reading.read_text() if reading.exists() else ""
    (out / "leakage.md").write_text(markdown(json.loads((out / "leakage.json").read_text()), words))


@dataclass(frozen=True)
class Job:
    """What one process does: train the federations of some arms, or audit a row of them."""

    model: str
    row: str | None
    arms: tuple[str, ...]
    scratch: str
    cost: float


def planned(only: str, arms: str, scratch: Path) -> tuple[dict[str, Job], dict[str, Job]]:
    """Federations and, once they are there, rows of audits: jobs of :func:`work` by name."""
    names, wanted = only.split(","), arms.split(",")
    if strange := [n for n in names if n not in AUDITS] + [a for a in wanted if a not in ARMS]:
        raise SystemExit(f"got {strange}; audits are {list(AUDITS)}, arms {list(ARMS)}.")
    federations, rows = {}, {}
    for name in names:
        plan = AUDITS[name]
        mine = tuple(arm for arm in plan.arms if arm in wanted)
        for arm in (*CONTROLS, *mine):
            federations[f"{plan.model}-{arm}"] = Job(plan.model, None, (arm,), str(scratch), 40)
        own = name if mine == tuple(plan.arms) else f"{name}_{'+'.join(mine)}"
        cost = plan.cells * plan.seconds * len(mine) / len(plan.arms)
        rows[own] = Job(plan.model, name, mine, str(scratch), cost)
    return federations, rows


def work(name: str, job: Job) -> dict[str, Any]:
    """Does one job in a process of its own."""
    torch.set_num_threads(1)
    scratch = Path(job.scratch)
    if job.row is None:
        return {arm: trained(job.model, arm, scratch).name for arm in job.arms}
    return {arm: condensed(arm, audited(job.row, arm, scratch)) for arm in job.arms}


def main() -> None:
    """Runs what is missing; writes results/leakage.json, .md and a picture per row of audits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(AUDITS), help="audits, separated by commas")
    parser.add_argument("--arms", default=",".join(ARMS), help="of these; others stay as they are")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "leakage")
    args = parser.parse_args()
    federations, rows = planned(args.only, args.arms, args.scratch)
    cost = sum(job.cost for job in (*federations.values(), *rows.values())) / 60 / args.processes
    say(f"cost: about {cost:.0f} minutes on {args.processes} idle cores")
    path = args.out / "leakage.json"
    audits = json.loads(path.read_text())["audits"] if path.exists() else {}
    for jobs in (federations, rows):
        costs = {name: job.cost for name, job in jobs.items()}
        place = args.scratch / "jobs"
        found = run_cells(jobs, work, place, processes=args.processes, costs=costs)
    for name, job in rows.items():
        assert job.row is not None
        arms = {**audits.get(job.row, {}), **found[name]}
        audits[job.row] = {arm: arms[arm] for arm in AUDITS[job.row].arms if arm in arms}
        contact_sheet(folders_of(job.row, args.scratch), args.out / f"leakage-{job.row}.png")
    document = {
        **provenance(f"python studies/leakage.py --only {','.join(audits)}"),
        "audits": {n: audits[n] for n in AUDITS if n in audits},
    }
    write(path, document)
    conclude(args.out)
    say(f"wrote {args.out / 'leakage.md'}")


if __name__ == "__main__":
    main()
