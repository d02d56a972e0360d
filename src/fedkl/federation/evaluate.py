"""Accuracy with the key, with a wrong one, with somebody else's lock, and without any."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedkl.data import Images
from fedkl.federation.client import Workspace
from fedkl.key import LAWS, Key
from fedkl.locking import (
    Channel,
    affines,
    draw_layers,
    estimate_statistics,
    lock_spec,
    put_key,
    replaced_affines,
    restart_lock,
    set_key,
    sources_of,
)
from fedkl.metrics import count_correct
from fedkl.models import logits

EVAL_BATCH: Final = 250


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in [0, 1] over the evaluated clients; None where a thing does not apply.

    Attributes:
        own_key: Each client's own key and lock. Without a lock: the global model.
        wrong_key: Own lock weights with fresh keys: mean over clients and keys.
        wrong_key_p95: 95th percentile over clients and keys.
        other_client: Another client's key, lock and statistics.
        outsider: The best of what a thief does with the global model alone (γ = ±1, β = 0),
            statistics as they are or re-estimated on unlabelled images. Without a lock: the same
            as ``own_key``, since anyone can use the model.
        no_lock: The same for a thief who may also have the other clients' mean lock or the group
            key: the outsider's figure, or an insider's, whichever is higher.
        own_per_client, no_lock_per_client: The figures behind the means.
        wrong_keys: Every single wrong key, all clients.
        guess: What whoever always says the most frequent class gets: the share of that class in
            the images that wrong keys and thieves are tried on.
        thief: Mean accuracy of every variant of the thief.
    """

    own_key: float
    wrong_key: float | None
    wrong_key_p95: float | None
    other_client: float | None
    outsider: float | None
    no_lock: float | None
    own_per_client: tuple[float, ...]
    no_lock_per_client: tuple[float, ...]
    wrong_keys: tuple[float, ...]
    guess: float
    thief: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ClientAccuracy:
    """What was measured for one client."""

    own: float
    wrong: tuple[float, ...]
    other: float | None
    thief: Mapping[str, float]
    guess: float


def correct_share(model: nn.Module, images: Images, rows: Tensor, device: torch.device) -> float:
    """Share of ``rows`` that ``model`` classifies correctly, in eval mode; exact at the end too."""
    model.eval()
    correct = 0
    with torch.inference_mode():
        for part in torch.split(rows, EVAL_BATCH):
            x, y = images.batch(part)
            correct += count_correct(logits(model(x.to(device))), y.to(device))
    return correct / len(rows)


def reestimate(workspace: Workspace, images: Images, rows: Tensor, *, every_norm: bool) -> None:
    """Statistics of the workspace's batch norms anew, from ``rows`` without labels (in place)."""
    if len(rows) > 1 and len(rows) % EVAL_BATCH == 1:
        rows = rows[:-1]  # a batch norm cannot average over a last batch of one image
    batches = (images.batch(part)[0].to(workspace.device) for part in torch.split(rows, EVAL_BATCH))
    estimate_statistics(workspace.model, batches, every_norm=every_norm)


@dataclass(frozen=True)
class Exam:
    """What an evaluation is taken on.

    Attributes:
        images, rows: Labelled images.
        wrong_rows: The part of them that wrong keys and thieves are tried on.
        public, public_rows: Unlabelled images for re-estimated statistics.
        wrong_keys: Number of fresh keys.
    """

    images: Images
    rows: Tensor
    wrong_rows: Tensor
    public: Images
    public_rows: Tensor
    wrong_keys: int


def examine(
    workspace: Workspace,
    exam: Exam,
    key: Key | None,
    others: Sequence[tuple[Key | None, Mapping[str, Tensor]]],
    own_rows: Tensor,
) -> ClientAccuracy:
    """Measures the client that ``workspace`` currently is.

    Args:
        workspace: After :meth:`Workspace.enter` (and ``join``, for a client that was absent).
        exam: The images.
        key: The client's own key.
        others: Key and private state of other clients, the nearest first.
        own_rows: The client's own images, for the statistics of its private norms.
    """
    model, device = workspace.model, workspace.device
    own_private = {n: t.clone() for n, t in workspace.private.items()}
    before = {n: t.clone() for n, t in workspace.shared.items()}
    reestimate(workspace, workspace.images, own_rows, every_norm=False)
    own = correct_share(model, exam.images, exam.rows, device)
    guess = int(exam.images.labels[exam.wrong_rows].bincount().max()) / len(exam.wrong_rows)
    if not sources_of(model):
        return ClientAccuracy(own, (), None, {}, guess)
    wrong: list[float] = []
    if key is not None:
        for wrong_key in _wrong_keys(model, key, exam.wrong_keys):
            put_key(model, wrong_key)
            wrong.append(correct_share(model, exam.images, exam.wrong_rows, device))
        set_key(model, key)
    other, locks, layers = None, [], list[Mapping[str, Tensor]]()
    for number, (other_key, private) in enumerate(others):
        _put(workspace, other_key, private)
        locks.append(affines(model))
        layers.append({n: private[n] for n in lock_spec(model).private if n in private})
        if number == 0:
            reestimate(workspace, workspace.images, own_rows, every_norm=False)
            other = correct_share(model, exam.images, exam.wrong_rows, device)
    guesses = _guesses(workspace, locks)
    thief = _thief(workspace, exam, guesses, before, layers)
    _restore(workspace, before)
    _put(workspace, key, own_private)
    return ClientAccuracy(own, tuple(wrong), other, thief, guess)


