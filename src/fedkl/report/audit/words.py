"""Figures and names as a reader wants them; what is unknown is a dash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedkl.report.audit.facts import Interval, Summary
from fedkl.report.audit.reading import number

DASH: Final = "–"

DEFENSES: Final = {
    "none": "undefended",
    "norm": "ordinary norm",
    "fedbn": "private norm, no key",
    "noise": "clipping and noise",
    "prune": "pruning",
}
THREATS: Final = {
    "adaptive": "adaptive attacker",
    "block-ignored": "locked block ignored",
    "key-shared": "key holder",
    "key-unknown": "key unknown",
    "key-regressed": "key regressed",
    "lock-gradient": "sees the lock’s gradient",
    "crafting": "crafting server",
    "open": "nothing private",
}
METRICS: Final = {
    "ssim": "SSIM",
    "ssim_aligned": "aligned SSIM",
    "floor_ssim_aligned": "floor, aligned SSIM",
    "advantage": "advantage over the floor",
    "identified": "identified",
    "floor_identified": "floor, identified",
    "success": "success (SSIM ≥ 0.6)",
    "floor_success": "floor, success",
    "labels_right": "labels right",
    "floor_ssim": "floor, SSIM",
    "ssim_uniform": "SSIM, uniform window",
    "mse": "MSE",
    "psnr": "PSNR (dB)",
    "lpips": "LPIPS",
    "paper_mse": "“MSE” of the paper",
    "paper_psnr": "“PSNR” of the paper",
}
_RATES: Final = {"identified", "floor_identified", "success", "floor_success", "labels_right"}
ACCURACIES: Final = {
    "own_key": "own key",
    "wrong_key": "wrong key",
    "wrong_key_p95": "wrong key, 95th percentile",
    "other_client": "other client",
    "outsider": "outsider (no lock)",
    "no_lock": "insider (no lock)",
}


def recognizes(attack: str) -> bool:
    """Whether an attack picks among images, so that its pictures are public ones."""
    return attack.partition("+")[0].partition("-")[0] in ("retrieval", "replay")


def figure(value: float | None, metric: str = "") -> str:
    """A figure with the digits and the unit that suit its metric."""
    if value is None:
        return DASH
    if abs(value) >= 1e6:
        return _minus(f"{value:.3g}")
    if metric in _RATES:
        return percent(value)
    if metric == "advantage":
        return signed(value)
    if "psnr" in metric:
        return _minus(f"{value:.1f}")
    if "mse" in metric:
        return _minus(f"{value:.3g}")
    return _minus(f"{value:.2f}")


def signed(value: float | None) -> str:
    """+0.31, −0.02, 0.00."""
    if value is None:
        return DASH
    shown = f"{value:+.2f}"
    return _minus(shown if float(shown) else "0.00")


def percent(value: float | None) -> str:
    """A fraction as 12 %, and 1.3 % where a tenth matters."""
    if value is None or abs(value) >= 1e6:
        return DASH
    digits = 1 if 0 < abs(value) < 0.1 else 0
    return _minus(f"{100 * value:.{digits}f}") + " %"


def span(interval: Interval, metric: str = "") -> str:
    """The 95 % interval, low to high; a dash unless both are known."""
    if interval.low is None or interval.high is None:
        return DASH
    return f"{figure(interval.low, metric)} to {figure(interval.high, metric)}"


def defense_name(defense: str) -> str:
    """A defense in words, its id where there are none; of a composition every part."""
    parts = [part.strip() for part in defense.split("+")]
    if len(parts) > 1 and "none" in parts:
        parts.remove("none")
    return " + ".join(DEFENSES.get(part, part) for part in parts)


def threat_name(threat: str) -> str:
    """A threat model in words, its id where there are none."""
    return THREATS.get(threat, threat)


def metrics(summaries: tuple[Summary, ...]) -> list[str]:
    """Every metric that some summary knows, the known ones first and in their order."""
    seen = {name for one in summaries for name, x in one.figures.items() if x.mean is not None}
    return [name for name in METRICS if name in seen] + sorted(seen - set(METRICS))


def setting(value: Any) -> str:
    """One setting as text: yes and no, a dash for nothing, lists with commas."""
    if value is None or value == "" or value == [] or value == {}:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(setting(x) for x in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {setting(v)}" for k, v in value.items())
    if isinstance(value, float):
        return DASH if number(value) is None else f"{value:.6g}"  # as one would type it
    return str(value)


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted name → text."""
    found: dict[str, str] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = setting(value)
    return found


def _minus(shown: str) -> str:
    return shown.replace("-", "−")
