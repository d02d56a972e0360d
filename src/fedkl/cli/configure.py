"""From presets, a TOML file and flags to one configuration, and options made from the table."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedkl.cli.settings import METHODS, PANELS, PRESETS, SETTINGS, Setting
from fedkl.errors import ConfigError, unknown

if TYPE_CHECKING:
    from fedkl.cli.needs import Need
    from fedkl.federation import RunConfig

SHORT = "fedkl"  # --method fedkl


def with_settings(
    command: Callable[..., None],
    *,
    without: Sequence[str] = (),
    panel: str | None = None,
    start: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[..., None]:
    """Replaces the parameter ``settings`` of ``command`` by one option per setting of a run.

    ``settings`` then holds what was given, by path; what was not given is not in it. ``without``
    lists the paths of settings that the command has flags of its own for. ``panel`` is the heading
    of all options in the help, instead of one for every section. ``start`` are the settings that
    the command starts from, by section, where they are not the defaults of a run.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "settings"]
    taken = [_started(s, start or {}) for s in SETTINGS if s.path not in without]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {s.path: v for s in taken if (v := values.pop(s.name)) is not None}
        if "training.milestones" in given:
            given["training.milestones"] = _integers(given["training.milestones"])
        command(settings=given, **values)

    options = [
        _option(s, panel or own_panel)
        for name, own_panel in PANELS.items()
        for s in taken
        if s.section == name
    ]
    made = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *options]]
    wrapper.__dict__["__signature__"] = signature.replace(parameters=made)
    return wrapper


def _started(setting: Setting, start: Mapping[str, Mapping[str, Any]]) -> Setting:
    """``setting`` with the default that a command which begins with ``start`` has."""
    own = start.get(setting.section, {})
    name = setting.path.rpartition(".")[2]
    return dataclasses.replace(setting, default=own[name]) if name in own else setting


def _option(setting: Setting, panel: str) -> inspect.Parameter:
    kind = str if setting.kind is tuple else setting.kind
    option = typer.Option(
        None, setting.flag, help=setting.text, rich_help_panel=panel, show_default=False
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None
    )


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--milestones: expected integers with commas, as in 60,120,160, got {text!r}."
        ) from None


def nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path as sections: ``{"training.lr": 1}`` → ``{"training": {"lr": 1}}``."""
    data: dict[str, Any] = {}
    for path, value in given.items():
        section, _, name = path.rpartition(".")
        (data.setdefault(section, {}) if section else data)[name] = value
    return data


def merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``top`` laid over it, section by section.

    Raises:
        ConfigError: What is a section in ``top`` is none in ``base``.
    """
    data = dict(base)
    for name, value in top.items():
        if not isinstance(value, Mapping):
            data[name] = value
        elif isinstance(old := data.get(name, {}), Mapping):
            data[name] = merged(old, value)
        else:
            raise ConfigError(f"{name}: expected a table of settings, got {old!r}.")
    return data


def build_config(
    *,
    flags: Mapping[str, Any],
    file: Path | None = None,
    preset: str | None = None,
    base: Mapping[str, Any] | None = None,
    defenses: Sequence[str] = (),
) -> RunConfig:
    """A configuration from, the later winning: ``base``, ``preset``, ``file``, ``flags``.

    Args:
        flags: Values by path, only those that were given.
        file: TOML file.
        preset: Name in ``PRESETS``.
        base: Nested settings to start from, such as those of a run to be resumed.
        defenses: Those that the configuration will be used with, where not only with its own.

    Raises:
        ConfigError: Something is unknown, of the wrong type or out of range, or a flag or an entry
            of the file has no effect beside the rest; the message names the file or the flag.
    """
    from fedkl.federation import config_from, load_config

    data = dict(base or {})
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(unknown("preset", preset, PRESETS))
        data = merged(data, PRESETS[preset])
    loaded = {} if file is None else load_config(file)
    over = merged(loaded, nested(flags))
    data = _spelled_out(merged(data, over), over)
    sources = [str(file)] if file is not None else []
    sources += ["the command line"] if flags or not sources else []
    try:
        config = config_from(data, source=" and ".join(sources))
    except ConfigError as error:
        raise ConfigError(_naming_the_flag(str(error), flags)) from error
    _check_needs(config, flags, _paths(loaded), file, defenses)
    return config


