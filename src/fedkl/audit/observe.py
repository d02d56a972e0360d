"""From what a client sent to what an attacker sees under a threat model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedkl.attacks.arrangements import too_many
from fedkl.audit.victims import Sent, Victims
from fedkl.observation import Observation, ThreatModel


def observe(victims: Victims, sent: Sequence[Sent], threat: ThreatModel) -> list[Observation]:
    """One observation per victim. The model is rebuilt: nothing private comes along by reference.

    Labels are read off the gradient of a linear classifier by the attacks. Where it is private, or
    there is none (a convolution, say), or that of a batch lost its size or was altered on the way,
    they are granted, which may be more than the attacker has, so that attacks that need them run.
    So they are where there is noise, for an attacker could try one after the other; and, all in the
    order of their steps, where there are too many orders to try.

    Args:
        victims: The clients.
        sent: What each of them sent.
        threat: What the attacker is granted.
    """
    model = victims.public_model()
    secrets = victims.secrets(model)
    spec = None if victims.spec is None else victims.spec.to_dict()
    known = victims.held() if threat.key else {}
    training = victims.training
    counted = training.images == 1 or (training.length is None and not training.altered)
    read_off = counted and not training.noise
    ordered = too_many(training, victims.audit.observations)
    told = threat.labels or not read_off or ordered or _tells_no_label(victims, model, secrets)
    weights = victims.lock_weights() if threat.lock_weights else {}
    return [
        Observation(
            model=model,
            kind="gradient" if victims.audit.local_steps == 1 else "update",
            changes=one.changes,
            image_shape=victims.bundle.image_shape,
            num_classes=victims.bundle.num_classes,
            training=training,
            threat=threat,
            secrets=secrets,
            known=known,
            labels=_labels(victims, one, ordered=ordered) if told else None,
            ordered=ordered,
            spec=spec,
            lock_weights=weights,
            lock_gradients=one.lock_gradients if threat.lock_gradients else (),
            statistics=one.statistics,
        )
        for one in sent
    ]


def _tells_no_label(victims: Victims, model: nn.Module, secrets: Sequence[str]) -> bool:
    """Whether no shared linear layer has as many outputs as there are classes, as the last one."""
    classes = victims.bundle.num_classes
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    shared = {name for name, _ in model.named_parameters()} - set(secrets)
    return not linear or f"{linear[-1]}.weight".removeprefix(".") not in shared


def _labels(victims: Victims, sent: Sent, *, ordered: bool) -> Tensor:
    """True labels (T, images), ascending unless ``ordered``: not whose they are, nor of which step.

    Whoever has to count them does not know more.
    """
    found = torch.stack([victims.bundle.test.labels[rows] for rows in sent.rows])
    return found if ordered else found.sort(dim=1).values
