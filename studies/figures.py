"""The pictures in README.md and docs/findings.md, drawn from results/: `python studies/figures.py`.

wears-off.png: how many images an attacker finds, against the images under one pad, by replay and,
    dashed, by sizes and relations.
frontier.png: what each lock costs ResNet-20 in accuracy, against what it leaves to find.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from breakpadtables import by_seed

ROOT = Path(__file__).resolve().parent.parent
GUESSING = 0.01
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6E6E6E"
BROWN = "#8C564B"
# What a line is called, its color, and its name in results/breakpad.json.
LINES = (
    ("no lock, or with the key", "black", None),
    ("channel lock, LeNet", ORANGE, "lenet, channel"),
    ("pad, LeNet", BLUE, "lenet, pad"),
    ("pad, ResNet-20", GREEN, "resnet20, pad"),
    ("pad, ResNet-20, behind stage 2", PURPLE, "resnet20-deep, pad"),
    ("pad, small vision transformer", BROWN, "vit, pad"),
)
# Names in results/relations.json.
RELATED = {
    "lenet, pad": "lenet, pad",
    "resnet20, pad": "resnet20, pad",
    "resnet20-deep, pad": "resnet20, pad behind stage 2",
}
# Of the frontier: its name there, block and arm of results/pad.json, name in breakpad.json.
POINTS = (
    ("pad, behind\nthe first convolution", "resnet20-iid", "pad", "resnet20, pad"),
    ("pad, behind stage 2", "resnet20-depth", "pad, behind stage 2", "resnet20-deep, pad"),
    ("pad of one\nkey for all", "resnet20-iid", "pad of one key", "resnet20, pad of one key"),
    ("one key,\nsealed", "resnet20-tuned-iid", "sealed signs", "resnet20, sealed signs"),
    ("channel,\nown starts", "resnet20-iid", "channel of own starts",
     "resnet20, channel of own starts"),
    ("channel,\ncommon start", "resnet20-iid", "channel", "resnet20, channel"),
)  # fmt: skip

# Where names of points stand that would lie on others, in points of text.
ASIDE: dict[str, tuple[tuple[int, int], str]] = {
    "one key,\nsealed": ((10, -28), "left"),
    "pad of one\nkey for all": ((62, 6), "left"),
    "channel,\ncommon start": ((0, -32), "center"),
    "pad, behind stage 2": ((-6, 6), "right"),
}


def found(one: dict[str, Any], who: str, images: str) -> float | None:
    """Share identified by the best way to rotate that the attacker has at so many images."""
    ways = one[who].get(images)
    return max(ways.values()) if ways else None


def curve(federations: list[dict[str, Any]], who: str) -> dict[int, list[float]]:
    """Images under one pad to the shares identified, one per federation.

    An attacker who has many images may also take each by itself, so a curve never falls.
    """
    shares: dict[int, list[float]] = {}
    for one in federations:
        best = 0.0
        for images in sorted(one[who], key=int):
            best = max(best, found(one, who, images) or 0.0)
            shares.setdefault(int(images), []).append(best)
    return shares


def at_one_length(related: dict[str, Any]) -> dict[int, float]:
    """Of LeNet behind a pad: images under it to the share that is found if sizes are hidden."""
    alone = [one["shadow"] for one in related["shapes"]["lenet, pad, shape"]]
    shares = {1: max(statistics.fmean(one[way] for one in alone) for way in ("weights", "shape"))}
    federations = related["arms"]["lenet, pad"]
    for images in sorted({*federations[0]["shadow"]} - {"1"}, key=int):
        pairs = [one["shadow"][images]["pairs"] for one in federations]
        shares[int(images)] = statistics.fmean(pairs)
    return shares


def wears_off(replay: dict[str, Any], related: dict[str, Any]) -> Any:
    """The figure of wears-off.png."""
    figure, axes = _axes(9.0, 5.0)
    federations = by_seed(replay)
    for label, color, name in LINES:
        if name is None:
            axes.plot([1, 2000], [1, 1], color=color, lw=1.8, label=label)
            continue
        shares = curve(federations[name], "shadow")
        x = sorted(shares)
        means = [statistics.fmean(shares[n]) for n in x]
        axes.plot(x, means, color=color, lw=1.8, marker="o", ms=4, label=label)
        if len(federations[name]) > 1:
            low, high = ([end(shares[n]) for n in x] for end in (min, max))
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    for _, color, name in LINES:
        if (arm := RELATED.get(name or "")) in related["arms"]:
            shares = curve(related["arms"][arm], "shadow")
            x = sorted(shares)
            means = [statistics.fmean(shares[n]) for n in x]
            axes.plot(x, means, color=color, lw=1.8, ls="--", marker="s", ms=4)
    axes.plot([], [], color=GREY, lw=1.8, ls="--", marker="s", ms=4, label="by sizes and relations")
    short = at_one_length(related)
    label = "the same at one length, pad, LeNet"
    axes.plot(
        [*short], [*short.values()], color=BLUE, lw=1.6, ls=":", marker="^", ms=5, label=label
    )
    axes.axhline(GUESSING, color=GREY, ls=":", lw=1.2)
    axes.text(1, GUESSING * 0.92, "guessing", color=GREY, fontsize=9, va="top")
    axes.set_ylim(0.005, 1.3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 16, 64, 256, 1000, 2000], ["1", "16", "64", "256", "1,000", "2,000"])
    _percent(axes)
    axes.set_xlabel("images under one pad, one gradient each")
    axes.set_ylabel("images identified without the key (of 100 of their class)")
    axes.legend(
        frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.0, 0.86), handlelength=3
    )
    return figure


def frontier(replay: dict[str, Any], blocks: dict[str, Any]) -> Any:
    """The figure of frontier.png."""
    from fedkl.metrics import mean_interval

    figure, axes = _axes(9.0, 5.0)
    federations = by_seed(replay)

    def cost(block: str, arm: str) -> tuple[float, float]:
        arms = blocks[block]["arms"]
        pairs = zip(arms[arm]["own_key"], arms["norm"]["own_key"], strict=True)
        mean, half = mean_interval([100 * (a - b) for a, b in pairs])
        return mean, half or 0.0

    for label, block, arm, name in POINTS:
        mean, half = cost(block, arm)
        one = "key" in label  # which every insider has
        at = {
            images: max(
                statistics.fmean(curve(federations[name], who)[images])
                for who in (("shadow",) if one else ("shadow", "insider"))
            )
            for images in (1, 1000)
        }
        color = GREEN if one else BLUE
        axes.plot([mean, mean], [at[1], at[1000]], color=color, lw=1, alpha=0.6)
        axes.errorbar(
            mean, at[1000], xerr=half, fmt="o", color=color, ms=6, capsize=3, lw=1.2, zorder=3
        )
        axes.plot(mean, at[1], "o", mfc="white", color=color, ms=6, zorder=3)
        offset, side = ASIDE.get(label, ((8, 6), "left"))
        axes.annotate(
            label, (mean, at[1000]), xytext=offset, textcoords="offset points", fontsize=9, ha=side
        )
    axes.plot(0, 1, "s", color=ORANGE, ms=7)
    axes.annotate("no lock", (0, 1), xytext=(8, 4), textcoords="offset points", fontsize=9)
    alone = cost("resnet20-iid", "alone")
    axes.axvspan(alone[0] - alone[1], alone[0] + alone[1], color=GREY, alpha=0.12, lw=0)
    axes.text(alone[0], 0.0068, "every client by itself\n(sends nothing)", fontsize=9, color=GREY,
              ha="center", va="bottom")  # fmt: skip
    axes.axhline(GUESSING, color=GREY, ls=":", lw=1.2)
    axes.text(0.6, GUESSING * 1.05, "guessing", color=GREY, fontsize=9, va="bottom", ha="right")
    axes.set_yscale("log")
    axes.set_ylim(0.006, 1.4)
    axes.set_xlim(-4.2, 0.7)
    _percent(axes)
    axes.set_xlabel("accuracy against the same network with an ordinary norm, points")
    axes.set_ylabel("images identified by replay without the key")
    axes.plot([], [], "o", color=BLUE, label="1,000 images under one pad, outsiders and insiders")
    axes.plot([], [], "o", color=GREEN, label="the same, the server alone: clients have the key")
    axes.plot([], [], "o", mfc="white", color=GREY, label="from one gradient")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _percent(axes: Any) -> None:
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()


def figures(results: Path) -> Iterable[tuple[str, Any]]:
    """Name and figure of every picture."""
    replay = json.loads((results / "breakpad.json").read_text())["parts"]["replay"]["arms"]
    blocks = json.loads((results / "pad.json").read_text())["blocks"]
    related = json.loads((results / "relations.json").read_text())
    yield "wears-off.png", wears_off(replay, related)
    yield "frontier.png", frontier(replay, blocks)


def main() -> None:
    """Writes the pictures into results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    for name, figure in figures(args.results):
        figure.savefig(args.out / name, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
