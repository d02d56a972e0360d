"""Flower's strategies by name, and how one of them takes the place of FedKL's aggregate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AppExitException
from torch import Tensor

from fedkl.errors import ConfigError, FederationError, number_of
from fedkl.federation import Update
from fedkl.flower.moments import Moments
from fedkl.flower.wire import ARRAYS, CONFIG, EXAMPLES, METRICS, packed_record, unpacked

Strategy = Any  # flwr.serverapp.strategy.Strategy; flwr need not be installed to check types

STRATEGIES: Final[Mapping[str, Callable[..., Strategy] | None]] = {
    "fedkl": None,
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedadagrad": flower.FedAdagrad,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedprox": flower.FedProx,
    "fedmedian": flower.FedMedian,
    "trimmed-mean": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multi-krum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
}


def make_strategy(name: str, options: Iterable[tuple[str, Any]]) -> Strategy | None:
    """The strategy of that name, None for FedKL's own aggregate.

    Sampling is FedKL's: a strategy gets the round's clients and takes all of them.

    Raises:
        ConfigError: An option that the strategy does not have, or a value out of its range.
    """
    make = STRATEGIES[name]
    given = dict(options)
    if make is None:
        if given:
            raise ConfigError(f"strategy 'fedkl' has no options, got {', '.join(given)}.")
        return None
    fixed = {"arrayrecord_key": ARRAYS, "configrecord_key": CONFIG, "weighted_by_key": EXAMPLES}
    nodes = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
    try:
        return make(**{**fixed, **nodes, **given})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name!r} with {given}: {error}") from error


class Combiner:
    """Lets a strategy of Flower combine the updates of the in-process engine's rounds.

    Args:
        strategy: Any Message-API strategy, DP wrappers included. It sees one vector per client:
            all floating-point tensors of the shared state end to end. Counters and 0-d tensors,
            which most strategies mishandle, stay what they were or are inside the vector.
        folder: The run's, where the strategy's momentum is kept from round to round.
        equal: Let every client count the same: the noise of central differential privacy is
            computed for that.
    """

    def __init__(self, strategy: Strategy, folder: Path, *, equal: bool = False) -> None:
        self.strategy = strategy
        self.moments = Moments(strategy, folder)
        self.equal = equal
        self._shared: Mapping[str, Tensor] = {}
        self._replies: dict[int, Message] = {}

    def configure(self, round_: int, shared: Mapping[str, Tensor], nodes: list[int]) -> Any:
        """The strategy's own entries of the config record for the clients of this round."""
        self._shared, self._replies = shared, {}
        self.moments.restore(round_ - 1)
        config = ConfigRecord()
        asked = list(
            self.strategy.configure_train(round_, packed_record(shared), config, _Nodes(nodes))
        )
        if {m.metadata.dst_node_id for m in asked} != set(nodes):
            raise FederationError(
                f"{type(self.strategy).__name__} asked {len(asked)} of "
                f"{number_of(len(nodes), 'client')}; leave its fraction_train at 1.0 and sample "
                "with federation.fraction."
            )
        return asked[0].content[CONFIG]

    def received(self, client: int, reply: Message) -> None:
        """Notes a client's reply until the engine has checked it."""
        self._replies[client] = reply

    def __call__(self, updates: Iterable[Update], weighted: bool) -> dict[str, Tensor]:
        """The new global state from the accepted updates.

        Raises:
            FederationError: The strategy gave none.
        """
        accepted = list(updates)
        replies = [self._replies[update.client] for update in accepted]
        for reply in replies if self.equal or not weighted else ():
            reply.content[METRICS][EXAMPLES] = 1
        arrays: ArrayRecord | None
        try:
            arrays, _ = self.strategy.aggregate_train(accepted[0].round, replies)
        except (ArithmeticError, ValueError, TypeError, AppExitException) as error:
            raise FederationError(
                f"{type(self.strategy).__name__} failed on {number_of(len(accepted), 'update')} of "
                f"round {accepted[0].round} ({type(error).__name__}: {error}); check its options."
            ) from error
        self._replies = {}
        if arrays is None:
            raise FederationError(
                f"{type(self.strategy).__name__} gave no new state for round {accepted[0].round} "
                f"from {number_of(len(accepted), 'update')}; it may need more clients."
            )
        self.moments.save(accepted[0].round)
        return unpacked(arrays, self._shared, exact=False)


class _Nodes:
    """As much of a grid as a strategy needs to choose clients."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes
        self._asked = 0

    def get_node_ids(self) -> list[int]:
        """The clients of this round. A strategy that waits for more would wait forever."""
        self._asked += 1
        if self._asked > 5:
            raise FederationError(
                f"the strategy waits for more than the {number_of(len(self._nodes), 'client')} of "
                "this round; lower its min_available_nodes and min_train_nodes."
            )
        return list(self._nodes)
