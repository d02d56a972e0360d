"""Flower's strategies, secure aggregation and differential privacy on top of FedKL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedhelp import Stopped, assert_same, config, make_keys, stop_after, with_keys
from flowhelp import Loopback, everything_in, loopback, serve
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAdam
from torch import Tensor

from fedkl.errors import CheckpointError, ConfigError, FederationError
from fedkl.federation import RunConfig, run
from fedkl.federation.session import Session
from fedkl.files import read_tensors
from fedkl.flower import FlowerConfig
from fedkl.flower.wire import packed, packed_record, split, unpacked

SHORT = {"length": 64}
BASE = config(
    "channel",
    defense_settings=SHORT,
    model={"name": "lenet"},
    data={"samples": 200},
    evaluation={"every": 0, "images": 20, "wrong_keys": 1},
)


def prepared(tmp_path: Path, name: str, clients: int = 3) -> Path:
    keys = tmp_path / "keys"
    return with_keys(tmp_path / name, keys if keys.exists() else make_keys(keys, clients, 64))


def once(tmp_path: Path, wanted: RunConfig, name: str, **settings: Any) -> tuple[Any, Loopback]:
    flower = FlowerConfig(folder=str(prepared(tmp_path, name)), **settings)
    grid = loopback(wanted, flower)
    return serve(grid, wanted, flower), grid


def distance(a: Any, b: Any) -> float:
    return float((packed(a).double() - packed(b).double()).abs().max())


OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"server_momentum": 0.5},
    "fedadam": {"eta": 0.01},
    "fedprox": {"proximal_mu": 0.1},
    "fedmedian": {},
    "trimmed-mean": {"beta": 0.34},
    "krum": {"num_malicious_nodes": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_strategies_of_flower(name: str, tmp_path: Path) -> None:
    own = run(BASE, prepared(tmp_path, "own"))
    found, _ = once(
        tmp_path, BASE, name, strategy=name, options=tuple(sorted(OPTIONS[name].items()))
    )
    assert found.shared.keys() == own.shared.keys()
    assert all(found.shared[n].dtype == t.dtype for n, t in own.shared.items())
    gap = distance(found.shared, own.shared)
    if name == "fedavg":
        assert gap < 1e-6  # float32 against float64 sums
    else:
        assert 1e-4 < gap < 2
        assert all(bool(torch.isfinite(t).all()) for t in found.shared.values())
    assert (tmp_path / name / "checkpoints" / "round-000002.json").exists()


def test_a_strategy_of_the_caller(tmp_path: Path) -> None:
    flower = FlowerConfig(folder=str(prepared(tmp_path, "run")))
    adam = FedAdam(eta=0.01, min_train_nodes=1, min_available_nodes=1)
    found = serve(loopback(BASE, flower), BASE, flower, strategy=adam)
    named, _ = once(tmp_path, BASE, "named", strategy="fedadam", options=(("eta", 0.01),))
    assert_same(found.shared, named.shared)


@pytest.mark.parametrize("name", ["fedadam", "fedavgm", "fedprox"])
def test_a_strategy_goes_on_after_a_restart(name: str, tmp_path: Path) -> None:
    """With the momentum it had: the same bits as without a restart."""
    options = tuple(sorted(OPTIONS[name].items()))
    whole, _ = once(tmp_path, BASE, "whole", strategy=name, options=options)
    first = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    once(tmp_path, first, "parts", strategy=name, options=options)
    flower = FlowerConfig(folder=str(tmp_path / "parts"), strategy=name, options=options)
    again = serve(loopback(BASE, flower), BASE, flower)
    assert_same(again.shared, whole.shared)
    assert (tmp_path / "parts" / "strategy").exists() == (name != "fedprox")


@pytest.mark.parametrize("name", ["fedadam", "fedavgm"])
def test_a_strategy_goes_on_from_a_checkpoint_of_long_ago(name: str, tmp_path: Path) -> None:
    federation = dataclasses.replace(BASE.federation, rounds=8)
    wanted = dataclasses.replace(BASE, federation=federation, checkpoint_every=4)
    options = tuple(sorted(OPTIONS[name].items()))
    whole, _ = once(tmp_path, wanted, "whole", strategy=name, options=options)
    folder = prepared(tmp_path, "parts")
    flower = FlowerConfig(folder=str(folder), strategy=name, options=options)
    with pytest.raises(Stopped):
        serve(loopback(wanted, flower), wanted, flower, on_event=stop_after(7))
    assert [p.stem for p in (folder / "checkpoints").glob("round-*.json")] == ["round-000004"]
    again = serve(loopback(wanted, flower), wanted, flower)
    assert_same(again.shared, whole.shared)
    kept = sorted(path.stem for path in (folder / "strategy").iterdir())
    assert kept == ["round-000004", "round-000008"]


@pytest.mark.parametrize("name", ["fedadam", "fedavgm"])
def test_a_lost_momentum_is_refused(name: str, tmp_path: Path) -> None:
    first = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    options = tuple(sorted(OPTIONS[name].items()))
    once(tmp_path, first, "run", strategy=name, options=options)
    path = tmp_path / "run" / "strategy" / "round-000001.safetensors"
    path.unlink()
    flower = FlowerConfig(folder=str(tmp_path / "run"), strategy=name, options=options)
    with pytest.raises(CheckpointError, match=f"{path.name}.*is missing.*restore"):
        serve(loopback(BASE, flower), BASE, flower)


def test_fedavgm_without_momentum_has_none_to_lose(tmp_path: Path) -> None:
    first = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    once(tmp_path, first, "run", strategy="fedavgm", options=(("server_momentum", 0.0),))
    assert not (tmp_path / "run" / "strategy").exists()
    flower = FlowerConfig(
        folder=str(tmp_path / "run"), strategy="fedavgm", options=(("server_momentum", 0.0),)
    )
    serve(loopback(BASE, flower), BASE, flower)


def test_fedprox_pulls_towards_the_global_state(tmp_path: Path) -> None:
    near, _ = once(tmp_path, BASE, "near", strategy="fedprox", options=(("proximal_mu", 15.0),))
    far, _ = once(tmp_path, BASE, "far", strategy="fedprox", options=(("proximal_mu", 0.0),))
    plain, _ = once(tmp_path, BASE, "plain", strategy="fedavg")
    start = start_of(BASE, tmp_path)
    assert distance(near.shared, start) < 0.5 * distance(far.shared, start)
    assert_same(far.shared, plain.shared)


def start_of(wanted: RunConfig, tmp_path: Path) -> Any:
    return Session(wanted, tmp_path / "start").initial()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "fedadam", "options": (("beta", 1),)}, "beta"),
        ({"strategy": "trimmed-mean", "options": (("beta", 0.9),)}, "0.5"),
        ({"strategy": "fedkl", "options": (("eta", 1),)}, "no options"),
    ],
)
def test_bad_options(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        once(tmp_path, BASE, "run", **settings)


def test_a_strategy_that_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="fraction_train"):
        once(tmp_path, BASE, "run", strategy="fedavg", options=(("fraction_train", 0.5),))


def test_counters_of_shared_norms_survive_a_strategy(tmp_path: Path) -> None:
    """Flower's aggregation would turn num_batches_tracked into a float."""
    wanted = dataclasses.replace(
        config("none", evaluation={"every": 0, "images": 20}), defense=config("none").defense
    )
    found, _ = once(tmp_path, wanted, "run", strategy="fedavg")
    counters = {n: t for n, t in found.shared.items() if n.endswith("num_batches_tracked")}
    assert len(counters) == 2
    assert all(t.dtype == torch.int64 for t in counters.values())


