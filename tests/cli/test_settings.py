"""The table of settings agrees with the dataclasses and registries it stands for."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from fedkl.attacks import ATTACKS, EFFORTS
from fedkl.audit import STAGES, AuditConfig
from fedkl.cli import settings
from fedkl.cli.configure import build_config
from fedkl.cli.settings import PRESETS, SETTINGS
from fedkl.data import DATASETS, PARTITIONS
from fedkl.defenses import DEFENSES, Defense, DefenseConfig, Noise, Prune
from fedkl.defenses.registry import _SETTINGS
from fedkl.errors import ConfigError
from fedkl.federation import METHODS, RunConfig
from fedkl.federation.config import ON_SPENT
from fedkl.federation.optim import OPTIMIZERS, SCHEDULES
from fedkl.locking import PRESETS as LOCK_PRESETS
from fedkl.locking.pad import LEARNED, SCALE_LAWS
from fedkl.locking.schemes import KEY_LAWS, SCHEMES
from fedkl.locking.sources import ACTIVATIONS
from fedkl.models import MODELS
from fedkl.observation import THREATS


def fields() -> dict[str, tuple[Any, Any]]:
    """path → (type, default) of every field of a configuration."""
    default, found = RunConfig(), {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        if not dataclasses.is_dataclass(hint):
            found[name] = (hint, getattr(default, name))
            continue
        for inner, kind in typing.get_type_hints(hint).items():
            found[f"{name}.{inner}"] = (kind, getattr(getattr(default, name), inner))
    return found


def bare(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        (hint,) = set(typing.get_args(hint)) - {type(None)}
    return typing.get_origin(hint) or hint


def test_every_field_has_one_flag_with_its_type_and_default() -> None:
    assert len({s.path for s in SETTINGS}) == len({s.flag for s in SETTINGS}) == len(SETTINGS)
    table = {s.path: (s.kind, s.default) for s in SETTINGS}
    assert table == {path: (bare(hint), value) for path, (hint, value) in fields().items()}


@pytest.mark.parametrize(
    "path, names",
    [
        ("federation.method", [*METHODS, "fedkl"]),
        ("data.dataset", DATASETS),
        ("data.partition", PARTITIONS),
        ("model.name", MODELS),
        ("defense.name", DEFENSES),
        ("defense.preset", LOCK_PRESETS),
        ("defense.activation", ACTIVATIONS),
        ("defense.law", KEY_LAWS),
        ("defense.scale_law", SCALE_LAWS),
        ("defense.inner_scale_law", SCALE_LAWS),
        ("defense.learned", LEARNED),
        ("renewal.on_spent", ON_SPENT),
        ("training.optimizer", OPTIMIZERS),
        ("training.schedule", SCHEDULES),
    ],
)
def test_choices_are_those_of_the_registry(path: str, names: typing.Iterable[str]) -> None:
    (setting,) = [s for s in SETTINGS if s.path == path]
    assert set(setting.choices) == set(names)
    assert all(name in setting.text for name in names)


def test_defaults_by_defense_are_those_of_the_schemes() -> None:
    for setting in SETTINGS:
        name = setting.path.rpartition(".")[2]
        if setting.section != "defense" or setting.default is not None or name == "preset":
            assert not setting.defaults
            continue
        schemes = {one: SCHEMES[one]() for one in ("channel", "pad", "open-pad")}
        has = {one: s.settings()[name] for one, s in schemes.items() if name in s.settings()}
        plain: dict[str, Defense] = {"noise": Noise(), "prune": Prune()}
        has |= {one: getattr(value, name) for one, value in plain.items() if hasattr(value, name)}
        assert dict(setting.defaults) == {one: v for one, v in has.items() if v is not None}


def test_settings_of_a_defense_say_so_and_are_those_it_reads() -> None:
    for setting in SETTINGS:
        name = setting.path.rpartition(".")[2]
        readers = {d for d, names in _SETTINGS.items() if name in names}
        if setting.section != "defense" or not readers:
            continue
        assert (
            f"Only for --defense {' or '.join(d for d in DEFENSES if d in readers)}" in setting.text
        )
        for defense in DEFENSES:
            config = RunConfig(defense=DefenseConfig(name=defense))
            assert setting.needs[0].holds(config) == (defense in readers)


def test_a_need_is_of_an_option_that_exists() -> None:
    paths = {setting.path for setting in SETTINGS}
    assert {need.path for setting in SETTINGS for need in setting.needs} <= paths


def test_an_audit_takes_what_any_of_its_defenses_takes() -> None:
    flags = {"defense.length": 64}
    config = build_config(flags=flags, defenses=["none", "channel"])
    assert config.defense.length == 64
    with pytest.raises(ConfigError, match=r"--key-length does nothing .*--defenses none,norm"):
        build_config(flags=flags, defenses=["none", "norm"])
    preset = build_config(flags={"defense.preset": "paper"}, defenses=["none", "channel"])
    audit = AuditConfig(run=preset)
    assert audit.defended("channel", 0).defense.preset == "paper"
    assert audit.defended("norm", 0).defense.preset is None


@pytest.mark.parametrize(
    "flag, path, value, user",
    [("--clip", "clip", 1.0, "noise"), ("--noise-multiplier", "noise_multiplier", 0.1, "noise"),
     ("--prune-ratio", "prune_ratio", 0.5, "prune")],
)  # fmt: skip
def test_settings_of_the_baselines_are_for_who_uses_them(
    flag: str, path: str, value: float, user: str
) -> None:
    flags = {f"defense.{path}": value, "defense.name": f"norm+{user}"}
    assert getattr(build_config(flags=flags).defense, path) == value
    other = {"noise": "pad+prune", "prune": "pad+noise"}[user]
    words = (
        rf"{flag} does nothing here: it is for --defense {user}, got --defense {re.escape(other)}"
    )
    with pytest.raises(ConfigError, match=words):
        build_config(flags={**flags, "defense.name": other})
    asked = {f"defense.{path}": value}
    assert build_config(flags=asked, defenses=["none", f"norm+{user}"])
    with pytest.raises(ConfigError, match=rf"{flag} does nothing here"):
        build_config(flags=asked, defenses=["none", "norm", other])
    with pytest.raises(ConfigError, match=rf"{path}.*got -1.*\(given as {flag}\)"):
        build_config(flags={**flags, f"defense.{path}": -1.0})


def test_what_comes_from_a_run_or_a_preset_needs_no_effect() -> None:
    base = {"renewal": {"budget": 9}, "data": {"alpha": 3.0}, "defense": {"length": 5}}
    assert build_config(flags={"data.channels": 1}, base=base).renewal.budget == 9
    assert build_config(flags={"defense.name": "norm"}, preset="paper").training.decay == 0.2


def test_what_a_lock_is_examined_on_may_stand_in_a_file_of_many_runs(tmp_path: Path) -> None:
    file = tmp_path / "runs.toml"
    file.write_text("[evaluation]\nwrong_keys = 3\nthief_images = 50\n[defense]\ngain = 2.0\n")
    flags = {"defense.name": "pad", "defense.learned": "none"}
    assert build_config(flags=flags, file=file).evaluation.wrong_keys == 3
    file.write_text("[evaluation]\nwrong_keys = 3\nthief_images = 50\ncalibration_images = 9\n")
    assert build_config(flags={"defense.name": "norm"}, file=file).evaluation.thief_images == 50


def test_settings_of_inner_locks_need_a_second_one() -> None:
    flags = {"defense.name": "pad", "defense.layers": "first", "defense.inner_spread": 2.0}
    with pytest.raises(ConfigError, match="--inner-spread does nothing"):
        build_config(flags=flags)
    flags |= {"defense.lock_head_input": True}
    assert build_config(flags=flags).defense.inner_spread == 2.0
    learned = {"defense.learned": "none", "defense.gain": 2.0}
    assert build_config(flags=learned, defenses=["channel", "pad"]).defense.gain == 2.0


@pytest.mark.parametrize(
    "names, choices",
    [
        (settings.ATTACKS, ATTACKS),
        (settings.THREATS, THREATS),
        (settings.EFFORTS, EFFORTS),
        (settings.STAGES, STAGES),
    ],
)
def test_names_of_an_audit_are_those_of_the_registry(
    names: tuple[str, ...], choices: typing.Iterable[str]
) -> None:
    assert names == tuple(choices)


def test_inserted_norms_are_those_that_the_lock_takes() -> None:
    for name in settings.INSERTED:
        build_config(flags={"defense.name": "channel", "defense.norm": name})


def test_nothing_given_is_the_default() -> None:
    assert build_config(flags={}) == RunConfig()


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nlr = 0.5\nmomentum = 0.5\n[federation]\nrounds = 7\n")
    config = build_config(
        base={"training": {"batch_size": 8, "lr": 9.0}, "seed": 3},
        preset="paper",
        file=file,
        flags={"training.lr": 0.25},
    )
    assert config.training.lr == 0.25  # flag over file over preset over base
    assert config.training.momentum == 0.5  # file over preset
    assert config.training.batch_size == 64  # preset over base
    assert config.federation.rounds == 7
    assert config.seed == 3  # nobody else said anything
    assert config.training.keep_momentum


def test_preset_paper_is_section_1_of_the_paper() -> None:
    config = build_config(flags={}, preset="paper")
    training, federation, defense = config.training, config.federation, config.defense
    assert (training.optimizer, training.lr, training.momentum) == ("sgd", 0.01, 0.9)
    assert (training.nesterov, training.weight_decay) == (True, 5e-4)
    assert (training.schedule, training.milestones) == ("step", (60, 120, 160))
    assert (training.decay, training.batch_size, training.local_epochs) == (0.2, 64, 1)
    assert training.keep_momentum
    assert (federation.method, federation.clients, federation.rounds) == ("fedavg", 3, 200)
    assert (federation.weighted, config.data.partition) == (False, "iid")
    assert (defense.name, defense.preset, defense.share_statistics) == ("channel", "paper", True)


def test_preset_with_another_defense_drops_the_lock() -> None:
    config = build_config(flags={"defense.name": "norm"}, preset="paper")
    assert (config.defense.name, config.defense.preset) == ("norm", None)
    assert config.training.lr == 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str) -> None:
    assert build_config(flags={}, preset=name) != RunConfig()


def test_method_fedkl_is_fedavg_with_a_pad_unless_another_lock_is_asked_for(tmp_path: Path) -> None:
    config = build_config(flags={"federation.method": "fedkl"})
    assert (config.federation.method, config.defense.name) == ("fedavg", "pad")
    for flags in ({"defense.name": "channel"}, {"defense.preset": "paper"}):
        other = build_config(flags={"federation.method": "fedkl", **flags})
        assert (other.federation.method, other.defense.name) == ("fedavg", "channel")
    file = tmp_path / "run.toml"
    file.write_text('[federation]\nmethod = "fedkl"\n')
    assert build_config(flags={}, file=file) == config


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"training.lr": -1.0}, "--lr"),
        ({"seed": -1}, "--seed"),
        ({"federation.clients": 0, "seed": 1}, "--clients"),
        ({"data.dataset": "fashon-mnist"}, "--dataset"),
        ({"data.channels": 1, "data.samples": 0}, "--samples"),
        ({"defense.name": "channel", "defense.spread": -1.0}, "--spread"),
    ],
)
def test_message_names_the_flag(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"\(given as {said}\)$"):
        build_config(flags=flags)


def test_message_names_the_file_and_no_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[training]\nlr = -1.0\n")
    with pytest.raises(ConfigError, match=r"run\.toml, training: lr .*-1\.0\.$"):
        build_config(flags={}, file=file)


@pytest.mark.parametrize("command", ["audit", "certify"])
def test_help_tells_the_defaults_that_a_command_starts_from(command: str) -> None:
    module = importlib.import_module(f"fedkl.cli.{command}")
    options = inspect.signature(getattr(module, command)).parameters
    for section, values in module.START.items():
        for name, value in values.items():
            if option := options.get(f"{section}_{name}"):
                assert option.default.help.endswith(f" Default: {value}.")
    assert options["data_channels"].default.help.endswith(" Default: 1.")
    assert options["data_image_size"].default.help.endswith(" Default: 32.")
