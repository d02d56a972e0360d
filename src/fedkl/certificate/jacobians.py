"""An observation as a function of images and secrets, in float64, and its derivatives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.functional import one_hot

from fedkl.attacks.network import Network
from fedkl.attacks.statistics import RUNNING, Statistics
from fedkl.errors import AttackError
from fedkl.observation import Observation
from fedkl.rng import borrowed, derive

# Tangents pushed forward at a time: as many as are fast without taking much memory.
_AT_ONCE = 64
# Wrong images, labels or secrets are off by about all; float32 loses digits where p(y) is near 1.
_AGREEMENT = 0.1


class Presented:
    """T updates of one victim as a function of what the attacker does not know.

    Everything is computed in float64, whatever the model's dtype: ranks need the digits. Running
    statistics that were sent count as seen: as mean and variance of what each norm was given,
    which is what they tell beyond those before, and in units in which the first update's have the
    root mean square of its gradient, so that noise and tolerance mean the same for both.

    Args:
        observation: What was seen of one victim. Whatever its threat model grants, every tensor
            in ``observation.secrets`` is taken for unknown.
        images: The true images (T, images, C, H, W).
        labels: The true labels (T, images); taken for known, since they leak.
        secrets: True values of the private parameters, by name.

    Raises:
        AttackError: Number or shape does not fit, a secret is missing, the model does not run in
            float64, is random in training (dropout, say) or does not give the observed gradient at
            these images, labels and secrets, or a buffer was sent that tells of the images and
            cannot be derived by them.
    """

    def __init__(
        self,
        observation: Observation,
        images: Tensor,
        labels: Tensor,
        secrets: Mapping[str, Tensor],
    ) -> None:
        _check_statistics(observation)
        self.network = Network(replace(observation, model=deepcopy(observation.model).double()))
        expected = (observation.count, observation.training.images, *observation.image_shape)
        if tuple(images.shape) != expected or tuple(labels.shape) != expected[:2]:
            raise AttackError(
                f"got images of shape {tuple(images.shape)} and labels of {tuple(labels.shape)}, "
                f"expected {expected} and {expected[:2]}: those behind every update."
            )
        if missing := sorted(set(self.network.secrets) - set(secrets)):
            raise AttackError(
                f"the true value of {missing[0]} is missing; a certificate is taken at the true "
                "secrets, so pass those that held_secrets(model) gives."
            )
        self.images, self.classes = images.double(), observation.num_classes
        self.targets = one_hot(labels, observation.num_classes).double()
        self.names = tuple(self.network.secrets)
        self._shapes = [self.network.secrets[name].shape for name in self.names]
        parts = [secrets[name].detach().double().flatten() for name in self.names]
        self.secrets = torch.cat(parts) if parts else images.new_zeros(0).double()
        self._unit = 1.0
        self._unit = self._told_unit()
        _check_random(observation, self.images[0])
        self._check(observation)

    @property
    def inputs(self) -> int:
        """Unknown pixels of one update."""
        return self.images[0].numel()

    @property
    def values(self) -> int:
        """Observed numbers of one update: gradient and statistics."""
        told = sum(before.numel() for before in self.network.statistics.before.values())
        return self._gradients + told

    @property
    def _gradients(self) -> int:
        return sum(parameter.numel() for parameter in self.network.shared.values())

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Secrets by name from one flat vector."""
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = torch.split(flat, sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, parts, self._shapes, strict=True)}

    def seen(self, t: int, images: Tensor, secrets: Tensor) -> Tensor:
        """The ``t``-th update, flat, as it would be with these images and (flat) secrets."""
        return self._flat(*self.network.sent(self.named(secrets), images, self.targets[t]))

    def _told_unit(self) -> float:
        """What statistics are multiplied with to be as large as the gradient; 1 without any."""
        try:
            first = self.seen(0, self.images[0], self.secrets)
        except AttackError as error:
            raise AttackError(
                "a certificate computes in float64, and the model does not run there "
                f"({error.__cause__ or error}). Let its forward keep the dtype of its input, "
                "without casts such as x.float()."
            ) from error
        gradient, told = first[: self._gradients], first[self._gradients :]
        if not (bool(gradient.any()) and bool(told.any())):
            return 1.0
        return float(gradient.square().mean().sqrt() / told.square().mean().sqrt())

    def _flat(self, change: Mapping[str, Tensor], heard: Mapping[str, Tensor]) -> Tensor:
        told = [self._unit * heard[name].flatten() for name in self.network.statistics.rates]
        return torch.cat([*(value.flatten() for value in change.values()), *told])

    def by_inputs(self, t: int) -> Tensor:
        """J_x of the ``t``-th update: (values, inputs)."""
        return columns(lambda x: self.seen(t, x, self.secrets), self.images[t])

    def by_secrets(self, t: int) -> Tensor:
        """J_s of the ``t``-th update: (values, secrets)."""
        return columns(lambda s: self.seen(t, self.images[t], s), self.secrets)

    def _check(self, observation: Observation) -> None:
        # The images of several steps are seen in an order that nobody wrote down.
        if observation.kind != "gradient":
            return
        told = self.network.statistics.rates
        for t, change in enumerate(observation.changes):
            made = self.seen(t, self.images[t], self.secrets)
            heard = self.network.statistics.observed(observation.statistics[t]) if told else {}
            there = self._flat(self.network.observed(change), heard).double()
            apart = float((made - there).norm()) / max(float(there.norm()), 1e-300)
            if not apart <= _AGREEMENT:
                raise AttackError(
                    f"update {t} differs by {apart:.1%} from what the model gives at the images, "
                    "labels and secrets that were passed; pass the true ones, in order."
                )


