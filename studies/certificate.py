"""What gradients give away whatever the attack: `make reproduce-certificate`.

Directions and bits of LeNet's gradient at fresh weights, one gradient per image, on Fashion-MNIST.

curve
    16x16 and 8x8 pixels: presentations under one lock, channel lock against pads.
spread
    16x16 pixels, one presentation: bits against the spread and the law of γ.
full
    32x32 pixels, one presentation, one and three channels. The pad's zero by construction, for
    LeNet and for ResNet-20: the matrix by the 9,528 secrets of the one takes 7 GB and
    long, that by the 376,832 and more of the other does not fit.

Keys come from the operating system in every cell, so figures repeat within a few units, counts of
directions mostly to the digit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import provenance, run_cells, table, write

ROOT = Path(__file__).resolve().parent.parent
# What a pad was by default when most cells were made; their names go on.
WIDE: dict[str, Any] = {
    "name": "pad", "inner_scale_law": "wide", "inner_spread": 1.0, "head": False,
}  # fmt: skip
DEFENSES: dict[str, dict[str, Any]] = {
    "norm": {"name": "norm"},
    "channel": {"name": "channel"},
    "channel-first": {"name": "channel", "layers": "first"},
    "pad": WIDE,
    "pad-first": {**WIDE, "layers": "first"},
    "pad-shared-stem": {**WIDE, "stem": False},
    "pad-head": {**WIDE, "head": True},
}
CURVE_8, CURVE_16 = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64), (1, 2, 3, 4, 6, 8)
# Private layers and pads of a default lock; the laws of both are in the JSON, under "prior".
SPREADS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LAWS = ("near-one", "normal", "wide", "sign")


def _cell(defense: dict[str, Any], size: int, updates: tuple[int, ...], **more: Any) -> Any:
    return {"defense": defense, "size": size, "updates": updates, **more}


def cells() -> dict[str, dict[str, Any]]:
    """Every cell by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, defense in DEFENSES.items():
        found[f"curve-8-{name}"] = _cell(defense, 8, CURVE_8)
    for name in ("channel", "pad"):
        found[f"curve-16-{name}"] = _cell(DEFENSES[name], 16, CURVE_16)
    found["curve-8-pad-default"] = _cell({"name": "pad"}, 8, CURVE_8[:7])
    found["curve-16-pad-default"] = _cell({"name": "pad"}, 16, CURVE_16[:4])
    for size in (2, 4):
        found[f"batch-8-pad-{size}"] = _cell(DEFENSES["pad"], 8, (1, 2), batch=size)
    for spread in SPREADS:
        defense = {**WIDE, "spread": spread}
        found[f"spread-16-{spread:g}"] = _cell(defense, 16, (1,))
    for law in LAWS:
        defense = {**WIDE, "scale_law": law}
        found[f"law-16-{law}"] = _cell(defense, 16, (1,))
    for name in ("norm", "channel", "channel-first"):
        found[f"full-32-{name}"] = _cell(DEFENSES[name], 32, (1,))
        found[f"full-32x3-{name}"] = _cell(DEFENSES[name], 32, (1,), channels=3)
    for channels in (1, 3):
        for model in ("lenet", "resnet20"):
            for name in ("pad", "pad-shared-stem"):
                found[f"construction-{model}-32x{channels}-{name}"] = _cell(
                    DEFENSES[name], 32, (1,), model=model, channels=channels, dense=False
                )
    return found


def work(name: str, cell: dict[str, Any]) -> dict[str, Any]:
    """One cell: a fresh client, its gradients, their certificate."""
    import torch

    from fedkl.audit import AuditConfig
    from fedkl.audit.certified import certify_victims
    from fedkl.audit.victims import Victims, draw_victims
    from fedkl.federation import config_from
    from fedkl.federation.session import load_data

    torch.set_num_threads(1)
    run = config_from(
        {
            "data": {"image_size": cell["size"], "channels": cell.get("channels", 1),
                     "samples": 100},
            "model": {"name": cell.get("model", "lenet")},
            "defense": cell["defense"],
        }
    )  # fmt: skip
    audit = AuditConfig(
        run=run,
        defenses=(run.defense.name,),
        stage="initial",
        images=1,
        batch_size=cell.get("batch", 1),
        observations=max(cell["updates"]),
    )
    bundle, started = load_data(run), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        victims = Victims(run, Path(folder), bundle, audit)
        largest = {} if cell.get("dense", True) else {"largest": 0}
        rows = draw_victims(bundle, audit)[0]
        found = certify_victims(victims, rows, updates=cell["updates"], **largest)
    facts = found.to_dict()
    for one in facts["certificates"]:
        one["spectrum"] = _thinned(one["spectrum"])
    return {**facts, "cell": cell, "seconds": round(time.monotonic() - started, 1)}


def _thinned(spectrum: list[float]) -> list[float]:
    """At most 64 values, evenly from the first to the last."""
    last = len(spectrum) - 1
    return [spectrum[round(i * last / 63)] for i in range(64)] if last > 63 else spectrum


def _cost(cell: dict[str, Any]) -> float:
    small = {8: 5.0, 16: 60.0, 32: 60.0}[cell["size"]]
    if not cell.get("dense", True):
        return 10.0
    return small * max(cell["updates"])


