"""Whose image has which label, and at which step, where an update is of several batches.

The gradient of a classifier tells how often every label is behind an update, not which client has
it, nor which step saw it. Behind locks clients compute differently, and from step to step the
weights move: the right labels at the wrong place match nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import factorial
from typing import Final

import torch
from torch import Tensor

from fedkl.attacks.network import Network
from fedkl.observation import Observation, Training

MOST: Final = 24
"""Orders that are tried: all of four clients, or four steps, with one image each."""

Groups = tuple[tuple[int, ...], ...]


def too_many(training: Training, updates: int) -> bool:
    """Whether there are more ways than :data:`MOST` to deal one client's labels to its steps.

    Args:
        training: How updates are made; labels are taken to be all different.
        updates: Of each victim.
    """
    images = training.batch_size * training.batches
    ways = factorial(images) // factorial(training.batch_size) ** training.batches
    return training.clients == 1 and ways**updates > MOST


def arrangements(
    labels: Tensor, observation: Observation, network: Network, generator: torch.Generator
) -> list[Tensor]:
    """Orders (T, images) in which the labels may belong to clients and steps, int64 places.

    The images of an update belong to its clients in turn, and those of each to its steps; those of
    one batch are not told apart. Neither are clients whose secrets are unknown: there only matters
    who shares a client. Granted labels of one client whose order is granted as well stay.

    Args:
        labels: Of one victim (T, images).
        observation: The victim.
        network: Its public model.
        generator: Draws orders where there are more than :data:`MOST`.

    Returns:
        From 1 to :data:`MOST` orders, the first of which leaves the labels as they are.
    """
    training = observation.training
    same = torch.arange(labels.shape[1]).expand_as(labels)
    told = observation.labels is not None and observation.ordered and training.clients == 1
    if told or training.clients * training.batches == 1:
        return [same]
    deal = _Deal(training.clients, training.batches, _known_apart(observation.known, network))
    rows = [row.tolist() for row in labels]
    found = [list(islice(deal.orders(row), MOST + 1)) for row in rows]
    if all(len(one) == 1 for one in found):
        return [same]
    every = list(islice(product(*found), MOST + 1))
    if len(every) > MOST:
        every = deal.drawn(rows, generator)
    mine = tuple(tuple(range(len(row))) for row in rows)
    looks = {deal.look(mine, rows): mine}
    for one in every:
        looks.setdefault(deal.look(one, rows), one)
    return [torch.tensor(one) for one in islice(looks.values(), MOST)]


def _known_apart(known: Mapping[str, Tensor], network: Network) -> bool:
    return any(
        known[name].dim() > own.dim() for name, own in network.secrets.items() if name in known
    )


@dataclass(frozen=True)
class _Deal:
    """Ways to deal labels out.

    Attributes:
        clients: Behind an update.
        steps: Of each, with a batch of its own.
        known: Whether clients are told apart.
    """

    clients: int
    steps: int
    known: bool

    def orders(self, labels: list[int]) -> Iterator[tuple[int, ...]]:
        """Every way that looks different, each as places."""
        dealt = sorted(range(len(labels)), key=lambda place: labels[place])
        size = len(labels) // (self.clients * self.steps)
        for groups in self._groups(tuple(sorted(labels)), size):
            left, places = list(dealt), []
            for label in (label for group in groups for label in group):
                at = next(i for i, place in enumerate(left) if labels[place] == label)
                places.append(left.pop(at))
            yield tuple(places)

    def _groups(self, left: tuple[int, ...], size: int, done: Groups = ()) -> Iterator[Groups]:
        """Sorted labels in groups; unknown clients, each so many of these, in ascending order."""
        if not left:
            yield done
            return
        steps = self.steps
        for group in _subsets(left, size):
            if not self.known and steps == 1 and group[0] != left[0]:
                return  # the least label left would be in a later group
            now = (*done, group)
            whole = len(now) % steps == 0 and len(now) > steps
            if not self.known and whole and now[-steps:] < now[-2 * steps : -steps]:
                continue
            rest = list(left)
            for label in group:
                rest.remove(label)
            yield from self._groups(tuple(rest), size, now)

    def drawn(self, rows: list[list[int]], generator: torch.Generator) -> list[Groups]:
        """Too many to try them all: orders at random, the same few times over left out."""
        found: dict[object, Groups] = {}
        for _ in range(10 * MOST):
            one = tuple(
                tuple(torch.randperm(len(row), generator=generator).tolist()) for row in rows
            )
            found.setdefault(self.look(one, rows), one)
            if len(found) == MOST:
                break
        return list(found.values())

    def look(self, orders: Groups, rows: list[list[int]]) -> tuple[tuple[Groups, ...], ...]:
        """What an attacker sees of orders: equal for those that are the same to it."""
        looks = []
        for order, row in zip(orders, rows, strict=True):
            size = len(row) // (self.clients * self.steps)
            dealt = [row[place] for place in order]
            groups = [tuple(sorted(dealt[at : at + size])) for at in range(0, len(dealt), size)]
            every = range(0, len(groups), self.steps)
            clients = [tuple(groups[at : at + self.steps]) for at in every]
            looks.append(tuple(clients if self.known else sorted(clients)))
        return tuple(looks)


def _subsets(left: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """Different sorted groups of so many of the sorted labels, in ascending order."""
    if size == 0:
        yield ()
        return
    for at in range(len(left) - size + 1):
        if at and left[at] == left[at - 1]:
            continue
        for rest in _subsets(left[at + 1 :], size - 1):
            yield (left[at], *rest)
