"""The one client update, used by every engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedkl.data import Images, augment
from fedkl.defenses import Defense, Sending
from fedkl.errors import DataError
from fedkl.federation.config import TrainingConfig
from fedkl.federation.length import at_length
from fedkl.federation.optim import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from fedkl.key import Key
from fedkl.locking import (
    copy_state,
    epoch_of,
    is_locked,
    private_names,
    private_views,
    renew,
    restart_lock,
    set_key,
    shared_views,
)
from fedkl.locking.sites import LOCK_NAME
from fedkl.models import logits
from fedkl.rng import borrowed


@dataclass(frozen=True)
class Update:
    """What one client sends in one round.

    Attributes:
        client: Number of the client.
        round: Number of the round, from 1.
        kind: ``state`` (shared state after training) or ``gradient`` (gradients of the shared
            parameters and values of the shared buffers).
        tensors: Under the original model's tensor names.
        examples: Number of examples it was made from.
    """

    client: int
    round: int
    kind: str
    tensors: Mapping[str, Tensor]
    examples: int


@dataclass(frozen=True)
class ClientTask:
    """What a client starts a round with. ``private`` None: it has not taken part yet.

    ``renew``: draw pad number ``epoch`` (None: the next) before anything else, then take
    ``renew_steps`` lock-only steps.
    """

    client: int
    round: int
    index: Tensor
    key: Key | None
    private: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    join: bool
    lr: float
    renew: bool = False
    renew_steps: int = 0
    keep_learned: bool = False
    epoch: int | None = None

    def __repr__(self) -> str:
        return f"ClientTask(client={self.client}, round={self.round}, examples={len(self.index)})"


@dataclass(frozen=True)
class ClientResult:
    """What a round leaves behind: the update for the server, the rest for the client's own disk."""

    update: Update
    private: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    loss: float
    presentations: int = 0

    def __repr__(self) -> str:
        return f"ClientResult({self.update.client}, {self.update.round}, loss={self.loss:.4f})"