def _wrong_keys(model: nn.Module, key: Key, count: int) -> Iterator[Key]:
    """Keys of the same law that have nothing to do with ``key`` for anyone who lacks it.

    They come out of its own key stream, so that a figure does not change when it is taken again.
    No module can be named like their stream.
    """
    scheme = lock_spec(model).scheme_value()
    law, length = (scheme.law, scheme.length) if isinstance(scheme, Channel) else ("normal", 32)
    for number in range(count):
        stream = key.stream("..wrong-key", number)
        yield Key.from_vector(LAWS[law](stream, (length,)))


def _put(workspace: Workspace, key: Key | None, private: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in workspace.private.items():
            tensor.copy_(private[name])
    # After the state, which says which pad of the key is the present one.
    if key is not None:
        set_key(workspace.model, key)


def _restore(workspace: Workspace, shared: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in workspace.shared.items():
            tensor.copy_(shared[name])


Affines = Mapping[str, tuple[Tensor, Tensor]]


def _guesses(workspace: Workspace, locks: Sequence[Affines]) -> dict[str, Affines]:
    """What a thief may take for the lock; none uses the victim's private tensors."""
    model = workspace.model
    neutral = {
        site: (torch.ones_like(source.scale()), torch.zeros_like(source.shift()))
        for site, source in sources_of(model).items()
    }
    # The key decides the sign of most channels; a thief tries the opposite as well.
    negated = {site: (-scale, shift) for site, (scale, shift) in neutral.items()}
    guesses: dict[str, Affines] = {"neutral": neutral, "negated": negated}
    if locks:
        guesses["others_mean"] = {
            site: (
                torch.stack([lock[site][0] for lock in locks]).mean(0),
                torch.stack([lock[site][1] for lock in locks]).mean(0),
            )
            for site in neutral
        }
    if workspace.group is not None:
        # Any key leads there, up to rounding; always the same one makes the figure repeatable.
        restart_lock(model, workspace.group, workspace.group)
        guesses["group"] = affines(model)
    return guesses


INSIDE: Final = ("others", "group")  # guesses that take more than the global model


def _layers_of_a_thief(workspace: Workspace, others: Sequence[Mapping[str, Tensor]]) -> None:
    """Private stem and head as a thief has them: at random, or the mean of other clients'."""
    # Anybody's key gives a random draw; always the same one makes the figure repeatable.
    draw_layers(workspace.model, Key.from_vector([1.0]))
    with torch.no_grad():
        for name in others[0] if others else ():
            values = torch.stack([other[name].double() for other in others])
            workspace.private[name].copy_(values.mean(0))


def _thief(
    workspace: Workspace,
    exam: Exam,
    guesses: Mapping[str, Affines],
    shared: Mapping[str, Tensor],
    layers: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Accuracy of each guess at the lock. ``layers``: the private layers of other clients."""
    model, device = workspace.model, workspace.device
    found = {}
    for name, guess in guesses.items():
        _restore(workspace, shared)  # the guess before has re-estimated shared statistics as well
        _layers_of_a_thief(workspace, layers if name.startswith(INSIDE) else ())
        with replaced_affines(model, guess):
            for site in guess:
                # Shared statistics are the thief's already; private ones it starts without.
                reset = getattr(model.get_submodule(site), "reset_running_stats", None)
                if reset is not None and f"{site}.running_mean" in workspace.private:
                    reset()
            found[name] = correct_share(model, exam.images, exam.wrong_rows, device)
            reestimate(workspace, exam.public, exam.public_rows, every_norm=True)
            found[f"{name}+statistics"] = correct_share(model, exam.images, exam.wrong_rows, device)
    return found


def _outsider(thief: Mapping[str, float]) -> float:
    return max(value for guess, value in thief.items() if not guess.startswith(INSIDE))


def combine(found: Iterable[ClientAccuracy]) -> Accuracy:
    """Means over clients; the thief takes its best variant per client."""
    clients = list(found)
    own = [c.own for c in clients]
    wrong = sorted(value for c in clients for value in c.wrong)
    other = [c.other for c in clients if c.other is not None]
    thieves = [max(c.thief.values()) if c.thief else c.own for c in clients]
    outsiders = [_outsider(c.thief) if c.thief else c.own for c in clients]
    names = dict.fromkeys(name for c in clients for name in c.thief)  # not all have others
    return Accuracy(
        own_key=statistics.fmean(own),
        wrong_key=statistics.fmean(wrong) if wrong else None,
        wrong_key_p95=float(torch.tensor(wrong).quantile(0.95)) if wrong else None,
        other_client=statistics.fmean(other) if other else None,
        outsider=statistics.fmean(outsiders),
        no_lock=statistics.fmean(thieves),
        own_per_client=tuple(own),
        no_lock_per_client=tuple(thieves),
        wrong_keys=tuple(wrong),
        guess=statistics.fmean(c.guess for c in clients),
        thief={n: statistics.fmean([c.thief[n] for c in clients if n in c.thief]) for n in names},
    )
