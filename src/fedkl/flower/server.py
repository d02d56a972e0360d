"""``server_app``: the in-process engine as a Flower ServerApp."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fedkl.federation import Event, RunConfig, RunResult
from fedkl.federation.engine import run_on
from fedkl.flower.node import LoadData, make_session
from fedkl.flower.pool import GridPool
from fedkl.flower.settings import FlowerConfig, check_together, settings_from
from fedkl.flower.strategies import Combiner, Strategy, make_strategy

log = logging.getLogger("flwr.fedkl")


def server_app(
    config: RunConfig | None = None,
    flower: FlowerConfig | None = None,
    *,
    strategy: Strategy | None = None,
    data: LoadData | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_result: Callable[[RunResult], None] | None = None,
) -> ServerApp:
    """A ServerApp that runs a FedKL federation, with checkpoints every ``checkpoint_every`` rounds.

    Started again in the same folder, it goes on from there.

    Args:
        config: The run; by default read from the app's run config (:func:`settings_from`).
        flower: What Flower adds; by default from the run config too.
        strategy: A Message-API strategy of Flower, in place of the one that ``flower`` names.
        data: Makes the server's data (public images, and those it evaluates on) from its context;
            default: ``config.data``.
        on_event: Called with every event of the engine; by default they are logged.
        on_result: Called with the finished run.
    """
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        ours, theirs = settings_from(context.run_config)
        run, extra = config or ours, flower or theirs
        check_together(run, extra)
        combiner = _combiner(run, extra, strategy)
        bundle = None if data is None else data(context)
        folder = Path(extra.folder).expanduser().absolute()
        # The server's session draws keys that nobody uses; they go with this folder.
        with TemporaryDirectory() as scratch:
            session = make_session(run, Path(scratch), bundle)
            result = run_on(
                GridPool(grid, session, extra, folder, combiner),
                session,
                folder,
                resume=(folder / "config.json").exists(),
                on_event=on_event or _log,
                combined=combiner,
            )
        _log_result(result)
        if on_result is not None:
            on_result(result)

    app.main()(main)
    return app


def _combiner(run: RunConfig, flower: FlowerConfig, given: Strategy | None) -> Combiner | None:
    name = "fedavg" if flower.strategy == "fedkl" and _central(flower) else flower.strategy
    strategy = given or make_strategy(name, flower.options)
    if strategy is None:
        return None
    if _central(flower):
        wrapper: Any = {
            "client": DifferentialPrivacyClientSideFixedClipping,
            "server": DifferentialPrivacyServerSideFixedClipping,
        }[flower.dp]
        strategy = wrapper(strategy, flower.noise, flower.clip, run.federation.sampled)
    folder = Path(flower.folder).expanduser().absolute()
    return Combiner(strategy, folder, equal=_central(flower))


def _central(flower: FlowerConfig) -> bool:
    return flower.dp in ("client", "server")


def _log(event: Event) -> None:
    if event.kind == "note":
        log.warning("%s", event.message)
    elif event.kind == "round":
        log.info("round %d/%d", event.round, event.rounds)  # clients do not tell their loss
    elif event.kind == "evaluation" and event.accuracy is not None:
        log.info("round %d/%d: %s", event.round, event.rounds, _figures(event.accuracy))


def _figures(accuracy: Any) -> str:
    shown = {
        "own key": accuracy.own_key,
        "wrong key": accuracy.wrong_key,
        "outsider": accuracy.outsider,
    }
    given = (f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
    return f"accuracy {', '.join(given)}"


def _log_result(result: RunResult) -> None:
    log.info(
        "after %d rounds, test: %s", result.config.federation.rounds, _figures(result.accuracy)
    )
