"""What a linear layer gives away without any search: its input, exactly, at batch size 1.

The gradients of y = W x + b for one example are dW_i = g_i x and db_i = g_i, so every row with
g_i != 0 gives x = dW_i / db_i (Phong et al. 2017, section 3; Geiping et al. 2020, proposition 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.labels import classifier, infer_counts, infer_labels, mean_probability
from fedkl.attacks.network import Network
from fedkl.errors import AttackError, number_of
from fedkl.observation import Observation


class ClosedForm(Attack):
    """The image of a single example, from the first layer's gradient, if that layer is linear.

    Works on gradients and on updates, also of several steps on the same image (the sum of its
    gradients is a multiple of it just the same). A batch's gradient is a mixture of its images
    that this cannot take apart: that is an error, and :func:`label_counts` says what is left.
    """

    name: ClassVar[str] = "closed-form"

    def __init__(self) -> None:
        super().__init__()

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`; nothing is random, and the loss is nan.

        Raises:
            AttackError: More than one image per update, or a first layer that is not linear, has
                no bias, is private, or whose input is not the image itself.
        """
        if not observations:
            raise AttackError("got no observation; expected one or more.")
        network: Network | None = None
        model, names, done = None, ("", ""), 0

        def solve(observation: Observation) -> Reconstruction:
            nonlocal network, model, names, done
            _single(observation, "the image")
            if network is None or observation.model is not model:
                made = Network(observation, check=False)
                names = _first_linear(made, observation.image_shape)
                # Kept only now: where there is none, every victim has to say so.
                network, model = made, observation.model
            network.check(observation)
            found = _solve(observation, network, *names)
            done += 1
            if progress is not None:
                progress(done, len(observations), float("nan"))
            return found

        return each(observations, solve)


def penultimate_features(observation: Observation, network: Network | None = None) -> Tensor:
    """The input of the classifier, from its gradient: what the image looked like to it.

    Exact for one step on one image (float32 rounding aside). For several steps on the same image
    it is a mean of the features before each step, weighted by how much the label was missed.

    Args:
        observation: Updates of one image each; the model's last linear layer has a bias and is
            shared.
        network: ``Network(observation)`` or that of a victim with the same model, if at hand: it
            saves a copy of the model per call.

    Returns:
        float32 (T, features).

    Raises:
        AttackError: A batch, or a classifier that is private, has no bias or a zero gradient.
    """
    _single(observation, "the classifier's input")
    net = network or Network(observation)
    weight, bias = classifier(net, observation.num_classes)
    if bias is None:
        _no_bias(weight.removesuffix(".weight"))
    return torch.stack([_ratio(observation, net, c, weight, bias) for c in observation.changes])


def label_counts(observation: Observation, public: Tensor | None = None) -> Tensor:
    """How many examples of each class were in every update's batch.

    Exact where the model's mean probability per class is known: at a model that cannot yet tell
    classes apart it is uniform; later, public images give an estimate.

    Args:
        observation: Updates of any batch size; the classifier is shared and has a bias.
        public: Images (B, C, H, W) in [0, 1] to estimate the mean probability from; None: uniform.

    Returns:
        int64 (T, classes), every row summing to the number of images of an update.

    Raises:
        AttackError: The classifier is private or has no bias.
    """
    network = Network(observation)
    weight, bias = classifier(network, observation.num_classes)
    if bias is None:
        _no_bias(weight.removesuffix(".weight"))
    mean: Tensor | None = None
    if public is not None:
        mean = mean_probability(network, public, observation.known)
    rows = [_gradient(observation, network, c, bias) for c in observation.changes]
    return torch.stack([infer_counts(row, observation.training.images, mean) for row in rows])


def _solve(observation: Observation, network: Network, weight: str, bias: str) -> Reconstruction:
    rows = [_ratio(observation, network, c, weight, bias) for c in observation.changes]
    raw = torch.stack(rows).view(observation.count, 1, *observation.image_shape)
    notes = inexact(observation)
    if (strange := ((raw < -0.01) | (raw > 1.01)).float().mean()) > 0:
        notes.append(
            f"{float(strange):.0%} of the pixels came out beyond [0, 1] and were cut: the update "
            "was changed on its way (noise, clipping, rounding), or has weight decay over steps."
        )
    return Reconstruction(
        images=raw.clamp(0, 1), labels=infer_labels(observation, network), notes=tuple(notes)
    )


