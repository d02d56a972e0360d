"""Further measures of a finished run: each client's own mix of labels, a thief with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = (1, 10, 100)


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
        "label_thief": None,
    }


def on_own_mix(config: Any, folder: Path, shared: Any, bundle: Any = None) -> list[float]:
    """Accuracy of each examined client on test images weighted as the labels of its own images."""
    import torch

    from fedkl.federation.evaluate import EVAL_BATCH, reestimate
    from fedkl.federation.session import Session

    session = Session(config, folder, bundle)
    space, test = session.workspace, session.bundle.test
    found = []
    for client in range(min(config.evaluation.clients, len(session.parts))):
        state = session._state(client, before=config.federation.rounds + 1)
        space.enter(shared, session.store.key(client), state.private)
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


def label_thief(config: Any, folder: Path, shared: Any) -> dict[str, dict[str, float]]:
    """Accuracy of an outsider with k labelled images a class, and of training from scratch on them.

    The thief has the global model and the lock spec. It trains secrets of its own (stem, γ, β) and,
    tried as well, the shared layers with them; the better of both counts. From scratch: the network
    with ordinary norms, from random weights, as many steps. All with Adam, on 2,000 test images.
    """
    import torch

    from fedkl.audit.config import AuditConfig
    from fedkl.audit.victims import Victims
    from fedkl.federation.session import load_data
    from fedkl.locking import lock
    from fedkl.models import build
    from fedkl.rng import derive

    bundle = load_data(config)
    victims = Victims(config, folder, bundle, AuditConfig(run=config), shared=shared)
    test = bundle.test.batch(torch.arange(2_000))
    found: dict[str, dict[str, float]] = {}
    for k in LABELS:
        labels = bundle.public.labels
        rows = torch.cat([(labels == c).nonzero().flatten()[:k] for c in labels.unique()])
        images = bundle.public.batch(rows)
        model = victims.public_model()
        own = [p for n, p in model.named_parameters() if n in victims.secrets(model)]
        scores = {"global model as it is": _trained(victims.public_model(), [], images, test)}
        if own:
            scores["own secrets"] = _trained(model, own, images, test)
        model = victims.public_model()
        scores["everything"] = _trained(model, list(model.parameters()), images, test)
        plain = build(
            config.model.name,
            num_classes=bundle.num_classes,
            channels=config.data.channels,
            image_size=config.data.image_size,
            generator=derive(config.seed, "scratch"),
        )
        plain = lock(plain, None, scheme="norm", layers="all", example=images[0][:4])
        scratch = _trained(plain, list(plain.parameters()), images, test)
        found[str(k)] = {"thief": max(scores.values()), "scratch": scratch, **scores}
    return found


def _trained(model: Any, parameters: list[Any], images: Any, test: Any) -> float:
    """Accuracy after 300 steps of Adam on ``parameters``; batch statistics taken on the images."""
    import torch
    from torch.nn.functional import cross_entropy

    from fedkl.rng import derive

    generator = derive(0, "thief", len(images[1]))
    for module in model.modules():
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.reset_running_stats()
    model.train()
    if parameters:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            rows = torch.randperm(len(images[1]), generator=generator)[:64]
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(images[0][rows]), images[1][rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():  # a thief classifies many images at once: batch statistics
        parts = zip(torch.split(test[0], 500), torch.split(test[1], 500), strict=True)
        right = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in parts)
    return right / len(test[1])
