"""Labels from the gradient of the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from fedkl.attacks.network import Network
from fedkl.errors import AttackError
from fedkl.observation import Observation

CHUNK: Final = 250
_ALIKE: Final = 1e-3  # rows whose lengths differ by less may differ by rounding


def classifier(network: Network, num_classes: int) -> tuple[str, str | None]:
    """Names of weight and bias (None without one) of the last linear layer with ``num_classes``.

    Raises:
        AttackError: There is none, or it is not shared.
    """
    found: tuple[str, str | None] | None = None
    for name, module in network.model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == num_classes:
            dot = f"{name}." if name else ""
            found = (f"{dot}weight", f"{dot}bias" if module.bias is not None else None)
    if found is None or found[0] not in network.shared:
        raise AttackError(
            f"no shared linear layer with {num_classes} outputs gives the labels away; grant the "
            "labels in the threat model, or use an attack that searches them (dlg, grnn)."
        )
    return found


def tells_labels(observation: Observation, network: Network) -> bool:
    """Whether labels are granted, or can be read off: a classifier that is shared.

    That of a batch needs a bias.
    """
    if observation.labels is not None:
        return True
    try:
        _, bias = classifier(network, observation.num_classes)
    except AttackError:
        return False
    return bias is not None or observation.training.images == 1


def infer_label(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The label of a single example: iDLG (Zhao et al. 2020, equation 3).

    The gradient by the logits is p - onehot(label), negative at the label alone. The bias shows it
    directly; without one, the rows of the weight's gradient are it times the same features, and
    the row of the label, minus the sum of all others, is the longest. Where the model gave all the
    rest to one class, as it does of two, that row is as long: of features most of which are
    positive (after ReLU or sigmoid), the label's is the one below zero.

    Args:
        weight: (classes, features) gradient.
        bias: (classes,) gradient or None.

    Returns:
        int64 scalar.
    """
    if bias is not None:
        return bias.argmin()
    lengths = weight.norm(dim=1)
    longest = lengths >= (1 - _ALIKE) * lengths.max()
    return weight.sum(dim=1).masked_fill(~longest, torch.inf).argmin()


def infer_counts(bias: Tensor, batch_size: int, mean_probability: Tensor | None = None) -> Tensor:
    """How many examples of each class a batch had: int64 (classes,), their sum ``batch_size``.

    The bias gradient is mean(p) - counts/B. The mean probability is estimated, uniform if None:
    exact at a model that has not learned anything. One that expects some classes more than others
    needs the mean over public images (:func:`mean_probability`; the idea of LLG, Wainakh et al.
    2022). The better a model tells classes apart, the more mean(p) is of the batch itself and the
    less the gradient says: of a model that is right about nearly all of a batch it says nothing.
    A gradient that fits no label at all (above the mean probability everywhere) tells nothing, and
    the mean probability is taken. Rounded by largest remainders.
    """
    classes = len(bias)
    p = bias.new_full((classes,), 1 / classes) if mean_probability is None else mean_probability
    wanted = (p - bias).clamp_min(0)
    if not float(wanted.sum()) > 0:
        wanted = p
    # In float64, so that rounding never leaves more remainders than there are classes.
    wanted = wanted.double() * (batch_size / wanted.double().sum())
    counts = wanted.floor()
    for place in (wanted - counts).argsort(descending=True)[: batch_size - int(counts.sum())]:
        counts[place] += 1
    return counts.to(torch.int64)


def mean_probability(
    network: Network, images: Tensor, secrets: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What the model expects of images at large: mean probability per class, (classes,).

    Args:
        network: The victim's public model.
        images: Public ones (M, C, H, W) in [0, 1]; the nearer their classes are to the victim's in
            number, the better.
        secrets: Values of private tensors; neutral ones stand for those that are missing.
    """
    parameters = {**network.shared, **network.secrets, **(secrets or {})}
    with torch.no_grad():
        parts = [network.logits(parameters, x).softmax(dim=1) for x in torch.split(images, CHUNK)]
    return torch.cat(parts).mean(dim=0)


def infer_labels(
    observation: Observation, network: Network, probability: Tensor | None = None
) -> Tensor:
    """Labels (T, images) int64: those granted, else inferred; a batch's in ascending order.

    An update of several steps is read as if its steps had shared the weights at its beginning.

    Args:
        observation: The victim.
        network: Its public model.
        probability: For batches, as :func:`mean_probability` gives it; None: uniform.

    Raises:
        AttackError: The classifier is not shared, or a batch's gradient lost its size or was
            pruned, clipped or noised.
    """
    if observation.labels is not None:
        return observation.labels
    weight, bias = classifier(network, observation.num_classes)
    training, rows = observation.training, []
    for change in observation.changes:
        seen = {name: change[name] for name in (weight, bias) if name is not None}
        if observation.kind == "update":
            seen = {n: training.gradient(g, network.shared[n]) for n, g in seen.items()}
        g_weight, g_bias = seen[weight], None if bias is None else seen[bias]
        if training.images == 1:
            rows.append(infer_label(g_weight, g_bias).reshape(1))
            continue
        if training.length is not None:
            raise AttackError(
                "labels of a batch are counted from the size of the classifier's gradient, which "
                "an update that was sent at one length, or whose learning rate is not known, does "
                "not have; grant the labels (audit-update: labels = [...] in the file of steps, or "
                "lr of the client's step)."
            )
        if training.altered:
            raise AttackError(
                "labels of a batch are counted from the exact gradient of the classifier's bias, "
                f"and this update was {training.altered}; grant the labels "
                "(audit-update: labels = [...] in the file of steps)."
            )
        if g_bias is None:
            raise AttackError(
                "labels of a batch are counted from the classifier's bias, which this model has "
                "not; grant the labels (audit-update: labels = [...] in "
                "the file of steps)."
            )
        counts = infer_counts(g_bias, training.images, probability)
        rows.append(torch.repeat_interleave(torch.arange(len(counts)), counts))
    return torch.stack(rows)