def inexact(observation: Observation) -> list[str]:
    """A note where the equations of a closed form do not hold; none where they do."""
    if not (altered := observation.training.altered):
        return []
    return [f"the update was {altered}, and these equations are of an update as it is made"]


def _ratio(
    observation: Observation, network: Network, change: Any, weight: str, bias: str
) -> Tensor:
    """dW_i / db_i of the row with the largest |db_i|: (inputs,)."""
    g_weight = _gradient(observation, network, change, weight)
    g_bias = _gradient(observation, network, change, bias)
    row = int(g_bias.abs().argmax())
    if float(g_bias[row]) == 0:
        raise AttackError(
            f"the gradient of {bias} is zero everywhere, so its layer's input cannot be divided "
            "out (a normalization that removes means, or a loss of zero); use another attack."
        )
    return g_weight[row] / g_bias[row]


def _gradient(observation: Observation, network: Network, change: Any, name: str) -> Tensor:
    """A parameter's gradient, averaged over the steps; weight decay taken off."""
    seen: Tensor = change[name].detach()
    if observation.kind == "gradient":
        return seen
    return observation.training.gradient(seen, network.shared[name])


class _Found(Exception):
    """Ends a forward pass at the first layer with parameters."""

    def __init__(self, name: str, module: nn.Module, x: Tensor) -> None:
        self.name, self.module, self.x = name, module, x


def _first_linear(network: Network, image_shape: tuple[int, int, int]) -> tuple[str, str]:
    """Names of weight and bias of the first executed layer, which gets the image as it is."""
    # No pixel equals another: a reordered or rescaled image would show.
    pixels = int(torch.tensor(image_shape).prod())
    probe = torch.linspace(0, 1, pixels).view(1, *image_shape)
    name, module, x = _first_layer(network.model, probe)
    if not isinstance(module, nn.Linear):
        raise AttackError(
            f"the first layer, {name!r}, is a {type(module).__name__}, expected a linear one: only "
            "its gradient contains the image itself. Use an attack that searches it."
        )
    if module.bias is None:
        _no_bias(name)
    dot = f"{name}." if name else ""
    if missing := [n for n in (f"{dot}weight", f"{dot}bias") if n not in network.shared]:
        raise AttackError(
            f"{missing[0]} is private, so its gradient is not in the update; use another attack."
        )
    if x.numel() != pixels or not torch.equal(x.flatten(), probe.flatten()):
        raise AttackError(
            f"the first layer, {name!r}, gets the image after a transformation of the model's own; "
            "its input is not the image. Use an attack that searches it."
        )
    return f"{dot}weight", f"{dot}bias"


def _first_layer(model: nn.Module, probe: Tensor) -> tuple[str, nn.Module, Tensor]:
    names = {module: name for name, module in model.named_modules()}

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Found(names[module], module, args[0])

    own = [m for m in names if next(m.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_pre_hook(stop) for module in own]
    try:
        with torch.no_grad():
            model(probe)
    except _Found as found:
        return found.name, found.module, found.x
    finally:
        for hook in hooks:
            hook.remove()
    raise AttackError("no layer of the model with parameters was called; nothing to attack.")


def _single(observation: Observation, what: str) -> None:
    training = observation.training
    if training.images != 1:
        raise AttackError(
            f"got updates of {training.images} images (batch {training.batch_size}, "
            f"{number_of(training.local_steps, 'step')}); {what} follows in closed form from one "
            "image alone. For batches, label_counts tells the labels, and searching attacks the "
            "images."
        )


def _no_bias(layer: str) -> NoReturn:
    raise AttackError(
        f"layer {layer!r} has no bias: its gradient shows the input only up to an unknown factor. "
        "Use an attack that searches."
    )
