"""What an attacker expects before it sees anything: how far pixels and secrets spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from fedkl.errors import ConfigError
from fedkl.locking import LockSpec
from fedkl.locking.pad import SCALE_LAWS

PIXEL: Final = 12**-0.5
NOISE: Final = 0.01
_OPEN: Final = 1.0


@dataclass(frozen=True)
class Prior:
    """Independent Gaussians, by their standard deviations.

    Attributes:
        pixel: Of a pixel. The default is that of U(0, 1). Real images are far from independent
            pixels, so bits under this prior are more than an image has.
        noise: Of every observed number, as a fraction of their root mean square.
        secrets: Of every private tensor, by name; around zero, from the law in the lock spec.
    """

    pixel: float
    noise: float
    secrets: Mapping[str, float]

    def __post_init__(self) -> None:
        named = {"pixel": self.pixel, "noise": self.noise, **self.secrets}
        for name, value in named.items():
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"the prior deviation of {name} must be a positive number, got {value}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def prior_of(
    spec: LockSpec | None,
    secrets: Mapping[str, Tensor],
    *,
    pixel: float = PIXEL,
    noise: float = NOISE,
) -> Prior:
    """The prior that the public lock spec states.

    Args:
        spec: The lock spec, None without a lock.
        secrets: Private tensors by name, for names and shapes; values are not looked at.
        pixel: As in :class:`Prior`.
        noise: As in :class:`Prior`.

    Raises:
        ConfigError: A number is not positive.
    """
    return Prior(pixel, noise, {} if spec is None else deviations(spec, secrets))


def deviations(spec: LockSpec, secrets: Mapping[str, Tensor]) -> dict[str, float]:
    """Standard deviation of every private tensor around zero.

    γ and β have that of the scheme's law, as they start; where the law is not random (``fedbn``,
    ``open-pad``) or nothing is stated (the paper's presets), 1, as wide as what a norm puts out.
    Weights and biases of private layers have that of U(±1/√fan_in), norms in between 1; so have
    embeddings, recurrent layers and attention, whose own laws names and shapes do not tell.
    """
    found = {}
    for name, value in secrets.items():
        site, _, kind = name.rpartition(".keylock.")
        if kind in ("gamma", "beta"):
            scale, shift = _affine(spec, first=site == spec.sites[0].name)
            found[name] = scale if kind == "gamma" else shift
        else:
            found[name] = _layer(name, value, secrets)
    return found


def _affine(spec: LockSpec, *, first: bool) -> tuple[float, float]:
    settings = spec.settings
    if spec.scheme == "pad":
        # Locks behind the first may have a law and a spread of their own.
        law = None if first else settings.get("inner_scale_law")
        mean, deviation = SCALE_LAWS[settings["scale_law"] if law is None else law]
        inner = None if first else settings.get("inner_spread")
        return math.hypot(mean, deviation), float(settings["spread"] if inner is None else inner)
    if spec.scheme == "channel" and settings["spread"] is not None:
        shift = settings["shift_spread"]
        return float(settings["spread"]), float(settings["spread"] if shift is None else shift)
    return _OPEN, _OPEN


def _layer(name: str, value: Tensor, secrets: Mapping[str, Tensor]) -> float:
    owner = name.rpartition(".")[0]
    weight = value if value.ndim > 1 else secrets.get(f"{owner}.weight", value)
    if weight.ndim < 2:  # a norm
        return _OPEN
    fan_in = weight[0].numel()
    return 1 / math.sqrt(3 * fan_in)
