"""Which of torchvision's classification models can be locked, and does the lock keep its promises.

Every model, with random weights and 10 classes, is locked twice (``layers="first"`` and
``layers="all"``) and checked; see :data:`CHECKS`. Writes ``architectures.json`` and ``.md``.
Models that the JSON file already has are skipped, so an interrupted run goes on where it stopped.

Cost: about 15 minutes on one core and 9 GB of memory for all 80 models (the largest have 645
million parameters); each model runs in a process of its own.

    python studies/architectures.py --models resnet18,vit_b_16 --out results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {
    "runs": "forward and backward in train mode: finite outputs, a finite gradient for every lock",
    "split": "shared and private state: nothing in both, everything in one, no foreign name",
    "reload": "both states loaded into a fresh model locked from the JSON spec: outputs identical",
    "unlock": "outputs, state dict and classes after unlock are bit-identical to before lock, "
    "and the locked outputs were not",
}
# A dense map from a key of 1024 to every channel of the largest models would not fit beside them.
LENGTH = {"first": 1024, "all": 64}
BATCH, CLASSES = 2, 10
# The smallest multiple of 32 that leaves more than one value per channel to a batch norm, save:
IMAGE = 64
IMAGES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}


def build(name: str, seed: int) -> Any:
    """The model with random weights, the same for the same ``seed``."""
    import torch
    import torchvision

    from fedkl.rng import borrowed, derive

    size = IMAGES.get(name, IMAGE)
    extra: dict[str, Any] = {}
    if name.startswith("vit"):
        extra = {"image_size": size}
    elif name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}  # torchvision's own draw takes a minute
    with borrowed(derive(seed, name)), torch.no_grad():
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra)
        # Heads and biases that start as zeros would make every comparison of outputs pass.
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    return model


def outputs(model: Any, x: Any) -> Any:
    """Logits in eval mode, without gradients."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(x)


def check(name: str, layers: str) -> dict[str, Any]:
    """Locks one model and runs every check; raises if it cannot be locked."""
    import torch

    from fedkl.key import Key
    from fedkl.locking import lock, lock_spec, private_state, unlock
    from fedkl.rng import derive

    size = IMAGES.get(name, IMAGE)
    x = torch.randn(BATCH, 3, size, size, generator=derive(0, "image"))
    key, model = Key.generate(), build(name, 0)
    total = sum(p.numel() for p in model.parameters())
    original = set(model.state_dict())
    settings: dict[str, Any] = {"layers": layers, "length": LENGTH[layers], "example": x}
    locked = lock(model, key, **settings)
    spec = lock_spec(locked)
    row = {
        "sites": len(spec.sites),
        "inserted": sum(site.inserted for site in spec.sites),
        "first": f"{spec.sites[0].name} ({spec.sites[0].norm})",
        "norms": sorted({site.norm for site in spec.sites}),
        "length": LENGTH[layers],
        "added": sum(t.numel() for n, t in private_state(locked).items() if ".keylock." in n),
    }
    row["added_share"] = row["added"] / total
    row["parameters"], row["image"] = total, size
    checks = {"unlock": same_after_unlock(model, locked, x)}
    del model
    locked = lock(unlock(locked, inplace=True), key, inplace=True, **settings)
    checks["runs"] = runs(locked, x)
    checks["split"] = splits(locked, original)
    checks["reload"] = reloads(name, locked, key, x)
    row["checks"] = {check: checks[check] for check in CHECKS}
    return row


def same_after_unlock(model: Any, locked: Any, x: Any) -> bool:
    """Bit-identity of ``model`` and of ``locked`` without its lock; ``locked`` stays locked."""
    import torch

    from fedkl.locking import unlock

    before, opened = outputs(model, x), unlock(locked)
    a, b = model.state_dict(), opened.state_dict()
    kinds = [type(m) for m in model.modules()] == [type(m) for m in opened.modules()]
    equal = list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    heard = not torch.equal(before, outputs(locked, x))
    return kinds and equal and heard and torch.equal(before, outputs(opened, x))


def runs(locked: Any, x: Any) -> bool:
    """A training step's forward and backward, auxiliary heads included."""
    import torch
    from torch.utils._pytree import tree_leaves

    from fedkl.locking import sources_of

    locked.train()
    out = locked(x)
    logits = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    labels = torch.arange(BATCH) % CLASSES
    torch.stack([torch.nn.functional.cross_entropy(t, labels) for t in logits]).sum().backward()
    grads = [p.grad for source in sources_of(locked).values() for p in source.parameters()]
    locked.zero_grad(set_to_none=True)
    return all(bool(torch.isfinite(t).all()) for t in logits) and all(
        g is not None and bool(torch.isfinite(g).all()) for g in grads
    )


def splits(locked: Any, original: set[str]) -> bool:
    """Shared and private names against the locked and the original state dict."""
    from fedkl.locking import private_state, shared_state

    shared, private = set(shared_state(locked)), set(private_state(locked))
    foreign = {n for n in shared - original if ".inserted_norm." not in f".{n}"}
    whole = shared | private == set(locked.state_dict())
    return whole and not shared & private and not foreign and bool(private)