# --- secure aggregation ---------------------------------------------------------------------------


def test_secure_aggregation_equals_plain_within_quantization(tmp_path: Path) -> None:
    one_round = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    plain = run(one_round, prepared(tmp_path, "plain"))
    found, _ = once(tmp_path, one_round, "secret", secagg=True)
    # 2^22 steps over ±4; every client rounds each weight to a whole step, and has weight one.
    step = 2 * 4.0 / 2**22
    assert 0 < distance(found.shared, plain.shared) <= step
    both, _ = once(tmp_path, BASE, "two rounds", secagg=True)
    again = run(BASE, prepared(tmp_path, "two plain rounds"))
    assert distance(both.shared, again.shared) < 1e-3


@pytest.mark.parametrize("weighted", [True, False])
def test_secure_aggregation_weights_as_the_engine_does(weighted: bool, tmp_path: Path) -> None:
    wanted = dataclasses.replace(
        BASE,
        data=dataclasses.replace(BASE.data, samples=None, partition="dirichlet", alpha=0.3),
        federation=dataclasses.replace(BASE.federation, rounds=1, weighted=weighted),
    )
    assert len({len(part) for part in Session(wanted, tmp_path / "parts").parts}) > 1
    plain = run(wanted, prepared(tmp_path, "plain"))
    found, _ = once(tmp_path, wanted, "secret", secagg=True)
    assert distance(found.shared, plain.shared) < 1e-4


