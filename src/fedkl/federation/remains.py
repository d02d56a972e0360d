"""What an interrupted or finished run must still have, before anything goes on from it.

A run that has lost a part would make a fresh one in its place, without a word: a new key, a lock
that has learned nothing, or the first round once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkl.defenses import Composed, LockDefense, make_defense
from fedkl.errors import CheckpointError, ConfigError, KeyFileError, number_of
from fedkl.federation.checkpoint import Checkpoint, Checkpoints
from fedkl.federation.config import RunConfig, config_from, differences
from fedkl.federation.logbook import read_lines
from fedkl.federation.store import GROUP, OWN, check_key, open_key
from fedkl.files import read_meta
from fedkl.locking.schemes import SharedNorm


def check_resumable(
    found: Mapping[str, Any] | None, config: RunConfig, folder: Path, *, clients: bool = True
) -> None:
    """Raises unless the run in ``folder`` can go on as ``config``, or ``config`` begins a new one.

    Args:
        found: The run's settings as its config.json has them; None for a new run.
        config: The settings wanted.
        folder: Of the run.
        clients: As in :func:`check_remains`.

    Raises:
        ConfigError: As :func:`check_same`; or fewer rounds are wanted than are done, or none is
            left that could have what ``config`` changes.
        CheckpointError: As :func:`check_remains`.
        KeyFileError: As :func:`check_remains`.
    """
    if found is None:
        return
    before = config_from(found, source=str(folder / "config.json"))
    check_same(before, config)
    latest = check_remains(folder, before, clients=clients)
    done, rounds = 0 if latest is None else latest.round, config.federation.rounds
    if done > rounds:
        raise ConfigError(
            f"this run has done {number_of(done, 'round')} already, got rounds = {rounds}; ask for "
            "at least as many."
        )
    changed = [d for d in differences(before, config) if d.startswith("renewal.")]
    if changed and done == rounds:
        raise ConfigError(
            f"this run has done its {number_of(done, 'round')} already, so {'; '.join(changed)} "
            "would be on record for rounds that did not have it; leave that out, or ask for more "
            "rounds with --rounds."
        )


def check_same(old: RunConfig, new: RunConfig) -> None:
    """Raises unless a run of ``old`` may go on as ``new``.

    Raises:
        ConfigError: A setting differs that the result depends on.
    """
    # How a pad is renewed is for the clients to tighten (or loosen) at any time.
    free = ["workers", "device", "checkpoint_every", "renewal.budget", "renewal.on_spent"]
    if new.training.schedule != "cosine":  # whose every rate depends on the number of rounds
        free.append("federation.rounds")
    changed = [d for d in differences(old, new) if d.split(":")[0] not in free]
    if changed:
        raise ConfigError(
            f"this run was started with other settings ({'; '.join(changed)}); resume with the "
            "same ones or use another folder."
        )


def check_remains(folder: Path, config: RunConfig, *, clients: bool = True) -> Checkpoint | None:
    """Raises unless the run in ``folder`` can go on from its newest checkpoint, or start again.

    Args:
        folder: Of the run.
        config: Its settings, as its config.json has them.
        clients: Whether its clients have their keys and private states there too.

    Returns:
        That checkpoint; None before the first.

    Raises:
        CheckpointError: The checkpoints are gone or all damaged, or a client that took part has no
            private state.
        KeyFileError: As :func:`check_keys`.
    """
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    if latest is None:
        _check_not_begun(folder, config)
    elif clients:
        _check_states(folder, config, latest)
    if clients and make_defense(config.defense).keyed:
        before = 1 if latest is None else latest.round + 1
        check_keys(folder, before=before, one=config.defense.one_key)
    return latest


def _check_states(folder: Path, config: RunConfig, latest: Checkpoint) -> None:
    """Raises unless every client that took part up to the checkpoint ``latest`` has its state."""
    states, kept = folder / "clients", latest.facts.get("kept")
    if kept is None and _private(config) and not any(_states(folder, latest.round)):
        # A checkpoint of an older version does not say which clients have taken part.
        raise _lost(states, "there is no private state of any client", latest.round)
    wanted = {int(client): int(round_) for client, round_ in (kept or {}).items()}
    paths = [states / f"{c:05d}" / f"round-{r:06d}.safetensors" for c, r in wanted.items()]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise _lost(missing[0], f"the private state of a client{more} is missing", latest.round)


def _lost(path: Path, what: str, round_: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}, though the run has done {round_} round(s). Without it a lock would start "
        "anew and every figure would be of another lock. Restore clients/ from a copy, or start "
        "again in another folder."
    )


def _check_not_begun(folder: Path, config: RunConfig) -> None:
    """Raises when a run without a checkpoint must have had one."""
    sign = next(_signs(folder, config.checkpoint_every), None)
    if sign is not None:
        raise CheckpointError(
            f"there is no checkpoint in {folder}, though {sign}. The rounds would be played "
            "again and overwrite what is left. Restore checkpoints/ from a copy, or start again "
            "in another folder."
        )


def _signs(folder: Path, every: int) -> Iterator[str]:
    """Signs that the checkpoint of round ``every`` was written: of a later round, there is more."""
    if (folder / "summary.json").exists():
        yield "its summary.json is there"
    last = max((line["round"] for line in read_lines(folder / "metrics.jsonl")), default=0)
    if last > every:
        yield f"metrics.jsonl tells of round {last}"
    last = max((round_for(path) for path in _states(folder)), default=0)
    if last > every:
        yield f"clients/ has private states after round {last}"


def check_keys(folder: Path, *, before: int, one: bool = False) -> None:
    """Raises when a client with a private state has no key any more, or another one.

    A new key would be made in its place, and with it the lock's weights are worth nothing.

    Args:
        folder: Of the run.
        before: States of this round and later ones do not count: the rounds are played again.
        one: Whether the group's key is that of clients whose file is not there.

    Raises:
        KeyFileError: Names the first such client.
    """
    states, group = _states(folder), folder / "keys" / "group.key"

    def key_of(name: str) -> Path:
        own = folder / "keys" / f"client-{name}.key"
        return group if one and not own.exists() else own

    for name in dict.fromkeys(state.parent.name for state in states):
        path = key_of(name)
        if not path.exists():
            raise KeyFileError(
                f"{path} is missing, but client {int(name)} has a lock that was trained "
                "with it. Restore the key from a copy, or start again in another folder."
            )
    newest = {state.parent.name: state for state in states if round_for(state) < before}
    for name, state in newest.items():
        path, meta = key_of(name), read_meta(state)
        check_key(path, open_key(path).fingerprint, state, meta, OWN)
        if group.exists():
            check_key(group, open_key(group).fingerprint, state, meta, GROUP)


def _states(folder: Path, most: int | None = None) -> list[Path]:
    """Files of private states in the order of clients and rounds, up to round ``most``."""
    found = sorted((folder / "clients").glob("[0-9]*/round-[0-9]*.safetensors"))
    return [path for path in found if most is None or round_for(path) <= most]


def round_for(state: Path) -> int:
    """The round after which a client kept the file ``state``."""
    return int(state.stem.partition("-")[2])


def _private(config: RunConfig) -> bool:
    defense = make_defense(config.defense)
    parts = defense.parts if isinstance(defense, Composed) else (defense,)
    locks = [part.scheme for part in parts if isinstance(part, LockDefense)]
    return any(not isinstance(scheme, SharedNorm) for scheme in locks)
