"""What a client may wrap around its update by config: Flower's DP mods and SecAgg+."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat as compat

from fedkl.errors import UpdateError
from fedkl.flower.settings import FlowerConfig
from fedkl.flower.wire import ARRAYS, CONFIG, EXAMPLES, METRICS, VECTOR

Next = Callable[[Message, Context], Message]


def layers(
    flower: FlowerConfig, message: Message, context: Context, call_next: Next, *, weighted: bool
) -> Message:
    """Runs ``call_next`` inside the layers that ``flower`` asks for; SecAgg+ is the outermost.

    ``weighted``: under SecAgg+ updates are weighted by their number of examples, else equally.
    """
    inner = call_next
    if flower.dp == "local":
        noise = LocalDpMod(flower.clip, flower.clip, flower.epsilon, flower.delta)
        inner = _guarded(lambda m, c: noise(m, c, call_next))
    elif flower.dp == "client":
        inner = _guarded(lambda m, c: fixedclipping_mod(m, c, call_next))
    if not flower.secagg:
        return inner(message, context)
    return secaggplus_mod(message, context, lambda m, c: _legacy(m, c, inner, weighted))


def _guarded(layer: Next) -> Next:
    """Flower divides by the norm of the change without looking whether it is zero."""

    def call(message: Message, context: Context) -> Message:
        try:
            return layer(message, context)
        except ZeroDivisionError as error:
            raise UpdateError(
                "the update changes nothing, so Flower cannot clip it; raise the learning rate, or "
                "leave this client out."
            ) from error

    return call


def _legacy(message: Message, context: Context, call_next: Next, weighted: bool) -> Message:
    """SecAgg+ still speaks Flower's records of before the Message API; translated here.

    The reply carries the change of the global state: its range is small, and so is the error of
    SecAgg+'s quantization.
    """
    content = message.content
    arrays = content.array_records["fitins.parameters"]
    (bare,) = arrays.values()
    vector = Array(bare.numpy())  # the old records do not say what they hold
    config = ConfigRecord(dict(content.config_records["fitins.config"]))
    inside = Message(
        RecordDict({ARRAYS: ArrayRecord({VECTOR: vector}), CONFIG: config}), reply_to=message
    )
    inside.metadata.__dict__.update(message.metadata.__dict__)
    reply = call_next(inside, context)
    if reply.has_error():
        raise UpdateError(str(reply.error.reason))
    (after,) = reply.content[ARRAYS].to_numpy_ndarrays()
    change = np.asarray(after, np.float64) - np.asarray(vector.numpy(), np.float64)
    _check_range(change, float(config["clipping-range"]))
    facts: dict[str, Any] = dict(reply.content[CONFIG].items())
    result = FitRes(
        Status(Code.OK, ""),
        ndarrays_to_parameters([change]),
        int(reply.content[METRICS][EXAMPLES]) if weighted else 1,
        facts,
    )
    return Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)


def _check_range(change: Any, most: float) -> None:
    """The server cannot check an update that it never sees, so its client does."""
    if not bool(torch.isfinite(torch.from_numpy(change)).all()):
        raise UpdateError("the update holds NaN or infinity; lower the learning rate.")
    largest = float(np.abs(change).max(initial=0.0))
    if largest > most:
        raise UpdateError(
            f"a weight changed by {largest:.3g}, more than the clipping range {most:g} of secure "
            "aggregation, which would cut it; raise flower.clipping_range or lower the rate."
        )
