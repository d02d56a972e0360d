"""Further measures of a federation: every client alone, and each client's own mix of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def alone(config: Any, folder: Path) -> dict[str, Any]:
    """Every examined client trained by itself on its own images, as long and at the same rate.

    Without this nobody knows what a federation is worth, nor what a defense leaves of that.
    """
    import statistics
    from dataclasses import replace

    from fedkl.federation import run
    from fedkl.federation.session import _parts, load_data

    bundle = load_data(config)
    one = replace(
        config,
        federation=replace(config.federation, clients=1),
        data=replace(config.data, partition="iid", samples=None),
    )
    accuracies, mixes = [], []
    for client, rows in enumerate(_parts(config, bundle)[: config.evaluation.clients]):
        own = replace(bundle, train=bundle.train.subset(rows))
        place = folder / str(client)
        result = run(one, place, bundle=own)
        accuracies.append(result.accuracy.own_key)
        mixes += on_own_mix(one, place, result.shared, own)
    nobody = dict.fromkeys(("wrong_key", "outsider", "no_lock"))
    return {
        "accuracy": {"own_key": statistics.fmean(accuracies), "wrong_keys": [], **nobody},
        "validation": [],
        "mixes": mixes,
    }


def on_own_mix(
    config: Any, folder: Path, shared: Any, bundle: Any = None, settle: int = 0
) -> list[float]:
    """Accuracy of each examined client on test images weighted as the labels of its own images.

    ``settle``: after so many slow steps of its private layers on its own images.
    """
    import dataclasses

    import torch

    from fedkl.federation.checkpoint import Checkpoints
    from fedkl.federation.evaluate import EVAL_BATCH, reestimate
    from fedkl.federation.jobs import Job
    from fedkl.federation.session import Session

    steps = dataclasses.replace(config.federation, settle_steps=settle)
    session = Session(dataclasses.replace(config, federation=steps), folder, bundle)
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    sealed = {} if latest is None else latest.sealed
    space, test = session.workspace, session.bundle.test
    found = []
    for client in range(min(config.evaluation.clients, len(session.parts))):
        state = session.state(client, after=config.federation.rounds, sealed=sealed)
        space.enter(shared, session.store.key(client), state.private)
        if settle:
            session._settle(Job("examine", client, config.federation.rounds, "test"), shared)
        own = session.parts[client]
        rows = own[: config.evaluation.calibration_images]
        if space.private:
            reestimate(space, space.images, rows, every_norm=False)
        space.model.eval()
        right = torch.zeros(session.bundle.num_classes)
        with torch.inference_mode():
            for part in torch.split(torch.arange(len(test)), EVAL_BATCH):
                x, y = test.batch(part)
                hit = space.model(x).argmax(dim=1) == y
                right += torch.bincount(y[hit], minlength=len(right))
        recall = right / torch.bincount(test.labels, minlength=len(right))
        mix = torch.bincount(session.bundle.train.labels[own], minlength=len(right)).float()
        found.append(float((recall * mix / mix.sum()).sum()))
    return found