def columns(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Jacobian of ``function`` (any shape → (m,)) as (m, numel), by forward differentiation."""
    size = at.numel()

    def push(tangent: Tensor) -> Tensor:
        return pushed(function, (at,), (tangent.view_as(at),))

    parts = [vmap(push)(block) for block in _basis(size, at)]
    if not parts:
        return at.new_zeros(len(function(at)), 0)
    return torch.cat(parts).T


def pushed(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    """The derivative of ``function`` at ``at`` along ``tangents``, by forward differentiation."""
    with warnings.catch_warnings():
        # PyTorch loads its own decompositions with a function that it has deprecated itself.
        warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
        found = jvp(function, at, tangents)[1]
    assert isinstance(found, Tensor)
    return found


def _basis(size: int, like: Tensor) -> Iterator[Tensor]:
    for start in range(0, size, _AT_ONCE):
        count = min(_AT_ONCE, size - start)
        block = like.new_zeros(count, size)
        block[torch.arange(count), start + torch.arange(count)] = 1.0
        yield block


def _check_random(observation: Observation, images: Tensor) -> None:
    """Raises if the model draws random numbers, however little they change: what was drawn is lost.

    Raises:
        AttackError: It does.
    """
    model = deepcopy(observation.model).double().train(observation.training.train_mode)
    with borrowed(derive(0, "random")), torch.no_grad():
        before = torch.get_rng_state()
        model(images)
        drawn = not torch.equal(torch.get_rng_state(), before)
    if drawn:
        raise AttackError(
            "the model is random in training, so that the same images give another update every "
            "time; one that drops (dropout) cannot be certified, so set its rates to 0."
        )


def _check_statistics(observation: Observation) -> None:
    """Raises unless every buffer that was sent, or would be, can be derived by the images.

    Raises:
        AttackError: Names the first that cannot; what it tells would be left out.
    """
    model, training = observation.model, observation.training
    before = dict(model.named_buffers())
    sent = observation.statistics[0] if observation.statistics else {}
    covered = Statistics(model, tuple(sent), training).before
    for t, one in enumerate(observation.statistics):
        for name, after in one.items():
            owner, _, kind = name.rpartition(".")
            if kind == "num_batches_tracked" or (owner in covered and kind in RUNNING):
                continue
            if name not in before or not torch.equal(after.double(), before[name].double()):
                raise AttackError(
                    f"{name} is sent and was changed by update {t}, but it is no running statistic "
                    "of a batch norm with a momentum, so what it tells of the images cannot be "
                    "certified; keep it private, or take a norm without such a buffer."
                )
    spec = observation.spec or {}
    if not spec.get("statistics_shared") or not training.train_mode:
        return
    names = [f"{site['name']}.{kind}" for site in spec["sites"] for kind in RUNNING]
    if lacking := [name for name in names if name in before and name not in sent]:
        raise AttackError(
            "the lock spec says that running statistics are shared, but the observation has no "
            f"{lacking[0]}; pass what was sent as Observation(statistics=...), or lock without "
            "share_statistics."
        )
