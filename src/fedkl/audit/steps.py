"""How an update of another framework was made: the contents of ``steps.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedkl.errors import LARGEST, ConfigError, check_positive, number_of, unknown
from fedkl.federation.config import check_nesterov
from fedkl.observation import Training
from fedkl.pruning import check_ratio

_KINDS: Final = {"lr": float, "update_length": float, "prune_ratio": float, "labels": tuple}


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How an update was made: the contents of ``steps.toml``.

    Attributes:
        num_classes, channels, image_size: Of the model.
        batch_size, local_steps, lr, momentum, nesterov, weight_decay: Of the client's SGD; ``lr``
            may be left out for a single step without momentum and weight decay, where it only
            scales the gradient: how large that is is then unknown, so gradients are compared at one
            length, and labels of a batch, which are counted from it, have to be given.
        repeats: Every step saw the same batch.
        train_mode: Batch norms used the batch's own statistics.
        update_length: L2 norm at which updates are sent, if they are sent at one. Where it is not
            known any number above 0 will do: the update shows it.
        prune_ratio: Share of every tensor's entries that the client removed, in [0, 1).
        labels: The true labels, if they are known, in the order of the steps: those of the first
            batch, then those of the second. Within a batch their order makes no difference.
    """

    num_classes: int = 10
    channels: int = 3
    image_size: int = 32
    batch_size: int = 1
    local_steps: int = 1
    repeats: bool = False
    lr: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    train_mode: bool = True
    update_length: float | None = None
    prune_ratio: float | None = None
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels", "image_size", "batch_size", "local_steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(
                f"lr must be a positive number, got {self.lr}; give the learning rate of the "
                "client's steps, or leave lr out where there was a single one."
            )
        if self.lr is not None:
            check_positive("lr", self.lr)
        if self.update_length is not None:
            check_positive("update_length", self.update_length)
        if self.prune_ratio is not None:
            check_ratio(self.prune_ratio)
        if self.lr is None and (self.local_steps > 1 or self.momentum or self.weight_decay):
            raise ConfigError(
                "lr is needed to repeat several steps, momentum or weight decay; set lr in the "
                "file of steps."
            )
        for name in ("momentum", "weight_decay"):
            if not 0 <= (rate := getattr(self, name)) < (1 if name == "momentum" else LARGEST):
                raise ConfigError(
                    f"{name} must be 0 or more (momentum below 1, weight decay below "
                    f"{LARGEST:g}), got {rate}."
                )
        check_nesterov(self.nesterov, self.momentum)
        if self.labels is not None and not all(0 <= i < self.num_classes for i in self.labels):
            raise ConfigError(
                f"got labels {list(self.labels)}; expected classes within 0 … "
                f"{self.num_classes - 1} (num_classes is {self.num_classes})."
            )
        if self.labels is not None and len(self.labels) != self.training.images:
            raise ConfigError(
                f"got {number_of(len(self.labels), 'label')} for "
                f"{number_of(self.training.images, 'image')} behind the "
                "update (batch_size x local_steps); give one for each, or none."
            )

    @property
    def training(self) -> Training:
        """As an observation has it."""
        return Training(
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            repeats=self.repeats,
            lr=1.0 if self.lr is None else self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            train_mode=self.train_mode,
            length=self.update_length,
            prune_ratio=self.prune_ratio,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UpdateConfig:
        """From a parsed TOML file.

        Raises:
            ConfigError: An unknown or ill-typed setting, with the nearest names.
        """
        known = cls.__dataclass_fields__
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in known:
                raise ConfigError(unknown("setting of an update", str(name), known))
            kind = _KINDS.get(name, type(known[name].default))
            if kind is float and type(value) is int:
                value = float(value)
            if kind is tuple and isinstance(value, list):
                value = tuple(value)
            if type(value) is not kind or not _integers(value):
                wanted = "list of integers" if kind is tuple else kind.__name__
                raise ConfigError(f"{name}: expected {wanted}, got {value!r}.")
            values[name] = value
        return cls(**values)


def _integers(value: object) -> bool:
    return not isinstance(value, tuple) or all(type(item) is int for item in value)