def test_the_server_never_holds_an_update(tmp_path: Path) -> None:
    """Everything that reaches the server is searched for what each client had computed."""
    one_round = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    _, open_grid = once(tmp_path, one_round, "open", save_updates=True)
    updates, changes = updates_of(tmp_path / "open", start_of(one_round, tmp_path))
    assert len(changes) == 3
    # The search finds an update where it is sent as it is ...
    assert all(any(near(update, v) for v in everything_in(open_grid)) for update in updates)
    # ... and nothing close to one under secure aggregation, masked vectors included.
    _, grid = once(tmp_path, one_round, "secret", secagg=True)
    vectors = everything_in(grid)
    assert sum(len(v) == len(changes[0]) for v in vectors) == 3
    assert not any(near(secret, v) for v in vectors for secret in [*updates, *changes])


def updates_of(folder: Path, start: dict[str, Tensor]) -> tuple[list[Any], list[Any]]:
    """Each client's state after training, and its change, as vectors."""
    paths = sorted((folder / "updates" / "round-000001").glob("client-*.safetensors"))
    found = [read_tensors(path)[0] for path in paths]
    states = [packed({name: tensors[name] for name in start}).numpy() for tensors in found]
    return states, [state - packed(start).numpy() for state in states]


def near(update: np.ndarray[Any, Any], vector: np.ndarray[Any, Any]) -> bool:
    """Whether a vector goes along with an update; masked ones do not (|cos| < 1/√n ≈ 0.01)."""
    if len(vector) != len(update):
        return False
    a, b = update - update.mean(), vector - vector.mean()
    return abs(float(a @ b)) > 0.1 * float(np.linalg.norm(a) * np.linalg.norm(b))


def test_a_change_out_of_range_is_refused_by_the_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FederationError, match="min_clients"):
        once(tmp_path, BASE, "run", secagg=True, clipping_range=1e-3)
    assert "clipping range" in caplog.text


def test_secure_aggregation_goes_on_without_a_client(tmp_path: Path) -> None:
    wanted = dataclasses.replace(
        BASE, federation=dataclasses.replace(BASE.federation, clients=4, rounds=1)
    )
    flower = FlowerConfig(folder=str(prepared(tmp_path, "run", 4)), secagg=True, retries=0)
    grid = loopback(wanted, flower)

    def lose(node: int, message: Message) -> bool:
        configs = message.content.config_records
        return node == 999 and "fitins.config" in configs  # it vanishes after sharing its keys

    grid.lose = lose
    found = serve(grid, wanted, flower)
    assert len(found.accuracy.own_per_client) == 3
    keys = prepared(tmp_path, "plain", 4)
    plain = run(wanted, keys)
    assert 1e-4 < distance(found.shared, plain.shared) < 1


# --- differential privacy -------------------------------------------------------------------------


