"""Settings: what is refused, in which words, and that nothing is lost on the way to a file."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkl.defenses import DefenseConfig
from fedkl.errors import ConfigError
from fedkl.federation import (
    DataConfig,
    FederationConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    config_from,
    load_config,
)
from fedkl.federation.config import differences
from fedkl.federation.remains import check_same

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "section": ({"trainning": {}}, "training"),
    "setting": ({"training": {"learning_rate": 1}}, "unknown setting 'learning_rate'"),
    "typo": ({"training": {"batch_sise": 1}}, "batch_size"),
    "not a table": ({"training": 3}, "expected a table"),
    "optimizer": ({"training": {"optimizer": "sdg"}}, "sgd"),
    "schedule": ({"training": {"schedule": "cosin"}}, "cosine"),
    "method": ({"federation": {"method": "fedavgg"}}, "fedavg"),
    "defense": ({"defense": {"name": "chanel"}}, "channel"),
    "two locks": ({"defense": {"name": "fedbn+channel"}}, "two locks"),
    "preset": ({"defense": {"name": "channel", "preset": "papre"}}, "paper"),
    "activation": ({"defense": {"name": "channel", "activation": "rellu"}}, "relu"),
    "law": ({"defense": {"name": "channel", "law": "unifrm"}}, "uniform"),
    "spread": ({"defense": {"name": "channel", "spread": -1.0}}, "spread"),
    "length": ({"defense": {"name": "channel", "length": 0}}, "length"),
    "data set": ({"data": {"dataset": "fashion-mnits"}}, "fashion-mnist"),
    "partition": ({"data": {"partition": "dirichlt"}}, "dirichlet"),
    "channels": ({"data": {"channels": 2}}, "1 or 3"),
    "image size": ({"data": {"image_size": 0}}, "image_size"),
    "samples": ({"data": {"samples": 0}}, "samples"),
    "shards": ({"data": {"shards_per_client": 0}}, "shards_per_client"),
    "alpha": ({"data": {"alpha": 0.0}}, "alpha"),
    "alpha nan": ({"data": {"alpha": float("nan")}}, "alpha"),
    "lr": ({"training": {"lr": 0}}, "lr must be a positive number"),
    "lr nan": ({"training": {"lr": float("nan")}}, "lr"),
    "lr infinite": ({"training": {"lr": float("inf")}}, "lr"),
    "lr too large": ({"training": {"lr": 1e40}}, "lr must be a number of at most 1e\\+30, got 1e"),
    "momentum too large": ({"training": {"momentum": 1e40}}, "momentum must be a number of at"),
    "weight decay too large": ({"training": {"weight_decay": 1e40}}, "weight_decay must be a"),
    "decay too large": (
        {"training": {"schedule": "step", "milestones": [2, 1], "decay": 1e20}},
        "lr after milestone 2 must be a number of at most",
    ),
    "alpha too large": ({"data": {"alpha": 1e308}}, "alpha must be a number of at most"),
    "lr text": ({"training": {"lr": "0.1"}}, "expected float, got '0.1'"),
    "lr truth": ({"training": {"lr": True}}, "expected float"),
    "momentum": ({"training": {"momentum": -0.1}}, "momentum"),
    "momentum infinite": ({"training": {"momentum": float("inf")}}, "momentum"),
    "nesterov": ({"training": {"momentum": 0}}, "nesterov"),
    "decay": ({"training": {"decay": -1.0}}, "decay"),
    "batch size": ({"training": {"batch_size": 0}}, "batch_size"),
    "batch size float": ({"training": {"batch_size": 2.5}}, "expected int"),
    "batch size truth": ({"training": {"batch_size": True}}, "expected int, got True"),
    "steps": ({"training": {"local_steps": 0}}, "local_steps"),
    "milestones": ({"training": {"milestones": ["a"]}}, r"milestones\[0\]: expected int"),
    "milestone": ({"training": {"milestones": 3}}, "milestones"),
    "zero clients": ({"federation": {"clients": 0}}, "clients"),
    "zero rounds": ({"federation": {"rounds": 0}}, "rounds"),
    "fraction": ({"federation": {"fraction": 0.0}}, "fraction"),
    "fraction above": ({"federation": {"fraction": 1.5}}, "fraction"),
    "dropout": ({"federation": {"dropout": -0.1}}, "dropout"),
    "min clients": ({"federation": {"clients": 10, "fraction": 0.2, "min_clients": 3}}, "only 2"),
    "centralized": ({"federation": {"method": "centralized", "min_clients": 2}}, "only 1"),
    "evaluation": ({"evaluation": {"images": 0}}, "images"),
    "thief": ({"evaluation": {"thief_images": 1}}, "thief_images"),
    "seed": ({"seed": -1}, "seed"),
    "seed text": ({"seed": "a"}, "seed: expected int"),
    "nothing": ({"seed": None}, "seed: expected int"),
    "workers": ({"workers": 0}, "workers"),
    "checkpoints": ({"checkpoint_every": 0}, "checkpoint_every"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        config_from(data, source="run.toml")
    assert str(caught.value).startswith("run.toml")
    assert "\n" not in str(caught.value)


def configs() -> st.SearchStrategy[RunConfig]:
    share = st.floats(0.01, 1)
    training = st.builds(
        TrainingConfig,
        optimizer=st.sampled_from(["sgd", "adam", "rmsprop", "adadelta"]),
        lr=st.floats(1e-6, 10),
        momentum=st.floats(0.1, 0.99),
        milestones=st.lists(st.integers(0, 300), max_size=4).map(tuple),
        batch_size=st.integers(1, 512),
        local_steps=st.none() | st.integers(1, 9),
        keep_momentum=st.booleans(),
    )
    federation = st.builds(
        FederationConfig,
        method=st.sampled_from(["centralized", "fedavg", "fedsgd"]),
        clients=st.integers(1, 10_000),
        fraction=share,
        dropout=st.floats(0, 1),
    )
    defense = st.sampled_from(
        [
            DefenseConfig(),
            DefenseConfig(name="fedbn", layers="first"),
            DefenseConfig(name="channel", preset="paper", length=16),
            DefenseConfig(name="channel", spread=2.5, bias=True, chain=True),
        ]
    )
    data = st.builds(DataConfig, root=st.none() | st.text(), alpha=share, augment=st.booleans())
    return st.builds(
        RunConfig,
        data=data,
        model=st.builds(ModelConfig, name=st.text(), init=st.none() | st.text()),
        training=training,
        federation=federation,
        defense=defense,
        seed=st.integers(0, 2**40),
    )


def toml(data: dict[str, Any]) -> str:
    """Just enough of a TOML writer; what is None is left out."""
    lines, tables = [], []
    for name, value in data.items():
        if isinstance(value, dict):
            tables.append(f"[{name}]\n{toml(value)}")
        elif value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join([*lines, *tables])


@given(configs())
def test_nothing_is_lost_in_json(config: RunConfig) -> None:
    assert config_from(json.loads(json.dumps(config.to_dict()))) == config


@given(configs())
def test_nothing_is_lost_in_toml(config: RunConfig) -> None:
    data = config.to_dict()
    data["model"]["name"], data["data"]["root"] = (
        "lenet",
        "some folder",
    )
    data["model"]["init"] = None
    assert config_from(tomllib.loads(toml(data))) == config_from(data)


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[training]\nlr = 1\nmilestones = [1, 2]\n[defense]\nname = "norm"\n')
    config = config_from(load_config(path), source=str(path))
    assert config.seed == 3
    assert config.training.lr == 1.0
    assert isinstance(config.training.lr, float)
    assert config.training.milestones == (1, 2)
    assert config.defense.name == "norm"
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    path.write_text("seed = = 3\n")
    with pytest.raises(ConfigError, match="line 1"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)


@given(configs(), configs())
def test_differences_are_all_named(a: RunConfig, b: RunConfig) -> None:
    assert (differences(a, b) == []) == (a == b)


def test_what_a_resumed_run_may_change() -> None:
    base = RunConfig()
    more = dataclasses.replace(base.federation, rounds=50)
    check_same(base, dataclasses.replace(base, workers=2, checkpoint_every=3, federation=more))
    for change in ({"seed": 1}, {"defense": DefenseConfig(name="norm")}):
        with pytest.raises(ConfigError, match="other settings"):
            check_same(base, dataclasses.replace(base, **change))  # type: ignore[arg-type]
    cosine = dataclasses.replace(base, training=TrainingConfig(schedule="cosine"))
    with pytest.raises(ConfigError, match=r"federation.rounds: 20 → 50"):
        check_same(cosine, dataclasses.replace(cosine, federation=more))
