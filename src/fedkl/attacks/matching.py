"""Gradient matching: one loop for every attack that searches images whose gradient is the observed.

An attack of this family says what is searched (pixels, a generator's weights, a latent), how two
gradients are compared and how it steps; adaptive attacks add the victim's secrets to the unknowns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from fedkl.attacks.arrangements import arrangements
from fedkl.attacks.base import Attack, Progress, Reconstruction, each
from fedkl.attacks.distances import DISTANCES, check_size
from fedkl.attacks.labels import infer_labels, tells_labels
from fedkl.attacks.network import Network, Tensors
from fedkl.attacks.record import Record, refuse_lost, tell
from fedkl.attacks.search import Job, Search, Trial, Trials
from fedkl.attacks.secrets import Held, Secrets
from fedkl.attacks.statistics import misfit
from fedkl.errors import AttackError, ConfigError, unknown
from fedkl.observation import Observation

LABEL_RULES = ("infer", "search")
HEARD: Final = 0.2
"""Weight of batch statistics, where they were sent, beside the gradient."""

Objective = Callable[[dict[str, Tensor], Tensor], tuple[dict[str, Tensor], Tensor]]


class GradientMatching(Attack):
    """The loop. Subclasses give the unknowns, the prior and the step.

    Args:
        iterations: Evaluations of the loss per trial.
        restarts: Trials per observation; the one with the least loss is chosen.
        distance: A name in :data:`fedkl.attacks.distances.DISTANCES`.
        labels: ``infer`` from the classifier's gradient (or take those granted), or ``search``
            them along with the image, as soft labels (DLG).
        parallel: Trials that run as one batch, for memory.
        settings: What the subclass adds, for ``repr``.
    """

    name: ClassVar[str]
    adopts: ClassVar[bool] = False
    """Whether it can start from given images (:meth:`adopt`)."""

    def __init__(
        self,
        *,
        iterations: int,
        restarts: int,
        distance: str,
        labels: str,
        parallel: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(
            iterations=iterations,
            restarts=restarts,
            distance=distance,
            labels=labels,
            parallel=parallel,
            **settings,
        )
        _check_budget(iterations, restarts, parallel)
        if distance not in DISTANCES:
            raise ConfigError(unknown("distance of gradients", distance, DISTANCES))
        if labels not in LABEL_RULES:
            raise ConfigError(unknown("label rule", labels, LABEL_RULES))
        self.iterations, self.restarts, self.parallel = iterations, restarts, parallel
        self.distance, self.labels = DISTANCES[distance], labels

    def budgeted(self, *, iterations: int | None = None, parallel: int | None = None) -> Self:
        """This attack with other iterations, or another number of trials that run as one batch.

        Raises:
            ConfigError: A number below 1.
        """
        twin = copy(self)
        twin.iterations = self.iterations if iterations is None else iterations
        twin.parallel = self.parallel if parallel is None else parallel
        _check_budget(twin.iterations, twin.restarts, twin.parallel)
        twin.settings = self.settings | {"iterations": twin.iterations, "parallel": twin.parallel}
        return twin

    @property
    def infers(self) -> bool:
        """Whether labels are taken from the classifier's gradient, not searched."""
        return self.labels == "infer"

    @abstractmethod
    def start(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
        """Unknowns of every trial, stacked: each (trials, ...)."""

    @abstractmethod
    def decode(self, unknowns: Tensors, trial: Trial) -> tuple[Tensor, Tensor]:
        """Images (T, images, C, H, W) and label distributions (T, images, classes) of one trial."""

    @abstractmethod
    def search(self, unknowns: dict[str, Tensor]) -> Search:
        """The optimizer of the stacked unknowns."""

    def prior(self, unknowns: Tensors, x: Tensor, iteration: Tensor) -> Tensor:
        """What is added to the distance for one trial: 0 unless overridden."""
        return x.new_zeros(())

    def project(self, unknowns: dict[str, Tensor]) -> None:
        """After every step: puts the unknowns back where they may be (in place)."""

    def adopt(self, unknowns: dict[str, Tensor], row: int, images: Tensor) -> None:
        """Makes trial ``row`` start from ``images`` (T, images, C, H, W), in place.

        Raises:
            AttackError: The unknowns of this attack are no pixels.
        """
        raise AttackError(
            f"{type(self).__name__} does not search pixels, so it cannot start from given images; "
            "leave them out, or use an attack on pixels (dlg, idlg, inverting-gradients)."
        )

    def reconstruct(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator,
        progress: Progress | None = None,
        secrets: Secrets | None = None,
        guesses: Sequence[Tensor] | None = None,
        keep_lost: bool = False,
    ) -> list[Reconstruction]:
        """As :meth:`Attack.reconstruct`.

        Args:
            observations: As there.
            generator: As there.
            progress: As there.
            secrets: What is made of the private tensors; None takes :class:`Held`.
            guesses: Images (T, images, C, H, W) per observation, such as the floor, from which
                one restart more starts.
            keep_lost: Victims whose loss was never finite come back with a loss of inf, for whoever
                has another way to try before giving them up (:func:`refuse_lost`).

        Raises:
            AttackError: As there; also of victims with an update of zeros, or whose loss was never
                finite.
        """
        _alike(observations)
        network = Network.of(observations)
        held = secrets or Held()
        left_out = held.ignored(observations[0], network)
        compared = [name for name in network.names if name not in left_out]
        each(observations, lambda o: check_size(o, compared))
        if self.infers and not tells_labels(observations[0], network):
            found = self._unlabelled(observations, generator, progress, secrets, guesses)
            return found if keep_lost else refuse_lost(found)
        jobs = self._jobs(observations, network, guesses, generator)
        best: dict[int, Reconstruction] = {}
        for at in range(0, len(jobs), self.parallel):
            part = jobs[at : at + self.parallel]
            trials = Trials.of(observations, network, part, held)
            done = (at, len(jobs), progress)
            for job, one in zip(part, self._run(trials, generator, done), strict=True):
                i, notes = job.victim, () if job.note is None else (job.note,)
                if i not in best or not best[i].loss <= one.loss:
                    best[i] = replace(one, notes=(*one.notes, *notes))
        found = [best[i] for i in range(len(observations))]
        return found if keep_lost else refuse_lost(found)

    def _jobs(
        self,
        observations: Sequence[Observation],
        network: Network,
        guesses: Sequence[Tensor] | None,
        generator: torch.Generator,
    ) -> list[Job]:
        """What is tried: every victim, every order of its labels over batches, every restart."""
        if not self.infers:
            labels: list[Tensor | None] = [None] * len(observations)
        else:
            labels = [*each(observations, lambda o: infer_labels(o, network))]
        jobs = []
        for victim, (observation, mine) in enumerate(zip(observations, labels, strict=True)):
            guess = None if guesses is None else guesses[victim]
            if mine is None:
                starts: list[tuple[Tensor | None, Tensor | None]] = [(None, guess)]
            else:
                orders = arrangements(mine, observation, network, generator)
                starts = [(mine.gather(1, o), _in_order(guess, o)) for o in orders]
            whom = "clients" if observation.training.batches == 1 else "steps"
            note = f"labels dealt out to {whom} in {len(starts)} ways; the loss chose"
            for y, x in starts:
                told = note if len(starts) > 1 else None
                images = [*([] if x is None else [x]), *[None] * self.restarts]
                jobs += [Job(victim, y, one, told) for one in images]
        return jobs

    def searching(self) -> GradientMatching:
        """This attack with the labels among its unknowns.

        Raises:
            AttackError: It needs them before.
        """
        raise AttackError(
            f"{self.name} needs labels, and nothing that is shared gives them away; grant the "
            "labels in the threat model, or use an attack that searches them (dlg, grnn)."
        )

    def _unlabelled(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator,
        progress: Progress | None,
        secrets: Secrets | None,
        guesses: Sequence[Tensor] | None,
    ) -> list[Reconstruction]:
        """Where the classifier is private: labels are searched along with the images."""
        found = self.searching().reconstruct(
            observations,
            generator=generator,
            progress=progress,
            secrets=secrets,
            guesses=guesses,
            keep_lost=True,
        )
        note = "labels were searched along with the image: nothing that is shared tells them"
        return [replace(one, notes=(*one.notes, note)) for one in found]

    def _run(
        self,
        trials: Trials,
        generator: torch.Generator,
        done: tuple[int, int, Progress | None],
    ) -> list[Reconstruction]:
        unknowns = self._begin(trials, generator)
        for row, images in trials.guesses.items():
            self.adopt(unknowns, row, images)
        search = self.search(unknowns)
        evaluate = self._objective(trials)
        record = Record(self.decode, self.iterations, trials)
        for iteration in range(self.iterations):
            now = torch.full((trials.count,), iteration / self.iterations)
            gradients, loss = evaluate(unknowns, now)
            lost = ~_finite(loss, gradients)
            if bool(lost.any()):
                record.restarts += lost.long()
                loss = torch.where(lost, torch.inf, loss)
            record.see(iteration, unknowns, loss)
            if bool(lost.any()):
                fresh = self._begin(trials, generator)
                search.restart(lost, gradients, fresh)
            search.step(gradients, iteration / self.iterations)
            self.project(unknowns)
            if done[2] is not None and (iteration % 10 == 9 or iteration == self.iterations - 1):
                tell(done, trials.count, iteration + 1, self.iterations, record)
        return record.conclude()

    def _begin(self, trials: Trials, generator: torch.Generator) -> dict[str, Tensor]:
        unknowns = self.start(trials, generator)
        unknowns |= trials.secrets.start(trials.observations, trials.rows, generator)
        return unknowns

    def _loss(self, trials: Trials) -> Callable[[Tensors, Trial, Tensor], Tensor]:
        """The loss of one trial at one iteration, as a function of its unknowns."""
        network, secrets = trials.network, trials.secrets
        ignored = secrets.ignored(trials.observations[0], network)

        def loss(values: Tensors, trial: Trial, iteration: Tensor) -> Tensor:
            x, y = self.decode(values, trial)
            hidden = secrets.values(values, trial.secrets, network)
            distance = x.new_zeros(())
            for t in range(x.shape[0]):
                made, heard = network.sent(hidden, x[t], y[t])
                pairs = [(made[n], trial.changes[n][t]) for n in made if n not in ignored]
                distance = distance + self.distance(pairs)
                if heard:
                    told = {n: seen[t] for n, seen in trial.statistics.items()}
                    # In units of what the distance is where nothing matches at all.
                    unit = self.distance([(torch.zeros_like(seen), seen) for _, seen in pairs])
                    distance = distance + HEARD * unit * misfit(heard, told)
            distance = distance / x.shape[0]
            return distance + self.prior(values, x, iteration) + secrets.prior(values)

        return loss

    def _objective(self, trials: Trials) -> Objective:
        if trials.count == 1:
            return self._single(trials)
        every = vmap(self._loss(trials))

        def evaluate(
            values: dict[str, Tensor], iteration: Tensor
        ) -> tuple[dict[str, Tensor], Tensor]:
            leaves = {n: value.detach().requires_grad_() for n, value in values.items()}
            with trials.network.running(trials.count):
                losses = every(leaves, trials.stacked, iteration)
            # Trials do not meet: the derivative of their sum holds that of each.
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
            return dict(zip(leaves, found, strict=True)), losses.detach()

        return evaluate

    def _single(self, trials: Trials) -> Objective:
        """What :meth:`_objective` gives, for one trial and without what a batch costs."""
        one_trial, trial = self._loss(trials), tree_map(lambda value: value[0], trials.stacked)

        def evaluate(
            values: dict[str, Tensor], iteration: Tensor
        ) -> tuple[dict[str, Tensor], Tensor]:
            leaves = {n: value[0].detach().requires_grad_() for n, value in values.items()}
            with trials.network.running(1):
                loss = one_trial(leaves, trial, iteration[0])
                found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            rows = zip(leaves, found, strict=True)
            return {name: gradient[None] for name, gradient in rows}, loss.detach()[None]

        return evaluate


def _check_budget(iterations: int, restarts: int, parallel: int) -> None:
    if min(iterations, restarts, parallel) < 1:
        raise ConfigError(
            f"got iterations {iterations}, restarts {restarts}, parallel {parallel}; expected 1 or "
            "more of each."
        )


def _alike(observations: Sequence[Observation]) -> None:
    if not observations:
        raise AttackError("got no observation; expected one or more.")
    first = observations[0]
    for other in observations[1:]:
        same = (first.kind, first.training, first.count, first.secrets, first.threat)
        if other.model is not first.model or same != (
            other.kind, other.training, other.count, other.secrets, other.threat
        ):  # fmt: skip
            raise AttackError(
                "observations that run as one batch must share model, training, number of updates "
                "and threat model; attack the others in a call of their own."
            )
        if [set(sent) for sent in other.statistics] != [set(sent) for sent in first.statistics]:
            raise AttackError(
                "some of the observations bring batch-norm statistics that others do not; attack "
                "them in calls of their own, or leave statistics out of all."
            )


def _in_order(images: Tensor | None, order: Tensor) -> Tensor | None:
    """Images (T, images, C, H, W) in an order (T, images)."""
    if images is None:
        return None
    return torch.stack([x[places] for x, places in zip(images, order, strict=True)])


def _finite(loss: Tensor, gradients: Tensors) -> Tensor:
    fine = torch.isfinite(loss)
    for value in gradients.values():
        fine = fine & torch.isfinite(value).flatten(1).all(dim=1)
    return fine
