"""A locked model as an outsider can build it: the public architecture, secrets as unknowns."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from fedkl.locking.api import affines, lock_like
from fedkl.locking.holder import lock_spec, unwrap
from fedkl.locking.spec import LockSpec
from fedkl.locking.state import private_names


def rebuild(plain: nn.Module, spec: LockSpec) -> nn.Module:
    """A copy of ``plain`` that computes what a model locked as ``spec`` says computes.

    Every private tensor is an ordinary parameter, so that an attacker can set or search it: γ = 1
    and β = 0 per channel or per position, private layers with the weights of ``plain``. No key
    and no private tensor of a client comes along: ``plain`` is a fresh model of the public
    architecture.

    Raises:
        LockError: ``plain`` is not of the architecture that ``spec`` was made for.
    """
    keyless = spec.scheme_value().rebuilt()
    twin = replace(spec, scheme=keyless.name, settings=keyless.settings())
    return lock_like(plain, None, twin)


def secret_names(rebuilt: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a :func:`rebuild` model that stand for private tensors."""
    parameters = dict(rebuilt.named_parameters())
    return tuple(sorted(private_names(rebuilt) & parameters.keys()))


def held_secrets(locked: nn.Module) -> dict[str, Tensor]:
    """True values of a locked model's secrets, under the names that :func:`rebuild` gives them.

    For the control that holds the key; private.
    """
    spec = lock_spec(locked)
    parameters = dict(unwrap(locked).named_parameters())
    found = {n: parameters[n].detach().clone() for n in spec.private if n in parameters}
    for site, (scale, shift) in affines(locked).items():
        found[f"{site}.keylock.gamma"] = scale
        found[f"{site}.keylock.beta"] = shift
    return found
