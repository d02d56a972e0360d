"""The public law of a lock's secrets: γ and β from a key vector, and random draws of both."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkl.errors import AttackError
from fedkl.locking import LockSpec
from fedkl.locking.pad import SCALE_LAWS, Pad
from fedkl.locking.sources import ACTIVATIONS

Tensors = Mapping[str, Tensor]

MAPS = (("scale", "gamma"), ("shift", "beta"))


def weight_names(spec: LockSpec) -> tuple[str, ...]:
    """State-dict names of a channel lock's own tensors."""
    parts = ("weight", "bias") if spec.settings["bias"] else ("weight",)
    return tuple(
        f"{site.name}.keylock.{kind}_{part}"
        for site in spec.sites
        for kind, _ in MAPS
        for part in parts
    )


def key_factor(spec: LockSpec, inputs: int) -> float:
    """What a channel lock multiplies its inputs by, before its matrices."""
    settings = spec.settings
    return 1.0 if settings["spread"] is None else float(settings["gain"]) * inputs**-0.5


def key_affines(spec: LockSpec, weights: Tensors, vector: Tensor) -> dict[str, Tensor]:
    """γ and β of every site of a channel lock, by the names that a rebuilt model gives them.

    γ = act(W_γ u + b_γ), β alike (arXiv 2305.04095, section 4); in the chained form the first site
    alone hears the key vector. Differentiable, and works under vmap.

    Args:
        spec: The public lock spec.
        weights: The lock's own tensors by state-dict name (:func:`weight_names`).
        vector: The key vector (length,), unscaled.

    Raises:
        AttackError: The lock is of another scheme, or a tensor is missing.
    """
    check_channel(spec)
    if missing := [name for name in weight_names(spec) if name not in weights]:
        raise AttackError(
            f"the lock's weight {missing[0]} was not granted; grant lock_weights in the threat "
            "model, or free the secrets instead (threat model 'adaptive')."
        )
    act = ACTIVATIONS[spec.settings["activation"]]
    inputs = {kind: vector for kind, _ in MAPS}
    found: dict[str, Tensor] = {}
    for site in spec.sites:
        for kind, secret in MAPS:
            weight = weights[f"{site.name}.keylock.{kind}_weight"]
            u = inputs[kind] * key_factor(spec, weight.shape[-1])
            value = weight @ u
            if spec.settings["bias"]:
                value = value + weights[f"{site.name}.keylock.{kind}_bias"]
            value = act(value)
            if spec.settings["chain"]:
                inputs[kind] = value
            found[f"{site.name}.keylock.{secret}"] = value.reshape(site.shape)
    return found


def check_channel(spec: LockSpec) -> None:
    """Raises unless γ and β come from a key vector through matrices.

    Raises:
        AttackError: They do not.
    """
    if spec.scheme != "channel":
        raise AttackError(
            f"a lock of scheme {spec.scheme!r} has no map from a key vector to γ and β; free its "
            "secrets instead (threat model 'adaptive')."
        )


def draw_vector(spec: LockSpec, generator: torch.Generator) -> Tensor:
    """A random key vector of the spec's law: float32 (length,)."""
    check_channel(spec)
    length = int(spec.settings["length"])
    law = spec.settings["law"]
    if law == "sign":
        return torch.randint(2, (length,), generator=generator).float() * 2 - 1
    if law == "uniform":
        return torch.rand(length, generator=generator)
    return torch.randn(length, generator=generator)


def draw_affines(spec: LockSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw of γ and β of every site as a fresh lock starts; empty where none is drawn."""
    if spec.scheme == "pad":
        return _draw_pad(spec, generator)
    if spec.scheme != "channel":
        return {}
    weights: dict[str, Tensor] = {}
    settings = spec.settings
    inputs = int(settings["length"])
    for site in spec.sites:
        features = int(torch.tensor(site.shape).prod())
        for kind, _ in MAPS:
            name = f"{site.name}.keylock.{kind}_weight"
            weights[name] = _draw_map(spec, kind, (features, inputs), generator)
            bias = _linear((features,), inputs, generator)
            if settings["bias"]:
                unset = settings["spread"] is None
                weights[f"{site.name}.keylock.{kind}_bias"] = bias if unset else bias * 0
        if settings["chain"]:
            inputs = features
    return key_affines(spec, weights, draw_vector(spec, generator))


def draw_secrets(spec: LockSpec, neutral: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw of all private tensors: γ and β from the spec's law, weights as wide as fresh ones.

    Args:
        spec: The public lock spec.
        neutral: Fresh values by name, for shapes and widths.
        generator: All randomness.
    """
    affines = draw_affines(spec, generator)
    drawn = {}
    for name, value in neutral.items():
        if name in affines:
            drawn[name] = affines[name].to(value.dtype).reshape(value.shape)
        elif value.is_floating_point() and value.numel() > 1 and value.ndim > 1:
            width = value.std(correction=0)
            drawn[name] = width * torch.randn(value.shape, generator=generator).to(value.dtype)
        else:
            drawn[name] = value
    return drawn


def _draw_map(
    spec: LockSpec, kind: str, shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    settings = spec.settings
    spread = settings["spread"]
    if spread is None:
        return _linear(shape, shape[1], generator)
    if kind == "shift" and settings["shift_spread"] is not None:
        spread = settings["shift_spread"]
    first = shape[1] == settings["length"] or not settings["chain"]
    start = (float(spread) if first else 1.0) / float(settings["gain"])
    return torch.randn(shape, generator=generator) * start


def _linear(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    """As ``nn.Linear`` starts: U(-1/√inputs, 1/√inputs)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs)


def _draw_pad(spec: LockSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """γ with random signs and β ~ N(0, spread²), one of each per position."""
    scheme = spec.scheme_value()
    assert isinstance(scheme, Pad)
    found: dict[str, Tensor] = {}
    for number, site in enumerate(spec.sites):
        mean, deviation = SCALE_LAWS[scheme.law_of(first=number == 0)]
        signs = torch.randint(2, site.shape, generator=generator) * 2 - 1
        size = (mean + deviation * torch.randn(site.shape, generator=generator)).abs()
        found[f"{site.name}.keylock.gamma"] = signs * size
        shift = torch.randn(site.shape, generator=generator)
        found[f"{site.name}.keylock.beta"] = shift * scheme.spread_of(first=number == 0)
    return found