def test_flowers_mod_alone_spares_scalars() -> None:
    """Why FedKL hands DP one vector: a 0-d tensor is neither clipped nor noised by itself."""
    start = {"weight": torch.zeros(3), "scale": torch.tensor(0.0)}
    after = {"weight": torch.ones(3), "scale": torch.tensor(50.0)}
    raw = through_local_dp(as_record(start), as_record(after)).to_numpy_ndarrays()
    assert float(raw[1]) == 50.0
    vector = through_local_dp(packed_record(start), packed_record(after))
    found = unpacked(vector, start)
    assert 0 < abs(float(found["scale"])) < 2.0
    assert not found["weight"].equal(torch.ones(3))


def as_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({n: Array(t.numpy()) for n, t in tensors.items()})


def through_local_dp(start: ArrayRecord, after: ArrayRecord) -> Any:
    mod = LocalDpMod(clipping_norm=1.0, sensitivity=0.01, epsilon=1.0, delta=0.1)
    message = Message(
        RecordDict({"arrays": start, "config": ConfigRecord()}), dst_node_id=1, message_type="train"
    )

    def app(inside: Message, context: object) -> Message:
        content = RecordDict({"arrays": after, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=inside)

    return mod(message, None, app).content["arrays"]


@pytest.mark.parametrize("dp", ["local", "client", "server"])
def test_differential_privacy_clips_and_noises_every_weight(dp: str, tmp_path: Path) -> None:
    one_round = dataclasses.replace(BASE, federation=dataclasses.replace(BASE.federation, rounds=1))
    start = start_of(one_round, tmp_path)
    quiet = {"clip": 0.05, "noise": 1e-9, "epsilon": 1e9}
    clipped, _ = once(tmp_path, one_round, "clipped", dp=dp, **quiet)
    change = (packed(clipped.shared) - packed(start)).norm()
    assert 0.02 < change <= 0.0501
    noisy, _ = once(tmp_path, one_round, "noisy", dp=dp, clip=0.05, noise=10.0, epsilon=0.1)
    moved = {n: (noisy.shared[n] - clipped.shared[n]).abs() for n in clipped.shared}
    assert all(bool((t > 0).all()) for t in moved.values())


def test_a_0d_parameter_is_clipped_and_noised_too(tmp_path: Path) -> None:
    wanted = config(
        "none",
        model={"name": "flowhelp:scaled"},
        data={"samples": 100},
        federation={"rounds": 1},
        evaluation={"every": 0, "images": 20},
    )
    start = start_of(wanted, tmp_path)
    assert start["scale"].shape == ()
    found, _ = once(tmp_path, wanted, "run", dp="local", clip=0.05, epsilon=0.5)
    assert not found.shared["scale"].equal(start["scale"])
    quiet, _ = once(tmp_path, wanted, "quiet", dp="local", clip=0.05, epsilon=1e9)
    assert abs(float(quiet.shared["scale"] - start["scale"])) <= 0.0501


def test_secure_aggregation_of_noised_updates(tmp_path: Path) -> None:
    found, _ = once(tmp_path, BASE, "run", secagg=True, dp="local", clip=0.5, epsilon=100.0)
    assert all(bool(torch.isfinite(t).all()) for t in found.shared.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"secagg": True, "strategy": "krum"},
        {"secagg": True, "dp": "server"},
        {"secagg": True, "save_updates": True},
        {"strategy": "fedadm"},
        {"dp": "global"},
        {"clip": 0.0},
        {"timeout": -1.0},
        {"retries": -1},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FlowerConfig(**settings)


def test_packing_is_undone_by_splitting() -> None:
    state = {
        "a": torch.randn(3, 2),
        "count": torch.tensor(7),
        "scale": torch.tensor(0.25, dtype=torch.float16),
    }
    again = split(packed(state), state)
    assert_same(again, state)
    other_order = {name: state[name] for name in reversed(state)}
    assert_same(split(packed(other_order), state), state)
    assert packed(state).dtype == torch.float32
    assert packed({**state, "w": torch.zeros(1, dtype=torch.float64)}).dtype == torch.float64
