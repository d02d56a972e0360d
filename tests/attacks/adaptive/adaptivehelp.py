"""Victims for the tests of adaptive attacks: updates made by a locked model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.data import load
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, private_state
from fedkl.locking.rebuild import held_secrets, rebuild, secret_names
from fedkl.models import build
from fedkl.observation import THREATS, Observation, ThreatModel, Training
from fedkl.rng import derive


@dataclass(frozen=True)
class Victim:
    """A locked client model, and the public twin that attackers get."""

    locked: nn.Module
    public: nn.Module
    shape: tuple[int, int, int]


def fixed_key(number: int = 0, length: int = 1024, law: str = "sign") -> Key:
    generator = derive(number, "test key")
    if law == "sign":
        return Key.from_vector(torch.randint(2, (length,), generator=generator) * 2.0 - 1)
    draw = torch.rand if law == "uniform" else torch.randn
    return Key.from_vector(draw(length, generator=generator))


def lenet(half: bool = True, side: int = 32) -> nn.Module:
    """LeNet with weights U(-0.5, 0.5), with which gradients tell the most, or PyTorch's own."""
    generator = derive(0, "model")
    model = build("lenet", num_classes=10, channels=1, image_size=side, generator=generator)
    if half:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    return model


def locked_lenet(
    key: Key | None, *, half: bool = True, layers: str = "all", side: int = 32, **settings: Any
) -> Victim:
    plain = lenet(half, side)
    example = torch.rand(4, 1, side, side, generator=derive(0, "example"))
    settings = {"scheme": "channel", **settings}
    locked = lock(plain, key, layers=layers, example=example, **settings)
    return Victim(locked, rebuild(plain, lock_spec(locked)), (1, side, side))


def images(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    return load("fashion-mnist", channels=1).test.batch(torch.arange(start, start + count))


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the client computes, in train mode, by plain autograd."""
    model.train()
    model.zero_grad(set_to_none=True)
    cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def observe(
    victim: Victim,
    threat: ThreatModel | str,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    labels: bool = False,
) -> Observation:
    """One observation with an update per batch."""
    threat = THREATS[threat] if isinstance(threat, str) else threat
    made = [gradients(victim.locked, x, y) for x, y in batches]
    hidden = private_state(victim.locked)
    plain = Observation(
        model=victim.public,
        kind="gradient",
        changes=tuple({n: g for n, g in m.items() if n not in hidden} for m in made),
        image_shape=victim.shape,
        num_classes=10,
        training=Training(batch_size=len(batches[0][1])),
        threat=threat,
        secrets=secret_names(victim.public),
        labels=torch.stack([y for _, y in batches]) if labels else None,
        spec=lock_spec(victim.locked).to_dict(),
    )
    if threat.key:
        plain = replace(plain, known=held_secrets(victim.locked))
    if threat.lock_weights:
        plain = replace(plain, lock_weights={n: t.clone() for n, t in hidden.items()})
    if threat.lock_gradients:
        sent = tuple({n: g for n, g in m.items() if n in hidden} for m in made)
        plain = replace(plain, lock_gradients=sent)
    return plain
