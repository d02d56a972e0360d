"""What a scheme is: how γ and β of a site come about, as plain data plus one factory method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Final, get_args, get_type_hints

from torch import Tensor

from fedkl.errors import ConfigError
from fedkl.key import Key
from fedkl.locking.sources import AffineSource

_KINDS: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "None",
}


def _is(value: object, kind: Any) -> bool:
    """Whether ``value`` is of the type of a field; true counts as no number."""
    if kind not in _KINDS:
        return True
    if kind is float:
        return isinstance(value, float) or type(value) is int
    return type(value) is int if kind is int else isinstance(value, kind)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a scheme gets to see of the norm that it makes a source for.

    Attributes:
        name: Name of the norm, which also names the key stream.
        scale: The norm's γ before locking; gives dtype and device. Of a positional scheme it
            is shaped so that it broadcasts over ``shape``.
        shift: The norm's β before locking, shaped alike.
        shape: Shape that γ and β are to have.
        previous: The source of the site executed before this one, None at the first.
    """

    name: str
    scale: Tensor
    shift: Tensor
    shape: tuple[int, ...]
    previous: AffineSource | None


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """What stands at every site. Public: it is part of the lock spec.

    Attributes:
        name: Its name in the registry.
        keyed: Whether it takes a key.
        private: Whether anything stays with the client.
        positional: Whether γ and β have one entry per position of the norm's output, instead of
            the shape of the norm's own affine. Sizes then come from an example.
    """

    name: ClassVar[str]
    keyed: ClassVar[bool] = False
    private: ClassVar[bool] = True
    positional: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the types of the settings.

        Raises:
            ConfigError: A setting is of another type than its field.
        """
        hints = get_type_hints(type(self))
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            kinds = get_args(hints[name]) or (hints[name],)
            if not any(_is(value, kind) for kind in kinds):
                wanted = " or ".join(_KINDS.get(kind, str(kind)) for kind in kinds)
                raise ConfigError(
                    f"setting {name} of scheme {self.name!r} must be {wanted}, got {value!r:.60} "
                    f"({type(value).__name__})."
                )

    @property
    def needs_example(self) -> bool:
        """Whether locking takes an example input."""
        return self.positional

    @property
    def takes_group(self) -> bool:
        """Whether locks of this scheme can start where a group key says."""
        return False

    @abstractmethod
    def source(self, site: Site, key: Key | None) -> AffineSource | None:
        """The affine source of one site, or None where the norm keeps its own affine.

        ``key`` is the client's, None for keyless schemes.

        Raises:
            LockError: The scheme takes a key and there is none.
        """

    @abstractmethod
    def rebuilt(self) -> Scheme:
        """The keyless twin: the same sites and shapes, every secret an ordinary parameter.

        γ and β are ``keylock.gamma`` and ``keylock.beta``. This is what an attacker optimizes who
        knows the lock spec and frees every secret.
        """

    def settings(self) -> dict[str, Any]:
        """The fields as a dict of plain values."""
        return asdict(self)