class Workspace:
    """One locked model that plays one client after the other, and what all clients share.

    Args:
        model: Prepared by ``defense``; its tensors are overwritten by every task.
        defense: The defense that prepared it.
        images: The images that task indices point into.
        training: Settings of the local training.
        method: ``centralized``, ``fedavg`` or ``fedsgd``.
        augmented: Random crops and flips.
        device: Where to train.
        join_steps: Lock-only steps of a client that is new, or was absent.
        group: The key that says where all clients' locks start.
    """

    def __init__(
        self,
        model: nn.Module,
        defense: Defense,
        images: Images,
        training: TrainingConfig,
        *,
        method: str = "fedavg",
        augmented: bool = False,
        device: str = "cpu",
        join_steps: int = 0,
        group: Key | None = None,
    ) -> None:
        self.group = group
        self.model = model.to(device)
        self.defense = defense
        self.images = images
        self.training = training
        self.method = method
        self.augmented = augmented
        self.device = torch.device(device)
        self.join_steps = join_steps
        # Views of the parameters: reading and writing them is free. Without a lock all is shared.
        self.shared = shared_views(model)
        self.private = private_views(model)
        self.names = {p: n for n, p in model.named_parameters()}
        # Under every name: a tied parameter is in the state once for each.
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        # restart_lock draws from the key; what starts at a constant is put back from here.
        self._start = {n: t.clone() for n, t in self.private.items()}
        hidden = private_names(model)
        self.private_parameters = [p for p, n in self.names.items() if n in hidden]
        self.presented = 0  # images that have passed through a step
        self.has_batch_norm = any(isinstance(m, _BatchNorm) for m in model.modules())

    def enter(
        self, shared: Mapping[str, Tensor], key: Key | None, private: Mapping[str, Tensor] | None
    ) -> None:
        """Turns the model into the client's: global state, its key, its private state.

        Raises:
            StateError: The states do not fit the model.
        """
        copy_state(self.shared, self.defense.receive(shared), "shared state")
        if not is_locked(self.model):
            return
        if private is None:
            copy_state(self.private, self._start, "private state")
            restart_lock(self.model, key, self.group)
            return
        copy_state(self.private, private, "private state")
        # After the state, which says which pad of the key is the present one.
        if key is not None:
            set_key(self.model, key)

    def renew(self, key: Key, epoch: int | None = None, *, keep_learned: bool = False) -> None:
        """Puts the client's next pad, or that of a later epoch, in place of its present one.

        Raises:
            LockError: The lock has no pad.
        """
        epoch = epoch_of(self.model) + 1 if epoch is None else epoch
        renew(self.model, key, epoch, keep_learned=keep_learned)

    def join(
        self,
        shared: Mapping[str, Tensor],
        index: Tensor,
        generator: torch.Generator,
        lr: float,
        *,
        first: bool = True,
        steps: int | None = None,
    ) -> None:
        """A few steps on the lock alone, for a client that comes to a model it does not know.

        Fresh locks disagree on the sign of a channel; averaging what they teach the shared layers
        would cancel it. A client that comes back takes no more of them than a local epoch has.
        ``steps`` replaces their number.
        """
        given, steps = steps, self.join_steps
        if given is not None:
            steps = given
        elif not first:
            steps = min(steps, math.ceil(len(index) / self.training.batch_size))
        if not self.private_parameters or steps == 0:
            return
        self.model.train()
        optimizer = make_optimizer(self.private_parameters, lr, self.training)
        with borrowed(generator):
            for rows in self.batches(index, generator, steps=steps):
                self.model.zero_grad(set_to_none=True)
                self._loss(rows, generator).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        # Shared batch norms have seen these images as well; only the lock may move.
        copy_state(self.shared, self.defense.receive(shared), "shared state")

    def batches(
        self, index: Tensor, generator: torch.Generator, *, steps: int | None = None
    ) -> Iterator[Tensor]:
        """Rows of each step: ``local_epochs`` passes, or ``steps`` steps over as many as needed.

        A last batch of one example is left out where the model has batch norms, which cannot
        normalize it; unless all batches are of one example by the client's size or by the settings.
        """
        size, epochs, done = self.training.batch_size, 0, 0
        steps = self.training.local_steps if steps is None else steps
        whole = min(size, len(index)) > 1 and self.has_batch_norm
        while (done < steps) if steps is not None else (epochs < self.training.local_epochs):
            order = index[torch.randperm(len(index), generator=generator)]
            for rows in torch.split(order, size):
                if len(rows) == 1 and whole:
                    continue
                yield rows
                done += 1
                if done == steps:
                    return
            epochs += 1

    def _loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        x, y = self.images.batch(rows)
        self.presented += len(rows)
        if self.augmented:
            x = augment(x, generator)
        try:
            output = self.model(x.to(self.device))
        except ValueError as error:
            if len(rows) > 1 or not self.has_batch_norm:
                raise
            raise DataError(
                f"a batch norm cannot train on a batch of one example ({error}); use a larger "
                "batch_size, give every client two examples or more, or use norm = 'group'."
            ) from error
        return cross_entropy(logits(output), y.to(self.device))

    def train(
        self, task: ClientTask, generator: torch.Generator
    ) -> tuple[float, dict[str, Tensor]]:
        """Local training of the model as it is. Returns the mean loss and the optimizer's state."""
        self.model.train()
        optimizer = make_optimizer(self.model.parameters(), task.lr, self.training)
        if task.moments:
            load_optimizer_tensors(optimizer, self.names, task.moments)
        total, steps = torch.zeros((), device=self.device), 0
        with borrowed(generator):
            for rows in self.batches(task.index, generator):
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(rows, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                self.defense.step([p.grad for p in self.names if p.grad is not None])
                optimizer.step()
                total += loss.detach()
                steps += 1
        kept = optimizer_tensors(optimizer, self.names) if self.training.keep_momentum else {}
        return float(total / max(1, steps)), {n: t.detach().clone() for n, t in kept.items()}

    def gradient(
        self, task: ClientTask, generator: torch.Generator
    ) -> tuple[float, int, dict[str, Tensor], dict[str, Tensor]]:
        """One batch's gradient at the received weights; the lock takes its own step."""
        self.model.train()
        rows = next(self.batches(task.index, generator, steps=1))
        self.model.zero_grad(set_to_none=True)
        with borrowed(generator):
            loss = self._loss(rows, generator)
            loss.backward()  # type: ignore[no-untyped-call]
        self.defense.step([p.grad for p in self.names if p.grad is not None])
        tensors = {}
        for name, parameter in self.parameters.items():
            if name in self.shared:
                grad = parameter.grad
                tensors[name] = torch.zeros_like(parameter) if grad is None else grad.clone()
        tensors |= {n: t.clone() for n, t in self.shared.items() if n not in tensors}
        moments: dict[str, Tensor] = {}
        if self.private_parameters:
            optimizer = make_optimizer(self.private_parameters, task.lr, self.training)
            load_optimizer_tensors(optimizer, self.names, task.moments)
            optimizer.step()
            kept = optimizer_tensors(optimizer, self.names) if self.training.keep_momentum else {}
            moments = {n: t.detach().clone() for n, t in kept.items()}
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), len(rows), tensors, moments

    def protected(
        self,
        tensors: dict[str, Tensor],
        shared: Mapping[str, Tensor],
        kind: str,
        lr: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """What leaves in place of an update: at one length, if at all, then as the defense has it.

        A tied parameter is dealt with once, and sent alike under all its names.
        """
        received = None
        if kind == "state":
            received = {name: tensor.to(self.device) for name, tensor in shared.items()}
        found = self.rescaled(tensors, received, lr)
        names = [*self.names.values()]
        found = self.defense.share(found, Sending(received, names, generator))
        tied = {n: self.names[p] for n, p in self.parameters.items() if n != self.names[p]}
        return {**found, **{n: found[m].clone() for n, m in tied.items() if {n, m} <= found.keys()}}

    def rescaled(
        self, tensors: dict[str, Tensor], received: Mapping[str, Tensor] | None, lr: float
    ) -> dict[str, Tensor]:
        """The update at ``training.update_length``, if there is one; buffers stay as they are.

        Weights move by the rate of the round, so their length falls as that does. The server
        takes steps of its own along gradients, of which nothing was ``received``.
        """
        length = self.training.update_length
        if length is None:
            return tensors
        if received is not None:
            length *= lr / self.training.lr
        if length == 0:  # at a rate of 0 nothing moved
            return tensors
        return at_length(tensors, length, received=received, names={*self.names.values()})


def without_lock(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``moments`` of an optimizer without those of the lock's own parameters."""
    return {n: t for n, t in moments.items() if f".{LOCK_NAME}." not in n.replace(":", ".")}


def client_update(
    workspace: Workspace,
    shared: Mapping[str, Tensor],
    task: ClientTask,
    generator: torch.Generator,
) -> ClientResult:
    """One client's round: receive, join if it is new or was absent, train, strip, protect, send.

    A pure function of its arguments (the workspace's tensors are scratch space): the same global
    state, task and generator give the same bits in every process.

    Args:
        workspace: The model and settings.
        shared: Global shared state.
        task: The client's data, key and private state.
        generator: Batch order, augmentation and dropout; then the noise of a defense that has any.

    Raises:
        StateError: The global or private state does not fit the model.
    """
    workspace.enter(shared, task.key, task.private)
    if task.renew:
        assert task.key is not None
        workspace.renew(task.key, task.epoch, keep_learned=task.keep_learned)
        if not task.keep_learned:
            task = dataclasses.replace(task, moments=without_lock(task.moments))
    if task.join or task.renew:
        first = task.private is None
        steps = task.renew_steps if task.renew and not first else None
        workspace.join(shared, task.index, generator, task.lr, first=first, steps=steps)
    workspace.presented = 0
    if workspace.method == "fedsgd":
        loss, examples, tensors, moments = workspace.gradient(task, generator)
        kind = "gradient"
    else:
        loss, moments = workspace.train(task, generator)
        tensors = {name: tensor.clone() for name, tensor in workspace.shared.items()}
        kind, examples = "state", len(task.index)
    tensors = workspace.protected(tensors, shared, kind, task.lr, generator)
    update = Update(task.client, task.round, kind, tensors, examples)
    private = {name: tensor.clone() for name, tensor in workspace.private.items()}
    return ClientResult(update, private, moments, loss, workspace.presented)
