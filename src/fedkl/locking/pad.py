"""The pad scheme: one γ and one β per position, expanded from the key, and a private stem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError, SecretError, check_positive, unknown
from fedkl.key import Key, KeyStream
from fedkl.locking.scheme import Scheme, Site
from fedkl.locking.sources import (
    LOST,
    PICKLE_REMEDY,
    AffineSource,
    PrivateAffine,
    Sealed,
    copy_of,
    kept,
)

SCALE_LAWS: Final[Mapping[str, tuple[float, float]]] = {
    "near-one": (1.0, 0.3),
    "normal": (0.0, 1.0),
    "wide": (1.0, 3.0),
    "sign": (1.0, 0.0),
}
"""γ = ±|mean + deviation·N(0, 1)|, by name: (mean, deviation)."""
LEARNED: Final = ("position", "channel", "none")
STALE: Final = (
    "the pad in this model is of epoch {}, and its private state says {}; after loading a state "
    "put the key in again with fedkl.set_key(model, key). Average copies of a model "
    "(AveragedModel) with use_buffers=False, and anew after each renewal: learned parts of two "
    "pads have no mean."
)
# What a compiled model says, to which the numbers are none of its own.
_STALE_COMPILED: Final = STALE.replace("of epoch {}", "of one epoch").format("another")


class PadAffine(AffineSource):
    """γ and β of one site, redrawn from the key at any time, plus what is learned on top.

    The pad itself is neither parameter nor buffer. The buffer ``epoch`` says which pad it is, so a
    private state tells all that is needed, with the key, to make the lock again.

    Args:
        site: Name of the norm; names the key stream.
        pad: γ and β as drawn, (2, *shape).
        learned: Shape of what is learned on top, broadcasting over the pad's; None for nothing.
        epoch: Number of the pad.
        gain: What is learned is multiplied by it.
        spread, law: Those of the site, to draw its next pad.
        owner: Fingerprint of the key that drew it.
    """

    epoch: Tensor

    def __init__(
        self,
        site: str,
        pad: Tensor,
        learned: tuple[int, ...] | None,
        epoch: int = 0,
        *,
        gain: float = 1.0,
        spread: float = 3.0,
        law: str = "wide",
        owner: str = "",
    ) -> None:
        super().__init__(tuple(pad.shape[1:]))
        self.owner = owner
        self.site, self.gain, self.spread, self.law = site, gain, spread, law
        zeros = None if learned is None else torch.zeros(learned, dtype=pad.dtype)
        self.scale_learned = None if zeros is None else nn.Parameter(zeros.clone())
        self.shift_learned = None if zeros is None else nn.Parameter(zeros)
        self.register_buffer("epoch", torch.tensor(epoch))
        self._drawn = epoch
        self._stale = self._lost = False
        self._version = -1
        self._number = torch.tensor(epoch, device="cpu")  # where it stays
        self._sealed = self._master = Sealed(pad)

    def redraw(self, pad: Tensor, epoch: int, owner: str) -> None:
        """Puts another pad (2, *shape) in the place of this one; what was learned stays."""
        old = self._sealed.tensor
        self.owner = owner
        self._master = Sealed(pad)
        self._sealed = Sealed(pad.to(old.device, old.dtype))
        self._drawn, self._stale, self._lost = epoch, False, False
        self._number = torch.tensor(epoch, device="cpu")
        with torch.no_grad():
            self.epoch.fill_(epoch)

    def restart(self) -> None:
        """Forgets what was learned on top (in place)."""
        with torch.no_grad():
            for learned in (self.scale_learned, self.shift_learned):
                if learned is not None:
                    learned.zero_()

    def notice_epoch(self) -> None:
        """Called when a state was loaded: from another epoch, the pad no longer belongs to it."""
        self._stale = int(self.epoch) != self._drawn

    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of γ and β."""
        return self._sealed.tensor

    def _look_at_epoch(self) -> None:
        """Whoever averages or copies buffers writes into ``epoch`` without a word."""
        # Either would make the number a part of its program.
        if torch.compiler.is_compiling():
            # As a tensor it is none. A GPU would not survive the error.
            if self.epoch.is_cpu:
                torch._assert_async(self.epoch == self._number, _STALE_COMPILED)
            return
        if torch._C._get_tracing_state() is not None:
            return
        # The count of writes costs no wait for a GPU; in inference mode torch keeps none.
        version = -1 if self.epoch.is_inference() else self.epoch._version
        if version == -1 or version != self._version:
            self.notice_epoch()
            self._version = version

    def _pad(self, index: int, learned: Tensor | None) -> Tensor:
        if self._lost:
            raise LockError(LOST)
        if index == 0:  # once a call is enough, and γ is asked for first
            self._look_at_epoch()
        if self._stale:
            raise LockError(STALE.format(self._drawn, int(self.epoch)))
        # Of a replica on another device (DataParallel) only parameters and buffers have moved.
        value = self._sealed.tensor[index].to(self.epoch.device)
        return value if learned is None else torch.add(value, learned, alpha=self.gain)

    def _scale(self) -> Tensor:
        return self._pad(0, self.scale_learned)

    def _shift(self) -> Tensor:
        return self._pad(1, self.shift_learned)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.notice_epoch()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PadAffine:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # From the numbers as drawn: a visit to half precision costs no digits.
        old = self._sealed.tensor
        self._sealed = Sealed(fn(self._master.tensor.to(old.device)))
        self._lost = self._lost or not kept(old, self._sealed.tensor)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SecretError(PICKLE_REMEDY)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy_of(self, type(self), memo)

    def extra_repr(self) -> str:
        return f"positions={'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, kw_only=True)
