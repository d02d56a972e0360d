"""The audit: every cell of the grid once, kept on disk, skipped when done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkl.attacks import RECOGNIZING, check_installed
from fedkl.audit.arsenal import FEED_FORWARD, applicable, repeats
from fedkl.audit.caveats import caveats
from fedkl.audit.cells import Cell, Event, Listener, Scene, attacked
from fedkl.audit.certified import certify_audit
from fedkl.audit.config import KEY_HOLDER, AuditConfig
from fedkl.audit.measure import truth_of
from fedkl.audit.sources import claim, federations
from fedkl.audit.verdicts import HOLDS, overall, summarize
from fedkl.audit.victims import Victims, draw_victims
from fedkl.data import DataBundle
from fedkl.errors import ConfigError
from fedkl.federation import RunConfig, run
from fedkl.federation.engine import one_thread
from fedkl.federation.folder import read_summary
from fedkl.federation.preflight import preflight
from fedkl.federation.session import load_data
from fedkl.files import make_folder, read_json, write_json

FORMAT, VERSION = "fedkl-audit", 1


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
        ConfigError: ``folder`` holds another audit, or one of other runs, or one and ``resume`` is
            off.
        FedKLError: As :func:`fedkl.federation.run` and the attacks.
    """
    tell = listen or (lambda event: None)
    given = dict(sources or {})
    bundle = load_data(audit.run)
    truth = truth_of(bundle, draw_victims(bundle, audit), audit)
    _check(audit, folder, given, bundle)
    claim(audit, folder, given, resume)
    tell(Event("note", audit.cost))
    with one_thread():
        accuracy = {
            (defense, seed): _accuracy_of(place)
            if place in given.values()
            else _train(audit, config, place, bundle, tell)
            for defense, seed, config, place in federations(audit, folder, given)
        }
        found = _all_cells(Scene(audit, folder, bundle, truth, tell), given)
    result = _result(audit, bundle, {d: accuracy[d, 0] for d in audit.grid}, found, facts or {})
    # What the attacks found is on disk before anything else can go wrong.
    write_json(folder / "audit.json", result)
    if audit.certificate:
        result["certificate"] = _certificate(audit, folder, given, bundle)
        write_json(folder / "audit.json", result)
    return result


def _result(
    audit: AuditConfig,
    bundle: DataBundle,
    accuracy: Mapping[str, dict[str, Any] | None],
    found: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON, without a certificate yet."""
    verdict = overall(found["summary"], audit.judged, found["skipped"], feed_forward=FEED_FORWARD)
    holding = [name for name, one in verdict["defenses"].items() if one["verdict"] == HOLDS]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": audit.to_dict(),
        "data": bundle.name,
        "cost": audit.cost,
        **facts,
        "verdict": verdict,
        "controls": [d for d in audit.grid if d not in audit.judged] + [KEY_HOLDER, "floor"],
        "accuracy": dict(accuracy),
        "caveats": caveats(audit, accuracy, bundle.num_classes, found["skipped"], holding),
        **found,
        "certificate": None,
    }


def _all_cells(scene: Scene, given: Mapping[str, Path]) -> dict[str, Any]:
    """Every cell of the grid: the entries of the JSON that come from them."""
    audit = scene.audit
    rows, pictures, skipped, left_out, threats = [], [], [], [], {}
    cells = list(_cells(audit, scene.folder, given, scene.bundle))
    for done, (cell, victims) in enumerate(cells):
        name = cell.name(audit)
        scene.tell(Event("cell", name, done, len(cells)))
        found = attacked(scene, cell, victims)
        rows += found["rows"]
        pictures += found["pictures"]
        what = {"cell": name, "defense": cell.defense, "attack": cell.attack}
        if found["skipped"] is not None:
            skipped.append({**what, "threat": cell.threat.name, "reason": found["skipped"]})
        left_out += [{**what, **one} for one in found["left_out"]]
        threats[cell.threat.name] = cell.threat.to_dict()
    summary = summarize(
        rows,
        judged=audit.judged,
        feed_forward=FEED_FORWARD,
        recognizing=RECOGNIZING,
        candidates=audit.candidates,
    )
    return {
        "threats": threats,
        "summary": summary,
        "rows": rows,
        "pictures": pictures,
        "skipped": skipped,
        "left_out": left_out,
    }


def _certificate(
    audit: AuditConfig, folder: Path, given: Mapping[str, Path], bundle: DataBundle
) -> dict[str, Any]:
    first = (f for f in federations(audit, folder, given) if f[1] == 0)
    victims = (Victims(config, place, bundle, audit) for _, _, config, place in first)
    with one_thread():
        rows = draw_victims(bundle, audit)
        return certify_audit(audit, victims, rows, make_folder(folder / "cells"))


def _check(audit: AuditConfig, folder: Path, given: Mapping[str, Path], bundle: DataBundle) -> None:
    """Everything that can be known to go wrong, before anything is written."""
    check_installed(audit.attacks, audit.effort)
    if given and audit.stage == "mid":
        raise ConfigError(
            "a finished run keeps no model from its middle; audit --stage initial or final, or let "
            "the audit train its own by leaving --run out."
        )
    for _, _, config, place in federations(audit, folder, given):
        if place in given.values():
            _accuracy_of(place)
            continue
        there = (place / "config.json").exists()
        if not there or audit.stage == "final":
            preflight(config, place, resume=there, bundle=bundle)


def _accuracy_of(place: Path) -> dict[str, Any]:
    """Accuracies of a finished run."""
    found: dict[str, Any] = read_summary(place)["accuracy"]
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
) -> Iterator[tuple[Cell, Callable[[], Victims]]]:
    """Every cell with what makes its victims: of them only one cell's are in memory at a time."""
    for defense, seed, config, place in federations(audit, folder, given):
        make = functools.partial(Victims, config, place, bundle, audit)
        threats = applicable(audit.threats, make())
        for threat in threats:
            for attack in audit.attacks:
                if not repeats(attack, threat, threats):
                    yield Cell(defense, seed, threat, attack), make