def reloads(name: str, locked: Any, key: Any, x: Any) -> bool:
    """Whether public and private tensors, the spec as JSON and the key make the same model."""
    import torch

    from fedkl.locking import (
        LockSpec,
        load_private_state,
        load_shared_state,
        lock_like,
        lock_spec,
        private_state,
        shared_state,
    )

    spec = LockSpec.from_dict(json.loads(json.dumps(lock_spec(locked).to_dict())))
    fresh = lock_like(build(name, 1), key, spec, inplace=True)
    load_shared_state(fresh, shared_state(locked))
    load_private_state(fresh, private_state(locked))
    return torch.equal(outputs(locked, x), outputs(fresh, x))


def work(name: str) -> dict[str, Any]:
    """Both requests on one model, each with its time and, if it failed, its error."""
    import torch

    torch.set_num_threads(1)
    row: dict[str, Any] = {}
    for layers in LENGTH:
        start = time.perf_counter()
        try:
            row[layers] = check(name, layers)
        except Exception as error:
            row[layers] = {"error": f"{type(error).__name__}: {error}"}
        row[layers]["seconds"] = round(time.perf_counter() - start, 2)
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def commit() -> str:
    """Short commit of this checkout; ``+`` if the lock or this file differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--", "src/fedkl/locking", "studies/architectures.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")


def run(name: str) -> dict[str, Any]:
    """One model in a process of its own: its memory is gone afterwards."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        fault = {"error": f"process ended with {done.returncode}: {last}", "seconds": 0.0}
        return {"first": fault, "all": fault, "peak_gb": None}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def passed(part: dict[str, Any]) -> bool:
    """Whether one model with one choice of layers passed everything."""
    return "error" not in part and all(part["checks"].values())


def cell(part: dict[str, Any]) -> str:
    """One choice of layers in the table: locks, share of added parameters, failures."""
    if "error" in part:
        return f"error: {part['error'][:80]}"
    failed = [check for check, good in part["checks"].items() if not good]
    inserted = f", {part['inserted']} inserted" if part["inserted"] else ""
    share = f"+{100 * part['added_share']:.2g} %"
    verdict = f"failed: {', '.join(failed)}" if failed else "pass"
    return f"{part['sites']}{inserted} | {share} | {verdict}"


def table(document: dict[str, Any]) -> str:
    """The Markdown page."""
    rows = document["models"]
    good = sum(passed(r["first"]) and passed(r["all"]) for r in rows.values())
    lines = [
        "# Architectures",
        "",
        f"{good} of {len(rows)} torchvision classification models pass every check, with "
        '`layers="first"` and with `layers="all"`.'
        + (f" Not run yet: {', '.join(document['missing'])}." if document["missing"] else ""),
        "",
        *(f"- **{name}**: {text}" for name, text in CHECKS.items()),
        "",
        "Scheme `channel`, random weights (zeros replaced by noise), "
        f"{CLASSES} classes, batch {BATCH}, images {IMAGE}² "
        f"({', '.join(f'{n} {s}²' for n, s in IMAGES.items())}), key length {LENGTH['first']} for "
        f"first and {LENGTH['all']} for all (to save memory). Shares count the lock's parameters "
        "against the model's. One thread.",
        "",
        *(f"- {key}: {document[key]}" for key in ("command", "date", "versions")),
        f"- commit: {', '.join(sorted({r['commit'] for r in rows.values()}))}",
        "",
        "| model | parameters | first on | locks | added | checks | all: locks | added | checks "
        "| s | GB |",
        "|---|--:|---|--:|--:|---|--:|--:|---|--:|--:|",
    ]
    for name, row in rows.items():
        first = row["first"]
        blank = " | |" if "error" in first else ""
        seconds = first["seconds"] + row["all"]["seconds"]
        lines.append(
            f"| {name} | {first.get('parameters', 0) / 1e6:.1f} M | {first.get('first', '')} "
            f"| {cell(first)}{blank} | {cell(row['all'])}{' | |' if 'error' in row['all'] else ''} "
            f"| {seconds:.0f} | {row['peak_gb']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the study; 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="names, separated by commas; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder to write to")
    parser.add_argument("--fresh", action="store_true", help="forget the rows already there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker)))
        return 0
    import torch
    import torchvision

    from fedkl.files import write_bytes, write_json

    everything = torchvision.models.list_models(module=torchvision.models)
    names = arguments.models.split(",") if arguments.models else everything
    path = arguments.out / "architectures.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = {} if arguments.fresh or not path.exists() else json.loads(path.read_text())["models"]
    document = {
        "command": " ".join(["python", "studies/architectures.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}",
        "checks": CHECKS,
        "models": known,
    }
    # A process that was killed says nothing about its model: that row is tried again.
    waiting = [n for n in names if n not in known or known[n]["peak_gb"] is None]
    print(f"{len(waiting)} models, about {12 * len(waiting)} s on one core", file=sys.stderr)
    for number, name in enumerate(waiting, start=1):
        row = {**run(name), "commit": commit()}
        known[name] = row
        document["models"] = {n: known[n] for n in sorted(known)}
        document["missing"] = [n for n in everything if n not in known]
        write_json(path, document)
        write_bytes(path.with_suffix(".md"), table(document).encode())
        text = f"{cell(row['first'])} || {cell(row['all'])}"
        print(f"{number}/{len(waiting)} {name}: {text}", file=sys.stderr, flush=True)
    return int(not all(passed(known[n]["first"]) and passed(known[n]["all"]) for n in names))


if __name__ == "__main__":
    sys.exit(main())
