"""How long one pad serves: presentations counted against a budget, and renewal by the calendar.

A presentation is one image passing through one training step whose outcome is shared. All of them
under one pad share its β, so what a pad hides wears off with their number. A client whose private
state has diverged shares nothing of that round, which then counts for nothing: it goes back to the
state, pad and count of before. An update that leaves counts, whether the server takes it or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedkl.errors import FederationError, number_of
from fedkl.federation.config import BUDGET, RenewalConfig, TrainingConfig
from fedkl.federation.price import price

_FEWER: Final = (
    "fewer images a round (--batch-size times --local-steps; of fedsgd --batch-size alone)"
)


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a run uses pads, for what is said of their price and of what helps.

    Attributes:
        together: All clients have one pad; presentations count for all of them.
        at_length: Every update is sent at one length.
    """

    together: bool = False
    at_length: bool = False

    @property
    def counted(self) -> str:
        """What is multiplied to count presentations."""
        one = "images × steps"
        return f"{one}, times clients, who have one key" if self.together else one

    @property
    def fewer(self) -> str:
        """How to send fewer of them."""
        return f"{_FEWER}, fewer clients, or keys of their own" if self.together else _FEWER

    @property
    def renewing(self) -> str:
        """The option that would renew the pad."""
        return "--renew-every" if self.together else "--on-spent renew"

    def price(self, presentations: int) -> str:
        """As :func:`fedkl.federation.price.price`, which was measured on clients' own keys."""
        found = price(presentations, at_length=self.at_length)
        more = " Keys were the clients' own; under one key for all it found up to a quarter more."
        return found + more if self.together else found


USUAL: Final = Use()


@dataclass(frozen=True)
class Verdict:
    """What a client does with its pad before a round.

    Attributes:
        renew: Whether it draws the next pad first.
        note: Something the user should know, or "".
    """

    renew: bool
    note: str = ""


def presentations(training: TrainingConfig, method: str, examples: int) -> int:
    """Presentations of one round of a client with ``examples`` images, at most."""
    batch = min(training.batch_size, examples)
    if method == "fedsgd":
        return batch
    if training.local_steps is not None:
        return training.local_steps * batch
    return training.local_epochs * examples


def due(config: RenewalConfig, client: int, clients: int, round_: int, last: int) -> bool:
    """Whether the calendar asks for a renewal between the rounds ``last`` and ``round_``.

    Every client renews before the rounds 1 + every, 1 + 2·every, …; staggered, client c of n does
    so ⌊c·every/n⌋ rounds later. One that was absent then renews when it is back.
    """
    if not config.every or not last:
        return False
    later = client * config.every // clients if config.stagger else 0
    return (round_ - 1 - later) // config.every > max(0, (last - 1 - later) // config.every)


def epoch_at(config: RenewalConfig, round_: int) -> int:
    """Number of the pad that all clients have in round ``round_`` if they have one key."""
    return max(0, round_ - 1) // config.every if config.every else 0


def judge(
    config: RenewalConfig,
    *,
    client: int,
    clients: int,
    round_: int,
    last: int,
    spent: int,
    ahead: int,
    use: Use = USUAL,
) -> Verdict:
    """Whether a client renews its pad before round ``round_``.

    Args:
        config: The settings.
        client, clients: Its number, and how many there are.
        round_, last: This round, and the last one it took part in (0: none).
        spent: Presentations so far under its pad.
        ahead: Presentations of this round.
        use: How the run uses pads.

    Raises:
        FederationError: The budget does not cover this round, and ``on_spent`` is ``error``.
    """
    budget = config.budget
    # Before the calendar: a fresh pad does not cover such a round either.
    if budget is not None and config.on_spent == "error" and ahead > budget:
        raise FederationError(
            f"round {round_}: this round alone takes {ahead} presentations ({use.counted}) "
            f"under one pad of client {client}, over its budget of {budget}. Send "
            f"{use.fewer}, or {_accept(ahead)} {use.price(ahead)}"
        )
    if due(config, client, clients, round_, last):
        return Verdict(renew=True)
    if budget is None or spent + ahead <= budget:
        return Verdict(renew=False)
    if config.on_spent == "error":
        raise FederationError(
            f"round {round_}: the pad of client {client} has served "
            f"{number_of(spent, 'presentation')} and this round takes {ahead} more, over its "
            f"budget of {budget}. Renew pads ({use.renewing}), or "
            f"{_accept(spent + ahead)} {use.price(spent + ahead)}"
        )
    if config.on_spent == "renew":
        return Verdict(renew=spent > 0)
    # A round that is over the budget by itself is said once, before the first: see excess().
    if spent > budget or ahead > budget:
        return Verdict(renew=False)
    return Verdict(
        renew=False,
        note=f"round {round_}: the pad of client {client} is spent ({spent + ahead} presentations, "
        f"budget {budget}); {use.renewing} would draw another. {use.price(spent + ahead)}",
    )


def foresee(config: RenewalConfig, ahead: Sequence[int], rounds: int, use: Use = USUAL) -> None:
    """Plays the budgets through: raises now what :func:`judge` would raise in a later round.

    Args:
        config: The settings.
        ahead: Presentations of one round, by client.
        rounds: Rounds that every client takes part in, from the first on.
        use: How the run uses pads.

    Raises:
        FederationError: As :func:`judge`; names the first round that the budget does not cover.
    """
    if config.budget is None or config.on_spent != "error":
        return
    spent = [0] * len(ahead)
    for round_ in range(1, rounds + 1):
        for client, count in enumerate(ahead):
            facts = {"client": client, "clients": len(ahead), "round_": round_, "last": round_ - 1}
            verdict = judge(config, spent=spent[client], ahead=count, use=use, **facts)
            spent[client] = count + (0 if verdict.renew else spent[client])


def raised(config: RenewalConfig, use: Use = USUAL) -> str:
    """What a budget above the default costs, else ""; one that does not count has no number."""
    if config.budget is None or config.budget <= BUDGET:
        return ""
    return (
        f"the budget of {config.budget} presentations ({use.counted}) under one pad is above the "
        f"default of {BUDGET}. {use.price(config.budget)}"
    )


def excess(config: RenewalConfig, ahead: int, use: Use = USUAL) -> str:
    """A warning where one round is over the budget by itself, else ""."""
    if config.budget is None or ahead <= config.budget:
        return ""
    times = math.ceil(ahead / config.budget)
    renewing = config.every == 1 or config.on_spent == "renew"
    renew = "" if renewing else ", and a new pad every round (--renew-every 1), lest rounds add up"
    return (
        f"this run is beyond what a pad hides: a round shows up to {ahead} "
        f"presentations ({use.counted}) under one pad, {times} times its budget of "
        f"{config.budget}. {use.price(ahead)} That was one image at a time; how much updates of "
        "many give away is not known, so do not count on the pad to hide the images. What helps: "
        f"{use.fewer}{renew}. Otherwise {_accept(ahead)}"
    )


def withheld(client: int, round_: int) -> str:
    """Why a client whose training diverged sends nothing."""
    return (
        f"client {client}: training diverged in round {round_} (NaN or infinity in the private "
        "state), expected finite numbers; nothing was sent, for a lock that cannot be kept can be "
        "neither counted nor handed on. Lower the learning rate."
    )


def _accept(presentations: int) -> str:
    return f"accept that (--budget {presentations})."
