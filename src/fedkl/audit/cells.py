"""One cell of the grid: an attack mounted on every victim of one seed, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkl.attacks import Attack, Progress, Reconstruction
from fedkl.audit.arsenal import TARGET, Arsenal, probe
from fedkl.audit.config import AuditConfig
from fedkl.audit.measure import Truth, fished, guessed_rows, matched, rows_of, subset, truth_of
from fedkl.audit.observe import observe
from fedkl.audit.pictures import save_pictures
from fedkl.audit.verdicts import CELL
from fedkl.audit.victims import Victims
from fedkl.data import DataBundle
from fedkl.errors import AttackError, CheckpointError
from fedkl.files import make_folder, read_json, write_json
from fedkl.observation import Observation, ThreatModel
from fedkl.rng import derive


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
class Scene:
    """What all cells of an audit have in common.

    Attributes:
        audit: Its settings.
        folder: Its folder.
        bundle: Its data.
        truth: The victims' images, and the floor.
        tell: Called with events.
    """

    audit: AuditConfig
    folder: Path
    bundle: DataBundle
    truth: Truth
    tell: Listener


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


def usable(cell: Any) -> bool:
    """Whether a kept cell has all that the summary reads."""
    whole = isinstance(cell, dict) and {"rows", "pictures", "skipped", "left_out"} <= cell.keys()
    return whole and all({*CELL, "victim", "left_out"} <= row.keys() for row in cell["rows"])


def attacked(scene: Scene, cell: Cell, victims: Callable[[], Victims]) -> dict[str, Any]:
    """The result of a cell, from its file if that is there and whole.

    Args:
        scene: What it is part of.
        cell: Which one.
        victims: Makes its victims.

    Returns:
        ``attack`` (its settings), ``rows`` (one per image), ``pictures``, ``notes``, ``skipped``
        (why there are no rows, or None) and ``left_out`` (victims that the attack could not treat,
        each with the reason).
    """
    name = cell.name(scene.audit)
    path = make_folder(scene.folder / "cells") / f"{name}.json"
    if path.exists():
        try:
            if usable(kept := read_json(path)):
                return dict(kept)
        except CheckpointError:
            pass
        scene.tell(Event("note", f"{path} is damaged, or of another version, and is done again."))
    try:
        result = _mounted(scene, cell, victims())
    except AttackError as error:
        # Some attacks do not apply to some models; the others go on, and the JSON says so.
        scene.tell(Event("note", f"{name} is left out: {error}"))
        result = {"attack": cell.attack, "notes": [], "rows": [], "pictures": [], "left_out": []}
        result["skipped"] = str(error)
    write_json(path, result)
    return result


def _mounted(scene: Scene, cell: Cell, victims: Victims) -> dict[str, Any]:
    audit, name = scene.audit, cell.name(scene.audit)
    arsenal = Arsenal(audit, scene.bundle, scene.folder, lambda *facts: scene.tell(Event(*facts)))
    truth, rows = scene.truth, scene.truth.rows
    rows = rows.view(audit.images, audit.observations, audit.per_update)
    honest: Observation | None = None
    if cell.threat.crafting:
        honest = probe(victims)
        victims.shared = arsenal.crafted(victims, honest)
        shape = (audit.images, audit.observations, audit.per_update)
        mine, places = fished(truth, shape, TARGET)
        if not len(mine):
            raise AttackError(f"no victim's update holds one image of class {TARGET}.")
        rows = rows[mine]
        truth = truth_of(
            scene.bundle, truth.rows[places].view(len(mine), audit.observations, 1), audit
        )
    sent = [victims.send(one, lock_gradients=cell.threat.lock_gradients) for one in rows]
    observations = observe(victims, sent, cell.threat)
    attack = arsenal.attack(cell.attack, cell.threat, observations[0], honest=honest)

    def progress(done: int, of: int, loss: float) -> None:
        scene.tell(Event("attack", name, done, of, loss))

    labels = (audit.run.seed, "attack", cell.attack, cell.seed)
    found, failed = on_each(attack, observations, lambda: derive(*labels), progress)
    for victim, reason in failed.items():
        scene.tell(Event("note", f"{name}: victim {victim} is left out: {reason}"))
    facts = {**_facts(audit, cell), "labels_granted": observations[0].labels is not None}
    return _written(scene, cell, attack, found, failed, truth, facts)


def on_each(
    attack: Attack,
    observations: Sequence[Observation],
    generator: Callable[[], torch.Generator],
    progress: Progress | None = None,
) -> tuple[dict[int, Reconstruction], dict[int, str]]:
    """The attack on all victims that it can treat: one whose gradient is odd costs only itself.

    Args:
        attack: It names the victims at fault in its errors.
        observations: All victims.
        generator: Makes the attack's generator, anew for every try.
        progress: As of an attack.

    Returns:
        Reconstructions, and reasons why there is none, by victim.

    Raises:
        AttackError: It is about the whole, or about every victim.
    """
    left, failed = list(range(len(observations))), dict[int, str]()
    while left:
        try:
            found = attack.reconstruct(
                [observations[i] for i in left], generator=generator(), progress=progress
            )
            return dict(zip(left, found, strict=True)), failed
        except AttackError as error:
            if not error.victims:
                raise
            failed |= {left[place]: reason for place, reason in error.victims.items()}
            left = [victim for victim in left if victim not in failed]
    raise AttackError(next(iter(failed.values())))


def _written(
    scene: Scene,
    cell: Cell,
    attack: Attack,
    found: dict[int, Reconstruction],
    failed: dict[int, str],
    truth: Truth,
    facts: dict[str, Any],
) -> dict[str, Any]:
    per_victim = len(truth.rows) // (len(found) + len(failed))
    mine = subset(truth, _places(found, per_victim))
    treated = list(found.values())
    images, labels = matched(treated, mine)
    rows = rows_of(treated, images, labels, mine, facts, victims=list(found))
    absent = {**failed, **{r["victim"]: r["left_out"] for r in rows if r["left_out"] is not None}}
    for victim in absent.keys() - failed.keys():
        text = f"{cell.name(scene.audit)}: victim {victim} is left out: {absent[victim]}"
        scene.tell(Event("note", text))
    count = scene.audit.pictured if cell.seed == 0 else 0
    pictures = save_pictures(
        scene.folder,
        cell.name(scene.audit),
        treated,
        images,
        mine,
        rows,
        count=sum(victim < count for victim in found),
        class_names=scene.bundle.class_names,
    )
    if failed:
        rows += guessed_rows(subset(truth, _places(failed, per_victim)), facts, failed)
        rows.sort(key=lambda row: int(row["victim"]))
    return {
        "attack": repr(attack),
        "notes": sorted({note for one in treated for note in one.notes}),
        "rows": rows,
        "pictures": pictures,
        "skipped": None,
        "left_out": [{"victim": i, "reason": reason} for i, reason in absent.items()],
    }


def _places(victims: dict[int, Any], per_victim: int) -> Tensor:
    """Flat positions of the images of some victims."""
    first = torch.tensor(sorted(victims)) * per_victim
    return (first[:, None] + torch.arange(per_victim)).flatten()


def _facts(audit: AuditConfig, cell: Cell) -> dict[str, Any]:
    return {
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
