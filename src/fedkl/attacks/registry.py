"""The attacks by name, at three efforts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from fedkl.attacks.adaptive.replay import Replay
from fedkl.attacks.adaptive.replay_relations import ReplayRelations
from fedkl.attacks.adaptive.retrieval import Retrieval
from fedkl.attacks.adaptive.shadow import Shadow
from fedkl.attacks.base import Attack
from fedkl.attacks.closed_form import ClosedForm
from fedkl.attacks.evolution import check_cma
from fedkl.attacks.ggl import GGL
from fedkl.attacks.grnn import GRNN
from fedkl.attacks.matching import GradientMatching
from fedkl.attacks.peel import Peel
from fedkl.attacks.pixels import DLG, IDLG, InvertingGradients
from fedkl.errors import AttackError, ConfigError, unknown
from fedkl.observation import Observation

EFFORTS: Final = ("quick", "standard", "paper")


@dataclass(frozen=True)
class Resources:
    """What an attack may need besides observations.

    Attributes:
        generator_model: For ``ggl``: see :mod:`fedkl.attacks.generators`.
        public: For ``shadow``, ``retrieval`` and ``replay``: public images (M, C, H, W) in [0, 1]
            and their labels (M,).
        honest: For the same where the victims' weights were crafted: an observation of the model
            with honest ones.
    """

    generator_model: nn.Module | None = None
    public: tuple[Tensor, Tensor] | None = None
    honest: Observation | None = None

    def shadow(self, count: int, kind: type[Shadow] = Shadow, **settings: Any) -> Shadow:
        """An attacker of that kind with the first ``count`` public images.

        Raises:
            AttackError: There are no public images.
        """
        if self.public is None:
            raise AttackError(
                f"the attack {kind.name!r} needs public images to train on, got none; pass public: "
                "images and labels of the victim's kind."
            )
        images, labels = self.public
        return kind(images[:count], labels[:count], honest=self.honest, **settings)

    def image_generator(self) -> nn.Module:
        """The generator.

        Raises:
            AttackError: There is none.
        """
        if self.generator_model is None:
            raise AttackError(
                "the attack 'ggl' needs an image generator, got none; pass generator_model: train "
                "one on public images (fedkl.attacks.train_generator) or pass your own."
            )
        return self.generator_model


def _shadow(**settings: Any) -> Mapping[str, Callable[[Resources], Attack]]:
    return {
        "quick": lambda given: given.shadow(
            2_000, secret_epochs=8, candidates=4, epochs=8, **settings
        ),
        "standard": lambda given: given.shadow(
            6_000, secret_epochs=6, candidates=6, epochs=15, **settings
        ),
        "paper": lambda given: given.shadow(
            10_000, secret_epochs=10, candidates=12, epochs=30, shadows=2, **settings
        ),
    }


def _retrieval(**settings: Any) -> Mapping[str, Callable[[Resources], Attack]]:
    return {
        "quick": lambda given: given.shadow(
            2_000, Retrieval, secret_epochs=8, candidates=2, epochs=20, **settings
        ),
        "standard": lambda given: given.shadow(
            4_000, Retrieval, secret_epochs=8, candidates=4, epochs=30, **settings
        ),
        "paper": lambda given: given.shadow(
            10_000, Retrieval, secret_epochs=10, candidates=8, epochs=40, shadows=2, **settings
        ),
    }


def _replay(**settings: Any) -> Mapping[str, Callable[[Resources], Attack]]:
    return {
        "quick": lambda given: given.shadow(2_000, Replay, candidates=2, **settings),
        "standard": lambda given: given.shadow(4_000, Replay, shadows=2, candidates=2, **settings),
        "paper": lambda given: given.shadow(
            10_000, Replay, secret_epochs=10, candidates=4, shadows=4, **settings
        ),
    }


# Evaluations and restarts per effort; "paper" is the published budget.
ATTACKS: Final[Mapping[str, Mapping[str, Callable[[Resources], Attack]]]] = {
    "dlg": {
        "quick": lambda _: DLG(iterations=600, restarts=2),
        "standard": lambda _: DLG(iterations=1000, restarts=4),
        "paper": lambda _: DLG(iterations=6000, restarts=4),
    },
    "idlg": {
        "quick": lambda _: IDLG(iterations=600, restarts=2),
        "standard": lambda _: IDLG(iterations=1000, restarts=4),
        "paper": lambda _: IDLG(iterations=6000, restarts=4),
    },
    "inverting-gradients": {
        # Plain Adam finds more than signed steps do at every budget we tried.
        "quick": lambda _: InvertingGradients(iterations=300, signed=False),
        "standard": lambda _: InvertingGradients(iterations=1500, signed=False),
        "paper": lambda _: InvertingGradients(iterations=4800, restarts=2),
    },
    "grnn": {
        "quick": lambda _: GRNN(iterations=300),
        "standard": lambda _: GRNN(iterations=2000),
        "paper": lambda _: GRNN(iterations=20000),
    },
    "ggl": {
        "quick": lambda given: GGL(given.image_generator(), iterations=150),
        "standard": lambda given: GGL(given.image_generator(), iterations=200, restarts=4),
        # As published: no gradient of the generator, squared distance.
        "paper": lambda given: GGL(
            given.image_generator(), iterations=1000, search="cma-es", distance="squared"
        ),
    },
    # Solved, not searched: no effort makes it better.
    "closed-form": dict.fromkeys(EFFORTS, lambda _: ClosedForm()),
    "peel": {
        "quick": lambda _: Peel(coarse=12, fine=8),
        "standard": lambda _: Peel(),
        "paper": lambda _: Peel(coarse=32, fine=32),
    },
    "shadow": _shadow(),
    "shadow-global": _shadow(restandardize="global"),
    "shadow-label": _shadow(restandardize="label"),
    "shadow-gradient": _shadow(variant="gradient"),
    "retrieval": _retrieval(),
    "retrieval-label": _retrieval(restandardize="label"),
    "retrieval-transport": _retrieval(restandardize="transport"),
    "replay": _replay(),
    "replay-matched": _replay(restandardize="matched"),
    "replay-relations": {
        "quick": lambda given: given.shadow(2_000, ReplayRelations, shadows=2),
        "standard": lambda given: given.shadow(4_000, ReplayRelations),
        "paper": lambda given: given.shadow(10_000, ReplayRelations, shadows=8, secret_epochs=10),
    },
}

RECOGNIZING: Final = tuple(n for n in ATTACKS if n.startswith(("retrieval", "replay")))
"""Attacks that pick among images; as pictures they show public ones."""
NEED_PUBLIC: Final = ("ggl", *(n for n in ATTACKS if n.startswith("shadow")), *RECOGNIZING)
"""Attacks that learn from public images first."""
SEARCHING: Final = ("dlg", "idlg", "inverting-gradients", "grnn", "ggl")
"""Attacks that go through iterations; all others solve or learn."""
NEED_MANY: Final = (
    "shadow-global", "shadow-label", "retrieval-label", "retrieval-transport", "replay-matched",
)  # fmt: skip
"""Attacks that compare many updates under one lock, 20 or more."""
NEED_CMA: Final = {"ggl": ("paper",)}
"""Attacks that search by CMA-ES, and the efforts at which they do."""


def check_installed(names: Iterable[str], effort: str) -> None:
    """That the optional packages of the attacks ``names`` at ``effort`` are there.

    To be asked before hours of training: the attacks themselves ask when they search.

    Raises:
        ConfigError: One is missing, with the command that installs it.
    """
    for name in names:
        if effort in NEED_CMA.get(name, ()):
            try:
                check_cma()
            except ConfigError as error:
                raise ConfigError(
                    f"the attack {name!r} at effort {effort!r} cannot be mounted: {error} Efforts "
                    f"that do: {', '.join(e for e in EFFORTS if e not in NEED_CMA[name])}."
                ) from error


def make_attack(
    name: str,
    effort: str = "standard",
    *,
    generator_model: nn.Module | None = None,
    public: tuple[Tensor, Tensor] | None = None,
    honest: Observation | None = None,
    iterations: int | None = None,
    parallel: int | None = None,
) -> Attack:
    """The attack called ``name`` with the settings of ``effort``.

    Args:
        name: One of :data:`ATTACKS`.
        effort: One of :data:`EFFORTS`.
        generator_model: The image generator that ``ggl`` searches; others ignore it.
        public: Public images (M, C, H, W) and labels (M,) that ``shadow`` trains on.
        honest: Where it trains secrets if the victims' weights were crafted.
        iterations: In place of those of the effort; for attacks that search.
        parallel: Trials that run as one batch, in place of the attack's own number, for memory; for
            attacks that search.

    Raises:
        ConfigError: Unknown name or effort, with the nearest names.
        AttackError: The attack needs a generator or public images and got none.
    """
    if name not in ATTACKS:
        raise ConfigError(unknown("attack", name, ATTACKS))
    if effort not in EFFORTS:
        raise ConfigError(unknown("effort", effort, EFFORTS))
    attack = ATTACKS[name][effort](Resources(generator_model, public, honest))
    if isinstance(attack, GradientMatching):
        return attack.budgeted(iterations=iterations, parallel=parallel)
    return attack
