"""From what a client sent to what an attacker sees under a threat model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedkl.audit.victims import Sent, Victims
from fedkl.observation import Observation, ThreatModel


def observe(victims: Victims, sent: Sequence[Sent], threat: ThreatModel) -> list[Observation]:
    """One observation per victim. The model is rebuilt: nothing private comes along by reference.

    Labels are read off the classifier's gradient by the attacks. Where the classifier is private
    they are granted, which is more than the attacker has, so that attacks that need them run.

    Args:
        victims: The clients.
        sent: What each of them sent.
        threat: What the attacker is granted.
    """
    model = victims.public_model()
    secrets = victims.secrets(model)
    spec = None if victims.spec is None else victims.spec.to_dict()
    known = victims.held() if threat.key else {}
    told = threat.labels or _head_is_private(victims, model, secrets)
    weights = victims.lock_weights() if threat.lock_weights else {}
    return [
        Observation(
            model=model,
            kind="gradient" if victims.audit.local_steps == 1 else "update",
            changes=one.changes,
            image_shape=victims.bundle.image_shape,
            num_classes=victims.bundle.num_classes,
            training=victims.training,
            threat=threat,
            secrets=secrets,
            known=known,
            labels=_labels(victims, one) if told else None,
            spec=spec,
            lock_weights=weights,
            lock_gradients=one.lock_gradients if threat.lock_gradients else (),
            statistics=one.statistics,
        )
        for one in sent
    ]


def _head_is_private(victims: Victims, model: nn.Module, secrets: Sequence[str]) -> bool:
    """Whether the last linear layer with as many outputs as classes stays with the client."""
    classes = victims.bundle.num_classes
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    return bool(linear) and f"{linear[-1]}.weight".removeprefix(".") in secrets


def _labels(victims: Victims, sent: Sent) -> Tensor:
    """True labels (T, images); of an aggregate in ascending order, so not whose they are."""
    found = torch.stack([victims.bundle.test.labels[rows] for rows in sent.rows])
    return found.sort(dim=1).values if victims.training.clients > 1 else found
