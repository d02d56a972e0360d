"""``fedkl evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedkl.cli.show import MEANING, accuracy_table, out, say


def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")],
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    checkpoint: Annotated[
        str, typer.Option(help="last, or best by validation accuracy with the own key.")
    ] = "last",
    device: Annotated[
        str | None, typer.Option(help="Another device than the run's.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a run again from its checkpoint, with the keys in its folder. Trains nothing.

    Wrong keys come out of each client's own key, so a figure does not change when taken again.

    Examples:

      fedkl evaluate runs/kl

      fedkl evaluate runs/kl --split validation --checkpoint best --json
    """
    from fedkl.federation.reevaluate import reevaluate

    found = reevaluate(run_folder, split=split, checkpoint=checkpoint, device=device)
    for note in found.notes:
        say(f"note: {note}")
    if as_json:
        facts = {"split": found.split, "round": found.round, "accuracy": found.accuracy.to_dict()}
        print(json.dumps(facts, indent=2))
        return
    name = f"{found.config.federation.method} {found.config.defense.name}"
    title = f"Accuracy on the {found.split} set after round {found.round}"
    out().print(accuracy_table(title, [(name, found.accuracy.to_dict())]))
    if found.accuracy.other_client is not None:
        print(MEANING)
