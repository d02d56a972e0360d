"""The audit: every cell of the grid once, kept on disk, skipped when done."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkl.attacks import Attack, Reconstruction
from fedkl.audit.arsenal import FEED_FORWARD, TARGET, Arsenal, applicable
from fedkl.audit.certified import certify_audit
from fedkl.audit.config import AuditConfig
from fedkl.audit.measure import Truth, fished, matched, rows_of, subset, truth_of
from fedkl.audit.observe import observe
from fedkl.audit.pictures import save_pictures
from fedkl.audit.verdicts import CELL, overall, summarize
from fedkl.audit.victims import Victims, draw_victims
from fedkl.data import DataBundle
from fedkl.errors import AttackError, CheckpointError, ConfigError
from fedkl.federation import RunConfig, config_from, run
from fedkl.federation.engine import one_thread
from fedkl.federation.preflight import preflight
from fedkl.federation.session import load_data
from fedkl.files import make_folder, read_json, write_json
from fedkl.observation import ThreatModel
from fedkl.rng import derive

FORMAT, VERSION = "fedkl-audit", 1


@dataclass(frozen=True)
class Event:
    """What an audit is doing: ``done`` of ``of`` in the unit of ``kind``.

    ``kind`` is ``train`` (rounds), ``cell`` (cells of the grid), ``attack`` (iterations) or
    ``note``.
    """

    kind: str
    text: str
    done: int = 0
    of: int = 0
    loss: float = float("nan")


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Cell:
    """One attack on one defense under one threat model, on all victims of one seed."""

    defense: str
    seed: int
    threat: ThreatModel
    attack: str

    def name(self, audit: AuditConfig) -> str:
        """File name of the result."""
        text = f"{audit.stage}_{self.defense}_seed{self.seed}_{self.threat.name}_{self.attack}"
        return re.sub(r"[^\w.+-]", "-", text)


def run_audit(
    audit: AuditConfig,
    folder: Path,
    *,
    sources: Mapping[str, Path] | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Attacks what clients really send, and says what it is worth.

    Writes ``audit.json``, ``cells/``, ``pictures/`` and ``runs/`` (the federations that were
    trained for it) below ``folder``. What is there already is not done again: an audit that was
    killed and is resumed gives the same JSON.

    Args:
        audit: What to do.
        folder: Where to.
        sources: Folders of finished runs by defense, which are then not trained again: their own
            settings, keys and private states are used.
        resume: Whether ``folder`` may hold a part of this audit already.
        facts: Further entries of the JSON (command, versions).
        listen: Called with every event.

    Returns:
        The contents of ``audit.json``.

    Raises:
        ConfigError: ``folder`` holds another audit, or one and ``resume`` is off.
        FedKLError: As :func:`fedkl.federation.run` and the attacks.
    """
    tell = listen or (lambda event: None)
    given = dict(sources or {})
    bundle = load_data(audit.run)
    truth = truth_of(bundle, draw_victims(bundle, audit), audit)
    _check(audit, folder, given, bundle)
    _claim(audit, folder, resume)
    tell(Event("note", audit.cost))
    with one_thread():
        accuracy = {}
        for defense, seed, config, place in _federations(audit, folder, given):
            known = place in given.values()
            accuracy[defense, seed] = (
                _accuracy_of(place) if known else _train(audit, config, place, bundle, tell)
            )
        rows, pictures, skipped, threats = [], [], [], {}
        cells = list(_cells(audit, folder, given, bundle))
        for done, cell in enumerate(cells):
            tell(Event("cell", cell.name(audit), done, len(cells)))
            found = _attacked(audit, folder, given, bundle, truth, cell, tell)
            rows += found["rows"]
            pictures += found["pictures"]
            if found["skipped"] is not None:
                what = {"defense": cell.defense, "attack": cell.attack}
                skipped.append({"cell": cell.name(audit), **what, "reason": found["skipped"]})
            threats[cell.threat.name] = cell.threat.to_dict()
    summary = summarize(
        rows, judged=audit.judged, feed_forward=FEED_FORWARD, candidates=audit.candidates
    )
    result = {
        "format": FORMAT,
        "version": VERSION,
        "config": audit.to_dict(),
        "data": bundle.name,
        "cost": audit.cost,
        **(facts or {}),
        "verdict": overall(summary, audit.judged, skipped),
        "threats": threats,
        "controls": [d for d in audit.grid if d not in audit.judged] + ["key-shared", "floor"],
        "accuracy": {d: accuracy[d, 0] for d in audit.grid},
        "summary": summary,
        "rows": rows,
        "pictures": pictures,
        "skipped": skipped,
        "certificate": _certificate(audit, folder, given, bundle) if audit.certificate else None,
    }
    write_json(folder / "audit.json", result)
    return result