def text(found: dict[str, Any]) -> str:
    """The Markdown page."""
    parts = [
        "# What gradients give away whatever the attack",
        "",
        "`make reproduce-certificate`; all settings are in `results/certificate.json`. LeNet at "
        "fresh weights, one gradient per image, Fashion-MNIST, float64. A direction counts as "
        "identified when no change of the secrets cancels it to below 1e-6 of the largest effect "
        "in its gradient. Bits are linear and Gaussian, with independent pixels (deviation 0.29), "
        "the lock's own law and a noise of 1 % of the gradient's size: more than images have, to "
        "be compared with each other only. See [docs/theory.md](../docs/theory.md).",
        "",
        "Pads have scales by the law `wide` and spread 1 behind the first lock, and a shared head "
        "unless the name says otherwise. `pad-default` is what `--defense pad` is.",
        "",
        "## Presentations under one lock",
        "",
        _curves(found, "curve-8-", CURVE_8, "8x8, 64 pixels an image"),
        "",
        _curves(found, "curve-16-", CURVE_16, "16x16, 256 pixels an image"),
        "",
        "A batch is one gradient; at 8x8:",
        "",
        _batches(found),
        "",
        "## Spread and law of a pad, one presentation, 16x16",
        "",
        _spreads(found),
        "",
        "## 32x32, one presentation",
        "",
        _full(found),
        "",
        "The same zero by construction: the shift of the first lock moved along with the image.",
        "`left` is what remains of the gradient's change, for the worst of 8 directions and for "
        "another picture altogether. `nats` is how much the law of the shift speaks against that "
        "picture, to whoever knows stem and γ exactly; with a private stem nobody does.",
        "",
        _construction(found),
        "",
    ]
    return "\n".join(parts)


def _curves(found: dict[str, Any], prefix: str, counts: tuple[int, ...], what: str) -> str:
    header = [what, "secrets", *(f"T = {count}" for count in counts)]
    rows = []
    for name in (n for n in found if n.startswith(prefix)):
        ones = found[name]["certificates"]
        label = name.removeprefix(prefix)
        shares = [f"{one['directions']} of {one['known']}" for one in ones]
        shares += ["–"] * (len(counts) - len(ones))
        rows.append([f"{label}: directions", str(ones[0]["secrets"]), *shares])
        bits = [f"{one['bits']:.0f} of {one['bits_known']:.0f}" for one in ones]
        rows.append([f"{label}: bits", "", *bits, *["–"] * (len(counts) - len(ones))])
    return table(header, rows)


def _batches(found: dict[str, Any]) -> str:
    rows = [
        [str(f["cell"]["batch"]), str(one["presentations"]),
         f"{one['directions']} of {one['known']}", f"{one['bits']:.0f} of {one['bits_known']:.0f}"]
        for name, f in found.items() if name.startswith("batch-")
        for one in f["certificates"]
    ]  # fmt: skip
    return table(["batch", "presentations", "directions", "bits"], rows)


def _spreads(found: dict[str, Any]) -> str:
    rows = []
    for name, cell in found.items():
        if name.startswith(("spread-", "law-")):
            one, check = cell["certificates"][0], cell["cancellation"]
            label = name.replace("spread-16-", "spread ").replace("law-16-", "spread 3, γ ")
            bits = f"{one['bits']:.1f} of {one['bits_known']:.0f}"
            rows.append([label, f"{one['directions']} of {one['known']}", bits,
                         f"{check['nats']:+.1f}"])  # fmt: skip
    return table(["pad", "directions", "bits", "nats"], rows)


def _full(found: dict[str, Any]) -> str:
    rows = []
    for name, cell in found.items():
        if name.startswith("full-"):
            one = cell["certificates"][0]
            rows.append([name.removeprefix("full-"), str(one["secrets"]), str(one["of"]),
                         str(one["known"]), str(one["directions"]),
                         f"{one['bits']:.0f} of {one['bits_known']:.0f}"])  # fmt: skip
    header = ["defense", "secrets", "pixels", "key known", "key unknown", "bits"]
    return table(header, rows)


def _construction(found: dict[str, Any]) -> str:
    rows = []
    for name, cell in found.items():
        if name.startswith("construction-"):
            check = cell["cancellation"]
            rows.append([name.removeprefix("construction-"), str(check["secrets"]),
                         f"{check['remaining']:.0e}", f"{check['swapped']:.0e}",
                         f"{check['nats']:+.0f}"])  # fmt: skip
    return table(["network", "secrets", "left, directions", "left, picture", "nats"], rows)


def main() -> None:
    """Runs what is missing and writes results/certificate.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="names that start so")
    args = parser.parse_args()
    todo = {name: cell for name, cell in cells().items() if name.startswith(args.only)}
    folder = ROOT / "runs" / "certificate"
    costs = {name: _cost(cell) for name, cell in todo.items()}
    found = run_cells(todo, work, folder, processes=args.processes, costs=costs)
    if args.only:
        return
    write(
        ROOT / "results" / "certificate.json",
        {**provenance("make reproduce-certificate"), "cells": found},
    )
    (ROOT / "results" / "certificate.md").write_text(text(found))


if __name__ == "__main__":
    main()
