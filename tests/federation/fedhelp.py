"""What the tests of the federation share: small runs, small models, and how to compare them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.data import DataBundle, load
from fedkl.defenses import DefenseConfig, make_defense
from fedkl.federation import (
    ClientTask,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    RenewalConfig,
    RunConfig,
    TrainingConfig,
    Workspace,
)
from fedkl.files import read_tensors
from fedkl.key import Key
from fedkl.models import build
from fedkl.rng import derive

DEFENSES = ("none", "norm", "fedbn", "channel", "pad")


@cache
def digits() -> DataBundle:
    return load("digits", image_size=16, channels=1)


def mlp(num_classes: int, channels: int, image_size: int) -> nn.Module:
    """A factory for ``--model fedhelp:mlp``; no norm of its own."""
    pixels = channels * image_size * image_size
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 12), nn.ReLU(), nn.Linear(12, num_classes))


def normed(num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Two batch norms of its own and dropout."""
    pixels = channels * image_size * image_size
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.2),
        nn.Linear(8, num_classes),
    )


class Tied(nn.Module):
    """One matrix under two names, and a frozen one."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(image_size * image_size, 10)
        self.middle = nn.Linear(10, 10)
        self.again = nn.Linear(10, 10)
        self.again.weight = self.middle.weight
        self.frozen = nn.Linear(10, 10)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(torch.tanh(self.first(x.flatten(1)))))
        out: Tensor = self.frozen(self.again(hidden))
        return out


def tied(image_size: int) -> nn.Module:
    return Tied(image_size)


def config(defense: str = "none", **sections: dict[str, Any] | Any) -> RunConfig:
    """A small run; ``training={...}`` and so on replace settings of a section."""

    def section(kind: type, table: str, **defaults: Any) -> Any:
        return kind(**{**defaults, **sections.pop(table, {})})

    return RunConfig(
        data=section(DataConfig, "data", dataset="digits", image_size=16, channels=1),
        model=section(ModelConfig, "model", name="fedhelp:normed"),
        defense=section(DefenseConfig, "defense_settings", name=defense),
        training=section(TrainingConfig, "training", batch_size=32),
        federation=section(FederationConfig, "federation", clients=3, rounds=2, join_steps=2),
        renewal=section(RenewalConfig, "renewal", steps=2),
        evaluation=section(EvaluationConfig, "evaluation", every=1, wrong_keys=2, images=50),
        **sections,
    )


def workspace(
    defense: str, training: TrainingConfig, *, model: str = "fedhelp:normed", **settings: Any
) -> Workspace:
    value = make_defense(DefenseConfig(name=defense, **settings.pop("lock", {})))
    plain = build(model, num_classes=10, channels=1, image_size=16, generator=derive(0, "model"))
    example = digits().public.batch(torch.arange(4))[0]
    prepared = value.prepare(plain, Key.generate() if value.keyed else None, example)
    return Workspace(prepared, value, digits().train, training, **settings)


def task(
    client: int = 0, *, key: Key | None = None, rows: int = 100, round_: int = 1, **changes: Any
) -> ClientTask:
    start = 100 * client
    return dataclasses.replace(
        ClientTask(client, round_, torch.arange(start, start + rows), key, None, {}, False, 0.05),
        **changes,
    )


def snapshot(state: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit: names, dtypes, shapes, bytes (so NaN equals NaN, 0.0 differs from -0.0)."""
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        left, right = (t.detach().contiguous().reshape(-1) for t in (a[name], b[name]))
        assert left.view(torch.uint8).equal(right.view(torch.uint8)), name


def differ(a: Any, b: Any) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


def fixed_key(client: int, length: int = 1024) -> Key:
    """The same key in every run of the tests, where a figure depends on it."""
    bits = torch.randint(2, (length,), generator=derive(client, "key"))
    return Key.from_vector(2.0 * bits - 1.0)


def fixed_seed(client: int) -> Key:
    """The same for locks that take no imported vector."""
    bits = torch.randint(256, (32,), generator=derive(client, "seed"))
    return Key._of("seed", bytes(bits.tolist()))


def key_of(defense: str, client: int) -> Key | None:
    """The key of a client under ``defense``, the same in every run; None without a key."""
    made = {"channel": fixed_key, "pad": fixed_seed}
    return made[defense](client) if defense in made else None


def make_keys(folder: Path, clients: int, length: int = 1024, *, seeds: bool = False) -> Path:
    """A ``keys/`` folder to copy into several runs."""
    folder.mkdir(parents=True)
    for client in range(clients):
        key = fixed_seed(client) if seeds else fixed_key(client, length)
        key.save(folder / f"client-{client:05d}.key")
    fixed_key(-1, length).save(folder / "group.key")
    return folder


def with_keys(folder: Path, keys: Path) -> Path:
    """A run folder that starts with copies of ``keys``."""
    folder.mkdir(parents=True)
    shutil.copytree(keys, folder / "keys")
    return folder


def assert_outcome(got: dict[str, Any], want: dict[str, Any]) -> None:
    """``got`` has all of ``want``; a killed run may have old checkpoints left over besides."""
    assert set(want) <= set(got)
    for name in want:
        assert got[name] == want[name], name


def without_seconds(value: Any) -> Any:
    """JSON data without what may differ between two equal runs."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("seconds", "workers")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that two equal runs must share: tensors as bytes, JSON as data.

    Of each client the newest state; which older ones are still there depends on the interruptions.
    """
    found: dict[str, Any] = {}
    newest = [sorted(client.iterdir())[-1] for client in (folder / "clients").iterdir()]
    for path in [*(folder / "checkpoints").glob("*.safetensors"), *newest]:
        tensors, _ = read_tensors(path)
        found[str(path.relative_to(folder))] = {
            n: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
            for n, t in tensors.items()
        }
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = without_seconds([json.loads(line) for line in lines])
    found["summary"] = without_seconds(json.loads((folder / "summary.json").read_text()))
    return found


class Stopped(Exception):
    """A run was cut off by its listener."""


def stop_after(round_: int) -> Any:
    """A listener that cuts a run off after round ``round_``."""

    def on_event(event: Any) -> None:
        if event.kind == "round" and event.round == round_:
            raise Stopped

    return on_event