def _certificate(
    audit: AuditConfig, folder: Path, given: Mapping[str, Path], bundle: DataBundle
) -> dict[str, Any]:
    first = (f for f in _federations(audit, folder, given) if f[1] == 0)
    victims = (Victims(config, place, bundle, audit) for _, _, config, place in first)
    with one_thread():
        rows = draw_victims(bundle, audit)
        return certify_audit(audit, victims, rows, make_folder(folder / "cells"))


def _check(audit: AuditConfig, folder: Path, given: Mapping[str, Path], bundle: DataBundle) -> None:
    """Everything that can be known to go wrong, before anything is written."""
    if given and audit.stage == "mid":
        raise ConfigError(
            "a finished run keeps no model from its middle; audit --stage initial or final, or let "
            "the audit train its own by leaving --run out."
        )
    for _, _, config, place in _federations(audit, folder, given):
        if place in given.values():
            continue
        there = (place / "config.json").exists()
        if not there or audit.stage == "final":
            preflight(config, place, resume=there, bundle=bundle)


def _claim(audit: AuditConfig, folder: Path, resume: bool) -> None:
    path = folder / "audit-config.json"
    if path.exists():
        before = read_json(path)
        if not resume:
            raise ConfigError(
                f"{folder} holds an audit already; add --resume to go on with it, or choose "
                "another --out."
            )
        if before != _plain(audit):
            raise ConfigError(
                f"{folder} holds an audit with other settings; repeat its command, or choose "
                "another --out."
            )
        return
    make_folder(folder)
    write_json(path, _plain(audit))


def _plain(audit: AuditConfig) -> Any:
    def lists(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: lists(item) for name, item in value.items()}
        return [lists(item) for item in value] if isinstance(value, list | tuple) else value

    return lists(audit.to_dict())


def _federations(
    audit: AuditConfig, folder: Path, given: Mapping[str, Path]
) -> Iterator[tuple[str, int, RunConfig, Path]]:
    """(defense, seed, settings, run folder): those that were given, or ones of the audit's own."""
    for seed in range(audit.seeds):
        for defense in audit.grid:
            if seed == 0 and defense in given:
                path = given[defense] / "config.json"
                yield defense, seed, config_from(read_json(path), source=str(path)), given[defense]
            else:
                place = folder / "runs" / f"{defense}-seed{seed}"
                yield defense, seed, audit.defended(defense, seed), place


def _accuracy_of(place: Path) -> dict[str, Any]:
    """Accuracies of a finished run."""
    found: dict[str, Any] = read_json(place / "summary.json")["accuracy"]
    return found