class OpenPad(Scheme):
    """The pad's network without a key: γ and β per position are ordinary private parameters.

    The attacker's twin of :class:`Pad`, and a control: what a private stem and private learned
    maps are worth by themselves.

    Args:
        stem: Whether everything up to the first lock is private.
        head: Whether the classifier is private; None as in :class:`Pad`.
        lock_head_input: Whether a lock stands in front of the classifier.
        max_length: As in :class:`Pad`.
    """

    name: ClassVar[str] = "open-pad"
    positional: ClassVar[bool] = True

    stem: bool = True
    head: bool | None = False
    lock_head_input: bool = False
    max_length: int | None = None

    def source(self, site: Site, key: Key | None) -> AffineSource:
        return PrivateAffine(site.scale.new_ones(site.shape), site.shift.new_zeros(site.shape))

    def rebuilt(self) -> Scheme:
        """Itself: its secrets are ordinary parameters."""
        return self


@dataclass(frozen=True, kw_only=True)
class Pad(Scheme):
    """One γ and one β per position, drawn from the key, and a private stem drawn from the key.

    If the first lock cuts every path from the input to the shared layers, their gradients depend
    on it only through z = γ⊙norm(stem(x)) + β, and for every x some β gives the same z.

    Args:
        spread: Standard deviation of β. The norm's output has 1, so this is how wide the pad is.
        inner_spread: The same behind the first lock; None: as there.
        scale_law: γ = ±|1 + 0.3·N| (``near-one``), ±|N| (``normal``), ±|1 + 3·N| (``wide``) or ±1
            (``sign``), the sign of every position at random.
        inner_scale_law: The same behind the first lock; None: as there.
        learned: What is learned on top of the pad: one number per ``position``, one per
            ``channel``, or ``none``.
        gain: How much faster that learns than the norm's own affine would. A position hears its
            own gradient alone, an entry of an affine that of all its n positions: a step moves
            what is learned by lr·n·gain².
        stem: Whether everything up to and including the first lock is private, drawn from the key.
        head: Whether the classifier is private as well, so that no gradient gives its input away:
            every layer from which an output of the model follows, in eval mode, without another
            one's parameters, also parameters that are read without a call; behind a last norm the
            last linear layer too. None: yes, unless nothing would be left to share, and if no
            output has a gradient, the last linear layer.
        lock_head_input: Whether a norm with a pad is inserted in front of the classifier.
        max_length: Rows allocated for tokens (T, D); None takes the example's length. Of shorter
            inputs the first T rows are used. What is learned of them moves as fast as if all were
            used: many rows too many are a high gain.
    """

    name: ClassVar[str] = "pad"
    keyed: ClassVar[bool] = True
    positional: ClassVar[bool] = True

    spread: float = 3.0
    inner_spread: float | None = 0.3
    scale_law: str = "wide"
    inner_scale_law: str | None = "near-one"
    learned: str = "position"
    gain: float = 1.0
    stem: bool = True
    head: bool | None = None
    lock_head_input: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for law in (self.scale_law, self.inner_scale_law):
            if law is not None and law not in SCALE_LAWS:
                raise ConfigError(unknown("law of γ", law, SCALE_LAWS))
        if self.learned not in LEARNED:
            raise ConfigError(unknown("learned part of a pad", self.learned, LEARNED))
        for name in ("spread", "inner_spread", "gain"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value)
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1, got {self.max_length}.")

    def source(self, site: Site, key: Key | None) -> AffineSource:
        if key is None:
            raise LockError("scheme 'pad' needs a key, got none: pass Key.generate().")
        scale, shape = site.scale, site.shape
        learned = {"position": shape, "channel": tuple(scale.shape), "none": None}[self.learned]
        first = site.previous is None
        spread, law = self.spread_of(first=first), self.law_of(first=first)
        pad = self.draw(site.name, shape, key, 0, spread=spread, law=law)
        positions = math.prod(learned or ()) / scale.numel()
        gain = self.gain * max(1.0, positions) ** 0.5
        owner = key.fingerprint
        source = PadAffine(site.name, pad, learned, gain=gain, spread=spread, law=law, owner=owner)
        return source.to(scale.device, scale.dtype)

    def spread_of(self, *, first: bool) -> float:
        """Spread of β at the first site that runs, or at a later one."""
        inner = self.inner_spread
        return self.spread if first or inner is None else inner

    def law_of(self, *, first: bool) -> str:
        """Law of γ at the first site that runs, or at a later one."""
        inner = self.inner_scale_law
        return self.scale_law if first or inner is None else inner

    def draw(
        self,
        site: str,
        shape: tuple[int, ...],
        key: Key,
        epoch: int,
        *,
        spread: float,
        law: str | None = None,
    ) -> Tensor:
        """γ and β of one site and epoch: float32 (2, *shape), the same in every process."""
        stream: KeyStream = key.stream(f"pad/{site}", epoch)
        mean, deviation = SCALE_LAWS[self.scale_law if law is None else law]
        signs = stream.signs(shape)
        scale = signs * (mean + deviation * stream.normal(shape)).abs()
        return torch.stack([scale, spread * stream.normal(shape)])

    def redraw(self, source: PadAffine, key: Key, epoch: int) -> None:
        """Puts the pad of ``key`` and ``epoch`` into a source; what was learned stays."""
        site, shape = source.site, source.shape
        pad = self.draw(site, shape, key, epoch, spread=source.spread, law=source.law)
        source.redraw(pad, epoch, key.fingerprint)

    def rebuilt(self) -> Scheme:
        """γ and β per position as parameters; stem and head those of the fresh architecture."""
        return OpenPad(
            stem=self.stem,
            head=self.head,
            lock_head_input=self.lock_head_input,
            max_length=self.max_length,
        )