def _paths(data: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The paths of all values in nested settings."""
    found: set[str] = set()
    for name, value in data.items():
        path = prefix + name
        found |= _paths(value, f"{path}.") if isinstance(value, Mapping) else {path}
    return found


def _check_needs(
    config: RunConfig,
    flags: Mapping[str, Any],
    filed: set[str],
    file: Path | None,
    defenses: Sequence[str],
) -> None:
    """Raises when something that was given does nothing; what was not given never matters."""
    used = [config]
    if defenses:
        named = [dataclasses.replace(config.defense, name=name) for name in defenses]
        used = [dataclasses.replace(config, defense=defense) for defense in named]
    for setting in SETTINGS:
        if setting.path not in flags and setting.path not in filed:
            continue
        needs = [need for need in setting.needs if need.filed or setting.path in flags]
        lacking = [[need for need in needs if not need.holds(one)] for one in used]
        if not all(lacking):
            continue
        need = lacking[0][0]
        flag = setting.flag.replace("/", " or ")
        where = flag if setting.path in flags else f"{setting.path} in {file}"
        got = _got(need, config, defenses)
        raise ConfigError(
            f"{where} does nothing here: it is for {need.said}, got {got}; leave it out, or "
            "change that."
        )


def _got(need: Need, config: RunConfig, defenses: Sequence[str]) -> str:
    """The value that decides ``need``, as it is written on the command line."""
    if need.path == "defense.name" and defenses:
        return f"--defenses {','.join(defenses)}"
    section, _, name = need.path.rpartition(".")
    value = getattr(getattr(config, section), name)
    (flag,) = (s.flag for s in SETTINGS if s.path == need.path)
    yes, _, no = flag.partition("/")
    return (yes if value else no) if no else f"{flag} {value}"


def _spelled_out(data: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``method = fedkl`` in full, and no lock preset for a defense that has no lock."""
    federation, defense = data.get("federation", {}), data.get("defense", {})
    if not isinstance(federation, Mapping) or not isinstance(defense, Mapping):
        return data  # config_from says what is wrong with it
    method = federation.get("method")
    asked = over.get("defense", {}).get("name")
    if isinstance(method, str) and method not in METHODS:
        raise ConfigError(unknown("method", method, METHODS))
    if method == SHORT:
        if asked is not None and not {"pad", "channel"} & set(str(asked).split("+")):
            raise ConfigError(
                f"--method fedkl is fedavg with defense pad or channel, got defense {asked!r}; "
                "give --method fedavg, or leave --defense out."
            )
        # The presets are of the channel lock, as published.
        usual = "channel" if defense.get("preset") else "pad"
        extra = {"federation": {"method": "fedavg"}, "defense": {"name": asked or usual}}
        data = merged(data, extra)
        defense = data["defense"]
    locked = "channel" in str(defense.get("name", "none"))
    if not locked and "preset" not in over.get("defense", {}) and defense.get("preset"):
        data = merged(data, {"defense": {"preset": None}})
    return data


def _naming_the_flag(message: str, flags: Mapping[str, Any]) -> str:
    """``message`` with the flag that gave the offending value, where that is plain."""
    there = [
        setting
        for setting in SETTINGS
        if setting.path in flags and (not setting.section or f", {setting.section}:" in message)
    ]
    by_name = [s for s in there if _says(rf"\b{s.path.rpartition('.')[2]}\b", message)]
    # A number stands in many a message that is not about it, as in "at least 1".
    by_value = [s for s in there if _says(_value(flags[s.path]), message)]
    found = [*by_name, *by_value]
    return f"{message} (given as {found[0].flag.partition('/')[0]})" if found else message


def _says(pattern: str, message: str) -> bool:
    return re.search(pattern, message.partition(":")[2]) is not None


def _value(value: Any) -> str:
    quoted = re.escape(repr(value))
    return quoted if isinstance(value, str) else rf"\bgot {quoted}(?![\w.])"
