"""A round of training under Flower's SecAgg+ (Bell et al. 2020): the server sees sums only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from torch import Tensor

from fedkl.flower.wire import packed, split


@dataclass(frozen=True)
class Summed:
    """What a round under secure aggregation tells the server.

    Attributes:
        mean: Weighted mean of the clients' states, recovered from the sum.
        facts: Of each node that answered: its weight as ``examples``, and what it said of itself.
    """

    mean: Mapping[str, Tensor]
    facts: Mapping[int, Mapping[str, Any]]


def secure_round(
    grid: Grid,
    round_: int,
    shared: Mapping[str, Tensor],
    nodes: Mapping[int, int],
    config: Mapping[str, Any],
    *,
    clipping_range: float,
    timeout: float,
) -> Summed | None:
    """Trains one round; None when too few clients are left for their masks to cancel.

    Args:
        grid: Flower's grid.
        round_: Number of the round.
        shared: Global state.
        nodes: Node id -> weight: the number of examples, or 1 for all.
        config: Goes to the clients along with the state.
        clipping_range: Largest change of a weight.
        timeout: Seconds per stage; there are four.
    """
    strategy = _OneRound(shared, nodes, {**config, "clipping-range": clipping_range})
    empty = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    context = LegacyContext(empty, strategy=strategy, client_manager=_Count(len(nodes)))
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: round_})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    # All clients hold a share of every secret; two thirds of them recover a lost one.
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=0.67,
        max_weight=float(max(nodes.values())),
        clipping_range=clipping_range,
        timeout=timeout,
    )
    workflow(grid, context)
    if strategy.change is None:
        return None
    vector = packed(shared).double() + strategy.change
    return Summed(split(vector, shared), strategy.facts)


@dataclass
class _Node:
    """As much of a client proxy as the workflow looks at."""

    node_id: int


@dataclass
class _Count:
    """As much of a client manager as the workflow looks at."""

    count: int

    def num_available(self) -> int:
        return self.count


@dataclass
class _OneRound:
    """As much of a legacy strategy as the workflow looks at."""

    shared: Mapping[str, Tensor]
    nodes: Mapping[int, int]
    config: Mapping[str, Any]
    change: Tensor | None = None
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)

    def configure_fit(self, round_: int, parameters: object, manager: object) -> list[Any]:
        start = ndarrays_to_parameters([packed(self.shared).numpy()])
        return [(_Node(node), FitIns(start, dict(self.config))) for node in self.nodes]

    def aggregate_fit(
        self, round_: int, results: list[Any], failures: object
    ) -> tuple[None, dict[str, Any]]:
        for node, result in results:
            self.facts[node.node_id] = {**result.metrics, "examples": result.num_examples}
            (total,) = parameters_to_ndarrays(result.parameters)  # the same for all
            self.change = torch.from_numpy(total)
        return None, {}
