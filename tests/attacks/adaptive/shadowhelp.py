"""Digits behind a small network with a lock, for shadows and what descends from them."""

from __future__ import annotations

from functools import cache

import torch
from adaptivehelp import Victim, fixed_key, gradients, observe
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.data import load
from fedkl.locking import lock, lock_spec
from fedkl.locking.rebuild import rebuild
from fedkl.metrics import draw_decoys, identified
from fedkl.observation import Observation, ThreatModel, Training
from fedkl.rng import derive

OPEN = ThreatModel(name="open", words="")


@cache
def digits() -> tuple[Tensor, Tensor]:
    bundle = load("digits", image_size=8, channels=1)
    parts = [b.batch(torch.arange(len(b))) for b in (bundle.train, bundle.public)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def network_of(seed: str) -> nn.Module:
    """A convolution and a hidden layer: what a lock can stand on, small enough to train here."""
    generator = derive(0, seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.rand(p.shape, generator=generator) - 0.5) * (1.0 if p.ndim > 2 else 0.2))
    return model


@cache
def trained_victim() -> Victim:
    """A client with a channel lock that has trained for a while, on images 700 and up."""
    x, y = digits()
    locked = lock(network_of("model"), fixed_key(), example=x[:4])
    optimizer = torch.optim.Adam(locked.parameters(), lr=0.01)
    generator = derive(0, "training")
    locked.train()
    for _ in range(150):
        rows = 700 + torch.randint(len(x) - 700, (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(locked(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    public = rebuild(network_of("outsider"), lock_spec(locked))
    own = dict(public.state_dict())
    with torch.no_grad():
        for name, tensor in locked.state_dict().items():
            if name in own and ".keylock." not in name:
                own[name].copy_(tensor)
    return Victim(locked, public, (1, 8, 8))


def victims(threat: str, count: int) -> list[Observation]:
    """Images 0 to ``count``; the public ones are 100 to 700, trained on were the rest."""
    x, y = digits()
    victim = trained_victim()
    return [observe(victim, threat, [(x[i : i + 1], y[i : i + 1])]) for i in range(count)]


def open_victims(count: int) -> list[Observation]:
    """The same images behind a model without a lock."""
    x, y = digits()
    model = network_of("model")
    return [
        Observation(
            model=model,
            kind="gradient",
            changes=(gradients(model, x[i : i + 1], y[i : i + 1]),),
            image_shape=(1, 8, 8),
            num_classes=10,
            training=Training(),
            threat=OPEN,
        )
        for i in range(count)
    ]


def public() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[100:700], y[100:700]


def rate(images: Tensor) -> float:
    """Identification among 30 of the same class: chance is 3 %."""
    x, y = digits()
    count = len(images)
    own = torch.arange(count)
    decoys = draw_decoys(y[:count], y, generator=derive(0, "decoys"), own=own, count=29)
    return float(identified(images, x[:count], x, decoys).float().mean())
