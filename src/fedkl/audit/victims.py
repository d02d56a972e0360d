"""What clients really send: updates made with the federation's own client code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedkl.audit.config import AuditConfig
from fedkl.audit.floor import in_turn
from fedkl.data import DataBundle
from fedkl.defenses import make_defense
from fedkl.errors import CheckpointError, ConfigError, DataError, number_of
from fedkl.federation import ClientTask, RunConfig, client_update
from fedkl.federation.checkpoint import Checkpoints
from fedkl.federation.session import Session
from fedkl.locking import LockSpec, private_views
from fedkl.locking.rebuild import held_secrets, rebuild, secret_names
from fedkl.models import build
from fedkl.observation import Training
from fedkl.rng import derive

CLIENT = 0


@dataclass(frozen=True, eq=False)
class Sent:
    """Of one victim: T updates, and what a threat model may grant beyond them.

    Attributes:
        rows: Test images behind them, (T, images).
        changes: The change of every shared tensor per update.
        statistics: Shared buffers per update, as sent.
        lock_gradients: Gradient of the lock's own parameters per update.
    """

    rows: Tensor
    changes: tuple[dict[str, Tensor], ...]
    statistics: tuple[dict[str, Tensor], ...]
    lock_gradients: tuple[dict[str, Tensor], ...] = field(repr=False)  # it holds the key


class Victims:
    """The clients of one trained federation, at one stage.

    Args:
        config: The federation, its defense included.
        folder: Its run folder.
        bundle: Its data; victims are test images, which no client has trained on.
        audit: How updates are made.
        shared: Another global state than the stage's, such as a crafted one.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        bundle: DataBundle,
        audit: AuditConfig,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.audit, self.bundle = audit, bundle
        self.config = _attacked(config, audit)
        self.session = Session(self.config, folder, bundle)
        self.workspace = self.session.workspace
        self.workspace.images = bundle.test
        self.round, stage_state, sealed = _stage(self.session, folder, audit.stage)
        self.shared = dict(stage_state if shared is None else shared)
        if audit.aggregated > len(self.session.parts):
            raise ConfigError(
                f"aggregated is {audit.aggregated}, but the federation has "
                f"{len(self.session.parts)} client(s); lower it, or train with more clients."
            )
        self.owners = [
            (
                self.session.store.key(client),
                self.session.state(client, after=self.round, sealed=sealed).private,
            )
            for client in range(audit.aggregated)
        ]
        self.key, self.private = self.owners[CLIENT]
        self.training = _known(self.config, audit)

    @property
    def spec(self) -> LockSpec | None:
        """The lock spec, None without a lock."""
        return self.session.spec

    def public_model(self) -> nn.Module:
        """The architecture as an outsider builds it, with the shared tensors loaded."""
        run = self.config
        plain = build(
            run.model.name,
            num_classes=self.bundle.num_classes,
            channels=run.data.channels,
            image_size=run.data.image_size,
            # The outsider's own draw: what is private must not stand in it by accident.
            generator=derive(run.seed, "outsider"),
        )
        model = plain if self.spec is None else rebuild(plain, self.spec)
        own = dict(model.state_dict())
        with torch.no_grad():
            for name, tensor in self.shared.items():
                own[name].copy_(tensor)
        return model

    def secrets(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the private parameters of :meth:`public_model`."""
        return () if self.spec is None else secret_names(model)

    def held(self) -> dict[str, Tensor]:
        """The client's true secrets before its first step: for the control that holds the key."""
        if self.spec is None:
            return {}
        found = []
        for key, private in self.owners:
            self.workspace.enter(self.shared, key, private)
            secrets = held_secrets(self.workspace.model)
            found.append({n: t.detach().clone() for n, t in secrets.items()})
        if len(found) == 1:
            return found[0]
        return {n: torch.stack([one[n] for one in found]) for n in found[0]}

    def lock_weights(self) -> dict[str, Tensor]:
        """The lock's own tensors before the first step."""
        if self.spec is None:
            return {}
        self.workspace.enter(self.shared, self.key, self.private)
        found = private_views(self.workspace.model)
        return {n: t.detach().clone() for n, t in found.items() if ".keylock." in f".{n}"}

    def send(self, rows: Tensor, *, lock_gradients: bool = False) -> Sent:
        """Updates made from test images ``rows`` (T, images)."""
        changes, statistics, locks = [], [], []
        for t, images in enumerate(rows):
            parts = [
                self._update(client, mine, t)
                for client, mine in enumerate(images.chunk(self.audit.aggregated))
            ]
            mean = {n: torch.stack([p[n].float() for p in parts]).mean(dim=0) for n in parts[0]}
            parameters = self.workspace.parameters
            changes.append({n: v for n, v in mean.items() if n in parameters})
            statistics.append({n: v for n, v in mean.items() if n not in parameters})
            locks.append(self._lock_gradients(images) if lock_gradients else {})
        return Sent(rows, tuple(changes), tuple(statistics), tuple(locks))

    def _update(self, client: int, images: Tensor, t: int) -> dict[str, Tensor]:
        """What one client sends: changes of shared parameters, values of shared buffers."""
        key, private = self.owners[client]
        task = ClientTask(
            client=client,
            round=self.round + 1,
            index=images,
            key=key,
            private=private,
            moments={},
            join=False,
            lr=self.config.training.lr,
        )
        generator = derive(self.config.seed, "victim", int(images[0]), t)
        update = client_update(self.workspace, self.shared, task, generator).update
        if update.kind == "gradient":
            return dict(update.tensors)
        parameters = self.workspace.parameters
        return {n: self.shared[n] - v if n in parameters else v for n, v in update.tensors.items()}

    def _lock_gradients(self, images: Tensor) -> dict[str, Tensor]:
        workspace = self.workspace
        workspace.enter(self.shared, self.key, self.private)
        workspace.model.train()
        workspace.model.zero_grad(set_to_none=True)
        x, y = self.bundle.test.batch(images)
        cross_entropy(workspace.model(x), y).backward()  # type: ignore[no-untyped-call]
        found = {
            n: p.grad.clone()
            for n, p in workspace.model.named_parameters()
            if ".keylock." in f".{n}" and p.grad is not None
        }
        workspace.model.zero_grad(set_to_none=True)
        return found


def _attacked(config: RunConfig, audit: AuditConfig) -> RunConfig:
    """The federation's settings, with updates made as the audit has them."""
    training = dataclasses.replace(
        config.training,
        batch_size=audit.batch_size,
        local_steps=audit.local_steps,
        keep_momentum=False,
    )
    method = "fedsgd" if audit.local_steps == 1 else "fedavg"
    return dataclasses.replace(
        config,
        training=training,
        federation=dataclasses.replace(config.federation, method=method),
        # What is measured is the image as it is; and attacks are computed on the CPU.
        data=dataclasses.replace(config.data, augment=False),
        device="cpu",
    )


def _known(config: RunConfig, audit: AuditConfig) -> Training:
    """How updates are made, as far as the attacker knows: one gradient has no momentum or decay."""
    training, one_gradient = config.training, audit.local_steps == 1
    return Training(
        batch_size=audit.batch_size,
        local_steps=audit.local_steps,
        lr=training.lr,
        momentum=training.momentum if not one_gradient else 0.0,
        nesterov=training.nesterov and not one_gradient,
        weight_decay=training.weight_decay if not one_gradient else 0.0,
        clients=audit.aggregated,
        length=training.update_length,
        **make_defense(config.defense).known,
    )


def _stage(
    session: Session, folder: Path, stage: str
) -> tuple[int, Mapping[str, Tensor], Mapping[str, str]]:
    """Round, shared state, and what clients sealed in that round."""
    if stage == "initial":
        return 0, session.initial(), {}
    latest, _ = Checkpoints(folder / "checkpoints").latest()
    if latest is None:
        raise CheckpointError(
            f"there is no checkpoint in {folder}, so no {stage} stage; train it first, or audit "
            "--stage initial."
        )
    return latest.round, latest.shared, latest.sealed


def draw_victims(bundle: DataBundle, audit: AuditConfig) -> Tensor:
    """Rows of test images (victims, T, images): classes as evenly as possible, fixed by the seed.

    Batch 1 goes through the classes in turn; the images of a larger batch are drawn at random. No
    image is drawn twice: victims that share one are not independent, and intervals of them would be
    too narrow.

    Raises:
        DataError: There are fewer test images.
    """
    count, there = audit.images * audit.per_victim, len(bundle.test)
    if count > there:
        most = there // audit.per_victim
        raise DataError(
            f"{number_of(audit.images, 'victim')} of {number_of(audit.per_victim, 'image')}: that "
            f"takes {number_of(count, 'test image')}, but {bundle.name} has {there}; give "
            + (f"--images {most} or fewer" if most else "updates of fewer images")
            + (", or for updates of fewer images." if most and audit.per_victim > 1 else ".")
        )
    generator = derive(audit.run.seed, "victims")
    labels = bundle.test.labels
    order = torch.randperm(len(labels), generator=generator)
    if audit.per_victim == 1:
        order = in_turn(order, labels)
    return order[:count].view(audit.images, audit.observations, -1)
