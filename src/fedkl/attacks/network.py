"""The public model as a pure function: from images, labels and secrets to what a client would send.

One victim at a time is described; :func:`torch.func.vmap` turns it into many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from fedkl.attacks.base import each
from fedkl.attacks.derivatives import TwiceDifferentiable
from fedkl.attacks.learned import learned_of
from fedkl.attacks.sending import as_sent
from fedkl.attacks.statistics import Heard, Statistics
from fedkl.errors import AttackError
from fedkl.observation import Observation, Training

Tensors = Mapping[str, Tensor]

MANY: Final = 32


class Network:
    """What the update of a client is, as a function of what the attacker does not know.

    Args:
        observation: One victim. Its model is copied.
        check: Whether to look at its changes (:meth:`check`).

    Raises:
        AttackError: The changes do not cover the model's public parameters.
    """

    def __init__(self, observation: Observation, *, check: bool = True) -> None:
        self.training: Training = observation.training
        self.kind = observation.kind
        sent = observation.statistics[0] if observation.statistics else {}
        self.statistics = Statistics(observation.model, tuple(sent), observation.training)
        self.model = _frozen(observation.model, observation.training.train_mode)
        self.model.train(observation.training.train_mode)
        parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.buffers = {n: b for n, b in self.model.named_buffers() if b is not None}
        hidden = set(observation.secrets)
        if strange := hidden - parameters.keys():
            raise AttackError(f"the secrets {sorted(strange)[:3]} are no parameters of the model.")
        self.shared = {n: p for n, p in parameters.items() if n not in hidden}
        self.secrets = {n: p for n, p in parameters.items() if n in hidden}
        learned = learned_of(observation.spec, self.model)
        self.learned = {n: one for n, one in learned.items() if n in hidden}
        self._trials = 0
        if check:
            self.check(observation)

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> Network:
        """The network of victims that share one model.

        Raises:
            AttackError: As :meth:`check`; names the victims.
        """
        network = cls(observations[0], check=False)
        each(observations, network.check)
        return network

    def check(self, observation: Observation) -> None:
        """Looks whether a victim of the same model sent what can be matched.

        Raises:
            AttackError: A shared tensor is missing, of another shape, or not finite; or it is the
                update of steps whose learning rate is not given.
        """
        lr = observation.training.lr
        if observation.kind == "update" and not lr > 0:
            raise AttackError(
                f"got an update made at a learning rate of {lr:g}, expected a positive one: what "
                "the update tells of the gradient is the change divided by it. Give the client's, "
                "as in Observation(training=Training(lr=0.1), ...)."
            )
        for change in observation.changes:
            _check(self.shared, change)

    @contextmanager
    def running(self, trials: int) -> Iterator[None]:
        """Within it, derivatives are taken the way that is fastest for so many trials at once.

        The same numbers every way. One trial: ordinary autograd, not under vmap; nothing has to
        be wrapped for a batch of one. Many: :mod:`.derivatives`, whose wrapping costs more than
        it saves if they are few.
        """
        before = self._trials
        self._trials = trials
        try:
            yield
        finally:
            self._trials = before

    @property
    def sized(self) -> bool:
        """Whether how large an update is can be told from how large its gradient is."""
        one = self.kind == "gradient" or self.training.clip is None
        return one and self.training.length is None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the observed parameters, in the model's order."""
        return tuple(self.shared)

    def run(self, parameters: Tensors, x: Tensor) -> Any:
        """Whatever the model puts out for images (B, C, H, W); hooks on its modules see it run.

        Raises:
            AttackError: It cannot run on many trials at once, or not at all.
        """
        twice = TwiceDifferentiable() if self._trials >= MANY else nullcontext()
        try:
            # Attention step by step: at once it has no second derivative and no rule for vmap.
            with Undropped(), twice, sdpa_kernel(SDPBackend.MATH):
                return functional_call(self.model, {**parameters, **self.buffers}, (x,))
        except RuntimeError as error:
            words = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise AttackError(
                f"the model does not run as attacks need it: {words}. Where torch.func.vmap is at "
                "fault, a search of one trial at a time goes without (parallel=1, --parallel 1)."
            ) from error

    def logits(self, parameters: Tensors, x: Tensor) -> Tensor:
        """Output (B, classes) for images (B, C, H, W) under ``parameters`` (all, by name)."""
        output = self.run(parameters, x)
        if isinstance(output, tuple | list):  # auxiliary heads behind; clients train on the first
            output = output[0]
        if not isinstance(output, Tensor):
            raise AttackError(
                f"the model returns a {type(output).__name__}; attacks need a tensor of logits, or "
                "a tuple that begins with it."
            )
        return output

    def loss(self, parameters: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy against label distributions ``y`` (B, classes)."""
        return -(y * F.log_softmax(self.logits(parameters, x), dim=-1)).sum(dim=-1).mean()

    def gradient(self, secrets: Tensors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gradient of the mean loss by the shared parameters, by name."""
        return self._one_step(secrets, x, y)[0]

    def _one_step(self, secrets: Tensors, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Heard]:
        def loss(shared: dict[str, Tensor]) -> tuple[Tensor, Heard]:
            return self._heard({**shared, **secrets}, x, y)

        return self._derivative(loss, self.shared)

    def _heard(self, parameters: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Heard]:
        """The loss, and the statistics that its batch norms took on the way."""
        with self.statistics.listening(self.model) as heard:
            return self.loss(parameters, x, y), heard

    def _derivative(
        self, loss: Callable[[dict[str, Tensor]], tuple[Tensor, Heard]], at: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Heard]:
        """Gradient of ``loss`` by every tensor of ``at``, itself differentiable; what it heard."""
        if self._trials != 1:
            found, heard = grad(loss, has_aux=True)(at)
            return dict(found), dict(heard)
        here = {n: t if t.requires_grad else t.detach().requires_grad_() for n, t in at.items()}
        value, heard = loss(here)
        gradients = torch.autograd.grad(
            value, list(here.values()), create_graph=True, materialize_grads=True
        )
        return dict(zip(here, gradients, strict=True)), heard

    def change(self, secrets: Tensors, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What the client would send for images ``x`` (images, C, H, W), labels (images, classes).

        One step of a gradient observation is its gradient. An update is unrolled: the client's
        own steps are repeated on guessed images, on shared and private parameters alike
        (Geiping et al. 2020, section 6), and the result is weights before minus after. γ and β of
        a lock move as the parameters do that they are computed from (:mod:`.learned`).
        """
        return self.sent(secrets, x, y)[0]

    def sent(self, secrets: Tensors, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Heard]:
        """As :meth:`change`, and the batch statistics that its norms would tell, where they do."""
        make, clients = self._made, self.training.clients
        if clients == 1:
            return make(secrets, x, y)
        # Secrets without an axis for the clients are taken to be everybody's.
        parts = [
            make({n: self._of(client, n, t) for n, t in secrets.items()}, xs, ys)
            for client, (xs, ys) in enumerate(zip(x.chunk(clients), y.chunk(clients), strict=True))
        ]
        return _mean([change for change, _ in parts]), _mean([heard for _, heard in parts])

    def _made(self, secrets: Tensors, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Heard]:
        """What one client would send."""
        make = self._one_step if self.kind == "gradient" else self._unrolled
        change, heard = make(secrets, x, y)
        return as_sent(change, self.training), heard

    def _of(self, client: int, name: str, secret: Tensor) -> Tensor:
        return secret[client] if secret.dim() > self.secrets[name].dim() else secret

    def _unrolled(self, secrets: Tensors, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Heard]:
        training, size = self.training, self.training.batch_size
        held = {n: one.start(secrets, n) for n, one in self.learned.items()}
        start = {**self.shared, **secrets, **held}
        now = start

        def known(learned: Tensors) -> dict[str, Tensor]:
            made = {n: one.value(learned[n], secrets, n) for n, one in self.learned.items()}
            return {**learned, **made}

        moments: dict[str, Tensor] = {}
        heard: list[Heard] = []
        for step in range(training.local_steps):
            at = 0 if training.repeats else step * size
            rows = slice(at, at + size)
            xs, ys = x[rows], y[rows]

            def loss(
                parameters: dict[str, Tensor], xs: Tensor = xs, ys: Tensor = ys
            ) -> tuple[Tensor, Heard]:
                return self._heard(known(parameters), xs, ys)

            gradient, told = self._derivative(loss, now)
            heard.append(told)
            now, moments = sgd(now, gradient, moments, training)
        change = {name: start[name] - now[name] for name in self.shared}
        return change, self.statistics.over(heard)

    def observed(self, change: Tensors) -> dict[str, Tensor]:
        """The entries of an observed change that belong to shared parameters, in order."""
        return {name: change[name].detach() for name in self.shared}


class Undropped(TorchFunctionMode):
    """Within it nothing is dropped out, however a model asks for it: no attacker knows what was."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > _RATE:
                args = (*args[:_RATE], 0.0, *args[_RATE + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


_RATE: Final = 4  # query, key, value, mask, and then how much attention drops
_DROPOUTS: Final = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
    }
)  # fmt: skip


def _mean(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    return {n: torch.stack([part[n] for part in parts]).mean(dim=0) for n in parts[0]}


def sgd(
    parameters: Tensors, gradients: Tensors, moments: Tensors, training: Training
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of :class:`torch.optim.SGD` as a pure function: new parameters, new momentum."""
    new, kept = {}, {}
    for name, parameter in parameters.items():
        direction = gradients[name]
        if training.weight_decay:
            direction = direction + training.weight_decay * parameter
        if training.momentum:
            before = moments.get(name)
            buffer = direction if before is None else training.momentum * before + direction
            kept[name] = buffer
            direction = direction + training.momentum * buffer if training.nesterov else buffer
        new[name] = parameter - training.lr * direction
    return new, kept


def _frozen(model: nn.Module, train_mode: bool) -> nn.Module:
    """A copy without gradients; in train mode without running statistics, which vmap forbids.

    Nor does it drop anything: nobody but the client knows what was dropped.
    """
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, _DropoutNd | StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if not train_mode or not isinstance(module, _BatchNorm | _InstanceNorm):
            continue
        if module.track_running_stats:
            module.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                module._buffers[name] = None
    return copy


def _check(shared: Tensors, change: Tensors) -> None:
    if missing := [name for name in shared if name not in change]:
        raise AttackError(
            f"the update lacks {', '.join(missing[:4])}, which the model has; give an update of "
            "the same architecture, with every shared tensor."
        )
    for name, parameter in shared.items():
        value = change[name]
        if value.shape != parameter.shape:
            raise AttackError(
                f"{name} of the update has shape {tuple(value.shape)}, that of the model "
                f"{tuple(parameter.shape)}; give an update of the same architecture."
            )
        if not bool(torch.isfinite(value).all()):
            raise AttackError(f"{name} of the update holds NaN or Inf; nothing can be matched.")
