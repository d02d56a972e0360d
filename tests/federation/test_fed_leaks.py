"""Nothing that a run writes or sends holds a piece of a key or of a private tensor."""

from __future__ import annotations

import base64
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedhelp import config, digits
from leakhelp import Secrets, as_format, everything_below, noise, secrets_of
from safetensors.torch import save
from torch import Tensor

import fedkl.federation.pool as pool
import fedkl.federation.session as session_module
from fedkl.federation import RunConfig, run
from fedkl.federation.session import Session
from fedkl.files import read_tensors, write_tensors
from fedkl.key import Key
from fedkl.locking import affines

SHORT = {"length": 128}
KEPT = {"batch_size": 32, "keep_momentum": True}
RUNS: dict[str, RunConfig] = {
    "channel": config("channel", defense_settings=SHORT, data={"samples": 100}),
    "fedsgd": config(
        "channel",
        defense_settings=SHORT,
        training=KEPT,
        federation={"method": "fedsgd"},
        data={"samples": 100},
    ),
    "momentum": config(
        "channel",
        defense_settings=SHORT,
        training={**KEPT, "optimizer": "adam", "lr": 0.01},
        model={"name": "lenet"},
        data={"samples": 100},
    ),
    "pad": config(
        "pad",
        defense_settings={"head": True},
        renewal={"every": 1},
        training=KEPT,
        data={"samples": 100},
    ),
    "fedbn": config("fedbn", training=KEPT, data={"samples": 100}),
    "pool": config(
        "channel", defense_settings=SHORT, training=KEPT, workers=2, data={"samples": 100}
    ),
}


@dataclass
class Crossed:
    """All bytes of a finished run that others may see, by where they were."""

    folder: Path
    secrets: Secrets
    seen: dict[str, bytes]


def tapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes down every update that leaves a client and every message between processes."""
    taps = folder / "taps"
    taps.mkdir(parents=True)
    update, encode = session_module.client_update, pool._encode

    def client_update(*args: Any) -> Any:
        result = update(*args)
        sent = result.update
        name = f"update-{sent.client}-{sent.round}"
        body = save({n: t.contiguous() for n, t in sent.tensors.items()})
        (taps / name).write_bytes(body + repr(sent).encode())
        return result

    def encoded(facts: Any, tensors: Any) -> bytes:
        data = encode(facts, tensors)
        (taps / f"message-{torch.randint(2**62, ()).item()}").write_bytes(data)
        return data

    monkeypatch.setattr(session_module, "client_update", client_update)
    monkeypatch.setattr(pool, "_encode", encoded)
    return taps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Crossed]:
    done: dict[str, Crossed] = {}
    for name, wanted in RUNS.items():
        place = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as monkeypatch:
            taps = tapped(place, monkeypatch)
            events: list[Any] = []
            result = run(wanted, place / "run", bundle=digits(), on_event=events.append)
        session = Session(wanted, place / "run", digits())
        seen = dict(everything_below(place / "run"))
        seen |= {f"taps/{p.name}": p.read_bytes() for p in taps.iterdir()}
        shown = [events, result, session.workspace.model, session.store.load(0, before=9)]
        seen["repr"] = "\n".join(map(repr, shown)).encode()
        done[name] = Crossed(place / "run", secrets_of(place / "run", wanted, session), seen)
    return done


@pytest.mark.parametrize("name", RUNS)
def test_nothing_leaks(name: str, runs: dict[str, Crossed]) -> None:
    crossed = runs[name]
    files = set(crossed.seen)
    assert {"config.json", "metrics.jsonl", "summary.json", "repr"} <= files
    assert "checkpoints/best.safetensors" in files
    kind = "message" if name == "pool" else "update"
    assert sum(f.startswith(f"taps/{kind}") for f in files) >= 6
    leaks = {where: found for where, data in crossed.seen.items() if (found := look(crossed, data))}
    assert leaks == {}


def look(crossed: Crossed, data: bytes) -> set[str]:
    return crossed.secrets.found_in(data)


@pytest.mark.parametrize("name", RUNS)
def test_there_is_something_to_find(name: str, runs: dict[str, Crossed]) -> None:
    """And the search finds it in the files where it belongs."""
    crossed = runs[name]
    kinds = {found.split()[0] for found in crossed.secrets.words.values()}
    lock = {"gamma", "beta", "running_mean", "running_var"}
    learned = {"fedbn": set(), "pad": {"scale_learned", "shift_learned", "weight", "bias"}}
    lock |= learned.get(name, {"scale_weight", "shift_weight"})
    lock |= set() if name == "channel" else {"moment"}
    assert lock <= kinds
    assert len(crossed.secrets.words) > {"fedbn": 300, "pad": 5_000}.get(name, 20_000)
    for path in (crossed.folder / "clients").rglob("*.safetensors"):
        found = {f.split()[0] for f in look(crossed, path.read_bytes())}
        assert lock - {"gamma", "beta"} <= found
    for path in crossed.folder.rglob("*.key"):
        assert look(crossed, path.read_bytes()) == {"key base64", "key base64url"} & look(
            crossed, path.read_bytes()
        )
        assert "key base64" in look(crossed, path.read_bytes())


def private_tensor(crossed: Crossed, kind: str) -> Tensor:
    path = sorted((crossed.folder / "clients").rglob("*.safetensors"))[-1]
    tensors, _ = read_tensors(path)
    if kind in ("gamma", "beta"):
        wanted = RUNS["momentum"]
        session = Session(wanted, crossed.folder, digits())
        private = {n[8:]: t for n, t in tensors.items() if n.startswith("private/")}
        session.workspace.enter(session.initial(), session.store.key(2), private)
        return next(iter(affines(session.workspace.model).values()))[kind == "beta"]
    start = "moment/exp_avg:" if kind == "moment" else "private/"
    end = "keylock.scale_weight" if kind == "moment" else kind
    return next(t for n, t in tensors.items() if n.startswith(start) and n.endswith(end))


@pytest.mark.parametrize("number", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "kind",
    ["scale_weight", "shift_weight", "gamma", "beta", "running_mean", "running_var", "moment"],
)
def test_planted_tensors_are_found(
    kind: str, number: str, runs: dict[str, Crossed], tmp_path: Path
) -> None:
    crossed = runs["momentum"]
    secret = private_tensor(crossed, kind).reshape(-1)
    few = {"float16": 8, "float32": 4, "float64": 2}[number]  # 16 bytes
    piece = as_format(secret, number)[3 : 3 + few].contiguous()
    # Every alignment, since nobody says that the thief's file is aligned.
    for shift in range(8):
        data = noise(shift, 50)[shift:] + piece.numpy().tobytes() + noise(9, 50)
        assert f"{kind} {number}" in look(crossed, data), shift
    path = tmp_path / "update.safetensors"
    tensors, _ = read_tensors(crossed.folder / "checkpoints" / "best.safetensors")
    assert not look(crossed, path.read_bytes() if path.exists() else save(tensors))
    write_tensors(path, {**tensors, "extra": as_format(secret, number)})
    assert f"{kind} {number}" in look(crossed, path.read_bytes())
    message = pool._encode({"loss": 0.5}, {**tensors, "extra": as_format(secret, number)})
    assert f"{kind} {number}" in look(crossed, message)


@pytest.mark.parametrize("form", ["raw", "hex", "HEX", "base64", "bits", "int8", "float16", "text"])
def test_planted_keys_are_found(form: str, runs: dict[str, Crossed]) -> None:
    crossed = runs["momentum"]
    key = Key.load(sorted(crossed.folder.rglob("*.key"))[1])
    vector = key.vector(128, "sign")[32:]
    raw: bytes = key._secret
    planted = {
        "raw": raw,
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "base64": base64.b64encode(raw),
        "bits": np.packbits(vector.numpy() > 0).tobytes(),
        "int8": vector.to(torch.int8).numpy().tobytes(),
        "float16": vector.half().numpy().tobytes(),
        "text": str(private_tensor(crossed, "gamma").tolist()).encode(),
    }[form]
    found = look(crossed, noise(1, 30)[1:] + planted + noise(2, 30))
    wanted = {"text": "gamma"}.get(form, "key" if form in ("raw", "hex", "HEX") else "")
    assert any(f.startswith(wanted) and f.endswith(form) for f in found), found


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_printed_or_logged(
    workers: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        run(config("channel", workers=workers), tmp_path, bundle=digits())
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
