"""Whose image has which label, where an update is the mean of several clients'.

The gradient of a classifier tells how often every label is behind an update, not which client has
it. Behind locks clients compute differently: the right labels at the wrong clients match nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, product
from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.network import Network
from fedkl.observation import Observation

MOST: Final = 24
"""Orders that are tried: all of four clients with one image each."""


def arrangements(
    labels: Tensor, observation: Observation, network: Network, generator: torch.Generator
) -> list[Tensor]:
    """Orders (T, images) in which the labels may belong to the clients, int64 places.

    The images of an update belong to its clients in turn, and those of one client are not told
    apart. Neither are clients whose secrets are unknown: there only matters who shares a batch.

    Args:
        labels: Of one victim (T, images).
        observation: The victim.
        network: Its public model.
        generator: Draws orders where there are more than :data:`MOST`.

    Returns:
        From 1 to :data:`MOST` orders, the first of which leaves the labels as they are.
    """
    clients = observation.training.clients
    same = torch.arange(labels.shape[1]).expand_as(labels)
    known = _known_apart(observation.known, network)
    if clients == 1 or (labels.shape[1] == clients and not known):
        return [same]
    rows = [row.tolist() for row in labels]
    found = [list(islice(_orders(row, clients, known), MOST + 1)) for row in rows]
    if all(len(one) == 1 for one in found):
        return [same]
    every = list(islice(product(*found), MOST + 1))
    if len(every) > MOST:
        every = _drawn(rows, clients, known, generator)
    mine = tuple(tuple(range(len(row))) for row in rows)
    looks = {_look(mine, rows, clients, known): mine}
    for one in every:
        looks.setdefault(_look(one, rows, clients, known), one)
    return [torch.tensor(one) for one in islice(looks.values(), MOST)]


def _known_apart(known: Mapping[str, Tensor], network: Network) -> bool:
    return any(
        known[name].dim() > own.dim() for name, own in network.secrets.items() if name in known
    )


def _orders(labels: list[int], clients: int, known: bool) -> Iterator[tuple[int, ...]]:
    """Every way to deal the labels out that looks different, each as places."""
    dealt = sorted(range(len(labels)), key=lambda place: labels[place])
    for groups in _deals(tuple(sorted(labels)), len(labels) // clients, known):
        left, places = list(dealt), []
        for label in (label for group in groups for label in group):
            at = next(i for i, place in enumerate(left) if labels[place] == label)
            places.append(left.pop(at))
        yield tuple(places)


def _deals(
    left: tuple[int, ...], size: int, known: bool, before: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Ways to divide sorted labels into groups; of unknown clients in ascending order only."""
    if not left:
        yield ()
        return
    for group in _groups(left, size):
        if not known and group[0] != left[0]:
            return  # the least label left would be in a later group
        if not known and group < before:
            continue
        rest = list(left)
        for label in group:
            rest.remove(label)
        for others in _deals(tuple(rest), size, known, group):
            yield (group, *others)


def _groups(left: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """Different sorted groups of so many of the sorted labels, in ascending order."""
    if size == 0:
        yield ()
        return
    for at in range(len(left) - size + 1):
        if at and left[at] == left[at - 1]:
            continue
        for rest in _groups(left[at + 1 :], size - 1):
            yield (left[at], *rest)


def _drawn(
    rows: list[list[int]], clients: int, known: bool, generator: torch.Generator
) -> list[tuple[tuple[int, ...], ...]]:
    """Too many to try them all: orders at random, the same few times over left out."""
    found: dict[object, tuple[tuple[int, ...], ...]] = {}
    for _ in range(10 * MOST):
        one = tuple(tuple(torch.randperm(len(row), generator=generator).tolist()) for row in rows)
        found.setdefault(_look(one, rows, clients, known), one)
        if len(found) == MOST:
            break
    return list(found.values())


def _look(
    orders: tuple[tuple[int, ...], ...], rows: list[list[int]], clients: int, known: bool
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """What an attacker sees of orders: equal for those that are the same to it."""
    looks = []
    for order, row in zip(orders, rows, strict=True):
        size = len(row) // clients
        dealt = [row[place] for place in order]
        groups = [tuple(sorted(dealt[at : at + size])) for at in range(0, len(dealt), size)]
        looks.append(tuple(groups if known else sorted(groups)))
    return tuple(looks)
