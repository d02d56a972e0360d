"""Dividing training images among clients: iid, by shards, by a Dirichlet law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkl.errors import ConfigError, DataError, number_of, unknown

_TRIES = 1000


@dataclass(frozen=True)
class _Cut:
    """What a scheme may depend on besides the labels and the generator."""

    clients: int
    alpha: float
    shards_per_client: int
    samples: int | None


def _iid(labels: Tensor, cut: _Cut, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(len(labels), generator=generator)
    if cut.samples is None:
        return list(order.tensor_split(cut.clients))
    needed = cut.samples * cut.clients
    if needed > len(labels):
        raise DataError(
            f"{number_of(cut.clients, 'client')} with {number_of(cut.samples, 'image')} each: that "
            f"takes {needed} images, and there are {len(labels)}. Use fewer clients or samples."
        )
    return list(order[:needed].view(cut.clients, cut.samples))


def _shards(labels: Tensor, cut: _Cut, generator: torch.Generator) -> list[Tensor]:
    """McMahan et al. 2017, section 3: sort by label, cut, deal the shards at random."""
    count = cut.clients * cut.shards_per_client
    if cut.shards_per_client < 1 or count > len(labels):
        raise DataError(
            f"{number_of(cut.clients, 'client')} with {number_of(cut.shards_per_client, 'shard')} "
            "each: expected 1 or more shards per client and at most "
            f"{number_of(len(labels), 'shard')}, one per image."
        )
    mixed = torch.randperm(len(labels), generator=generator)  # which image of a class is chance
    shards = mixed[labels[mixed].argsort(stable=True)].tensor_split(count)
    deal = torch.randperm(count, generator=generator).view(cut.clients, -1)
    return [torch.cat([shards[shard] for shard in hand]) for hand in deal.tolist()]


def _dirichlet(labels: Tensor, cut: _Cut, generator: torch.Generator) -> list[Tensor]:
    """Each class is divided by proportions from Dirichlet(alpha), independently of the others.

    The symmetric law of Hsu et al. 2019 drawn once per class rather than once per client, so
    that every image goes to exactly one client.
    """
    if not (cut.alpha > 0 and math.isfinite(cut.alpha)):
        raise DataError(f"alpha is {cut.alpha}; the Dirichlet law needs a finite number above 0.")
    # NumPy's Dirichlet does not underflow to 0/0 for small alpha, torch's does.
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator).item()))
    classes, sizes = np.unique(labels.numpy(), return_counts=True)
    for _ in range(_TRIES):
        shares = rng.dirichlet([cut.alpha] * cut.clients, size=len(classes))
        ends = np.rint(shares.cumsum(axis=1)[:, :-1] * sizes[:, None])
        if not np.isfinite(ends).all():
            continue
        counts = np.diff(ends, axis=1, prepend=0, append=sizes[:, None])
        if counts.sum(axis=0).min() >= 1:
            return _divide(labels, classes.tolist(), ends.astype(np.int64).tolist(), generator)
    raise DataError(
        f"in {_TRIES} draws of Dirichlet({cut.alpha}) some of {cut.clients} clients always got no "
        f"image out of {len(labels)}. Use fewer clients or a larger alpha."
    )


def _divide(
    labels: Tensor, classes: list[int], ends: list[list[int]], generator: torch.Generator
) -> list[Tensor]:
    """Class k, shuffled and cut at ``ends[k]``: one piece for each client."""
    pieces = []
    for label, row in zip(classes, ends, strict=True):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        pieces.append(members.tensor_split(row))
    return [torch.cat(hand) for hand in zip(*pieces, strict=True)]


PARTITIONS: Mapping[str, Callable[[Tensor, _Cut, torch.Generator], list[Tensor]]] = {
    "iid": _iid,
    "shards": _shards,
    "dirichlet": _dirichlet,
}


def partition(
    labels: Tensor,
    clients: int,
    scheme: str = "iid",
    *,
    generator: torch.Generator,
    alpha: float = 0.5,
    shards_per_client: int = 2,
    samples: int | None = None,
) -> list[Tensor]:
    """Divide images among clients.

    Args:
        labels: int64 (N,), the images' classes.
        clients: number of parts, 1 to N.
        scheme: one of ``PARTITIONS``.
        generator: CPU generator of every choice.
        alpha: of ``dirichlet``, above 0; the smaller, the more unequal the clients.
        shards_per_client: of ``shards``, at least 1.
        samples: images per client. For ``iid`` exactly as many; for the others at most as many,
            since a client may have fewer. Default: all images.

    Returns:
        One ascending int64 index tensor into ``labels`` per client; disjoint, none empty.

    Raises:
        ConfigError: the scheme is unknown.
        DataError: a number is out of range, or there are not enough images.
    """
    if scheme not in PARTITIONS:
        raise ConfigError(unknown("partition", scheme, PARTITIONS))
    if not 1 <= clients <= len(labels):
        raise DataError(
            f"{number_of(clients, 'client')} for {number_of(len(labels), 'image')}; "
            "use at least 1 client and at most one per image."
        )
    if samples is not None and samples < 1:
        raise DataError(f"samples is {samples}; give each client at least 1 image.")
    cut = _Cut(clients, alpha, shards_per_client, samples)
    parts = PARTITIONS[scheme](labels, cut, generator)
    if samples is not None:
        parts = [part[torch.randperm(len(part), generator=generator)[:samples]] for part in parts]
    return [part.sort().values for part in parts]
