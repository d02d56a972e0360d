"""The lock spec: what the public may know of a lock (Kerckhoffs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedkl.errors import CheckpointError
from fedkl.locking.scheme import Scheme
from fedkl.locking.schemes import scheme_of


@dataclass(frozen=True)
class SiteSpec:
    """One lock.

    Attributes:
        name: Name of the locked norm; ``<module>.inserted_norm`` where one was inserted behind a
            module, ``<layer>.input_norm`` where in front of a layer.
        norm: Class name of the norm.
        shape: Shape of γ and β.
        inserted: Whether the norm was inserted.
        rows: Whether it was behind something else than a convolution or linear layer, and runs over
            the last axis there (tokens).
    """

    name: str
    norm: str
    shape: tuple[int, ...]
    inserted: bool
    rows: bool = False


@dataclass(frozen=True)
class LockSpec:
    """Everything about a lock but the key and the private tensors.

    Attributes:
        scheme: Scheme name.
        settings: The scheme's settings (spread, activation, law of the key vector, …).
        sites: The locks in order of execution.
        norm: Kind of the inserted norms.
        statistics_shared: Whether running statistics of locked norms leave the client.
        private: Names of further private tensors: those of a private stem and head.
    """

    scheme: str
    settings: Mapping[str, Any]
    sites: tuple[SiteSpec, ...]
    norm: str
    statistics_shared: bool
    private: tuple[str, ...] = ()

    def scheme_value(self) -> Scheme:
        """The scheme as a value."""
        return scheme_of(self.scheme, **self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LockSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: Fields are missing or of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(
                f"expected a lock spec as a dict, got {type(data).__name__}; use the one that "
                "lock_spec(model).to_dict() wrote."
            )
        try:
            sites = tuple(
                SiteSpec(
                    name=s["name"],
                    norm=s["norm"],
                    shape=_shape(s["shape"]),
                    inserted=bool(s["inserted"]),
                    rows=bool(s.get("rows", False)),  # absent in earlier ones
                )
                for s in data["sites"]
            )
            return cls(
                scheme=data["scheme"],
                settings=dict(data["settings"]),
                sites=sites,
                norm=data["norm"],
                statistics_shared=bool(data["statistics_shared"]),
                private=tuple(data.get("private", ())),  # absent in those of version 0.1
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"not a lock spec: field {error} is missing or of the wrong kind; "
                "use the one that lock_spec(model).to_dict() wrote."
            ) from error


def _shape(values: Any) -> tuple[int, ...]:
    shape = tuple(values)
    if not shape or not all(type(n) is int and n > 0 for n in shape):
        raise TypeError(f"'shape' ({shape!s:.60})")
    return shape