def _train(
    audit: AuditConfig, config: RunConfig, place: Path, bundle: DataBundle, tell: Listener
) -> dict[str, Any] | None:
    """Trains the federation unless it is there; its accuracies, None at the initial stage."""
    if audit.stage == "initial":
        make_folder(place)
        return None
    rounds = config.federation.rounds
    if audit.stage == "mid":
        rounds = max(1, rounds // 2)
        federation = dataclasses.replace(config.federation, rounds=rounds)
        config = dataclasses.replace(config, federation=federation)
    summary = place / "audit-accuracy.json"
    if summary.exists():
        found: dict[str, Any] = read_json(summary)
        return found

    def on_event(event: Any) -> None:
        if event.kind == "round":
            tell(Event("train", config.defense.name, event.round, rounds, event.loss))

    tell(Event("train", config.defense.name, 0, rounds))
    resumed = (place / "config.json").exists()
    result = run(config, place, resume=resumed, bundle=bundle, on_event=on_event)
    write_json(summary, result.accuracy.to_dict())
    return result.accuracy.to_dict()


def _cells(
    audit: AuditConfig, folder: Path, given: Mapping[str, Path], bundle: DataBundle
) -> Iterator[Cell]:
    for defense, seed, config, place in _federations(audit, folder, given):
        victims = Victims(config, place, bundle, audit)
        for threat in applicable(audit.threats, victims):
            for attack in audit.attacks:
                yield Cell(defense, seed, threat, attack)


def _usable(cell: Any) -> bool:
    """Whether a kept cell has all that the summary reads."""
    whole = isinstance(cell, dict) and {"rows", "pictures", "skipped"} <= cell.keys()
    return whole and all({*CELL, "victim"} <= row.keys() for row in cell["rows"])


def _attacked(
    audit: AuditConfig,
    folder: Path,
    given: Mapping[str, Path],
    bundle: DataBundle,
    truth: Truth,
    cell: Cell,
    tell: Listener,
) -> dict[str, Any]:
    path = make_folder(folder / "cells") / f"{cell.name(audit)}.json"
    if path.exists():
        try:
            if _usable(kept := read_json(path)):
                return dict(kept)
        except CheckpointError:
            pass
        tell(Event("note", f"{path} is damaged, or of another version, and is done again."))
    config, place = next(
        (config, place)
        for defense, seed, config, place in _federations(audit, folder, given)
        if (defense, seed) == (cell.defense, cell.seed)
    )
    victims = Victims(config, place, bundle, audit)
    arsenal = Arsenal(audit, bundle, folder, lambda *facts: tell(Event(*facts)))
    per_update = audit.per_update
    rows = truth.rows.view(audit.images, audit.observations, per_update)

    def progress(done: int, of: int, loss: float) -> None:
        tell(Event("attack", cell.name(audit), done, of, loss))

    generator = derive(audit.run.seed, "attack", cell.attack, cell.seed)
    try:
        if cell.threat.crafting:
            victims.shared = arsenal.crafted(victims)
            mine, places = fished(truth, (audit.images, audit.observations, per_update), TARGET)
            if not len(mine):
                raise AttackError(f"no victim's update holds one image of class {TARGET}.")
            rows, truth, per_update = rows[mine], subset(truth, places), 1
        sent = [victims.send(one, lock_gradients=cell.threat.lock_gradients) for one in rows]
        observations = observe(victims, sent, cell.threat)
        attack = arsenal.attack(cell.attack, cell.threat, observations[0])
        found = attack.reconstruct(observations, generator=generator, progress=progress)
    except AttackError as error:
        # Some attacks do not apply to some models; the others go on, and the JSON says so.
        tell(Event("note", f"{cell.name(audit)} is left out: {error}"))
        result = {"attack": cell.attack, "notes": [], "rows": [], "pictures": []}
        result["skipped"] = str(error)
    else:
        result = _written(audit, folder, cell, attack, found, truth, bundle, per_update)
    write_json(path, result)
    return result


def _written(
    audit: AuditConfig,
    folder: Path,
    cell: Cell,
    attack: Attack,
    found: list[Reconstruction],
    truth: Truth,
    bundle: DataBundle,
    per_update: int,
) -> dict[str, Any]:
    facts = {
        "attack": cell.attack,
        "defense": cell.defense,
        "threat": cell.threat.name,
        "stage": audit.stage,
        "batch": audit.batch_size,
        "steps": audit.local_steps,
        "observations": audit.observations,
        "aggregated": audit.aggregated,
        "presentations": audit.per_victim,
        "seed": cell.seed,
    }
    images, labels = matched(found, truth, per_update)
    rows = rows_of(found, images, labels, truth, facts)
    count = audit.pictured if cell.seed == 0 else 0
    name = cell.name(audit)
    pictures = save_pictures(
        folder, name, found, images, truth, rows, count=count, class_names=bundle.class_names
    )
    notes = sorted({note for one in found for note in one.notes})
    return {
        "attack": repr(attack),
        "notes": notes,
        "rows": rows,
        "pictures": pictures,
        "skipped": None,
    }
