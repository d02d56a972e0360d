"""What a scheme is: how γ and β of a site come about, as plain data plus one factory method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedkl.key import Key
from fedkl.locking.sources import AffineSource


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

    @property
    def needs_example(self) -> bool:
        """Whether locking takes an example input."""
        return self.positional

    @property
    def takes_group(self) -> bool:
        """Whether locks of this scheme can start where a group key says."""
        return False

    @abstractmethod
    def source(
        self,
        site: str,
        scale: Tensor,
        shift: Tensor,
        key: Key | None,
        previous: AffineSource | None,
        shape: tuple[int, ...],
    ) -> AffineSource | None:
        """The affine source of one site, or None where the norm keeps its own affine.

        Args:
            site: Name of the norm, which also names the key stream.
            scale: The norm's γ before locking; gives dtype and device. Of a positional scheme it
                is shaped so that it broadcasts over ``shape``.
            shift: The norm's β before locking, shaped alike.
            key: The client's key, None for keyless schemes.
            previous: The source of the site executed before this one, None at the first.
            shape: Shape that γ and β are to have.
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
