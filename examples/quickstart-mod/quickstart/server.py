"""The server: FedAvg on what clients share. It has no key and needs none."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkl import Key, lock, shared_state
from quickstart.task import EXAMPLE, Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federated averaging, as in any Flower app."""
    # Any key will do: what is shared does not depend on it.
    start = shared_state(lock(Net(), Key.generate(), example=EXAMPLE))
    FedAvg().start(grid, ArrayRecord(dict(start)), num_rounds=int(context.run_config["rounds"]))
