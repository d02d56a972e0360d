"""What clients answer, read with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flwr.app import Message
from torch import Tensor

from fedkl.errors import FedKLError, UpdateError
from fedkl.federation.jobs import Job, Result
from fedkl.flower.settings import PROTOCOL
from fedkl.flower.wire import ARRAYS, CONFIG, EXAMPLES, METRICS, SEALED, decoded, unpacked

# Of flwr.common.constant.ErrorCode: the message or the reply is gone, the node is gone, it crashed.
LOST: Final = frozenset({3, 4, 5, 8})
_MOST: Final = 2**40  # examples; a larger claim is a lie, and would outweigh everybody


def lost(reply: Message | None) -> bool:
    """Whether asking again may help: nothing came, or the client was cut off."""
    return reply is None or (reply.has_error() and reply.error.code in LOST)


def introduction(reply: Message, clients: int) -> Mapping[str, Any]:
    """What a client says of itself: ``client``, ``examples``, ``group``.

    Raises:
        UpdateError: It speaks another protocol, or makes no sense.
    """
    facts = dict(reply.content.config_records.get(CONFIG, {}))
    if facts.get("protocol") != PROTOCOL:
        raise UpdateError(
            f"it speaks version {facts.get('protocol')} of FedKL's protocol, expected {PROTOCOL}; "
            "install the same FedKL on both sides."
        )
    client, examples = facts.get("client"), facts.get("examples")
    if type(client) is not int or not 0 <= client < clients:
        raise UpdateError(f"it claims to be client {client!r} of {clients}.")
    if type(examples) is not int or not 0 < examples < _MOST:
        raise UpdateError(f"it claims {examples!r} examples.")
    return {"client": client, "examples": examples, "group": str(facts.get("group"))}


def result_of(
    reply: Message, job: Job, shared: Mapping[str, Tensor], *, packed: bool, sealed: int = 0
) -> Result:
    """The result of ``job`` that a client's reply holds.

    Args:
        reply: The client's.
        job: What it was asked.
        shared: Global state, for names and shapes.
        packed: Whether tensors travel as one vector.
        sealed: Characters of its sealed private layers; 0: it keeps them.

    Raises:
        UpdateError: The reply is not one, its tensors are not as those of ``shared``, or what it
            sealed is of another size.
    """
    try:
        metrics = dict(reply.content[METRICS].items())
        if job.kind == "examine":
            return Result(job, _accuracy(metrics), {})
        facts = {
            "kind": str(reply.content[CONFIG]["kind"]),
            "examples": _count(metrics[EXAMPLES]),
        }
        facts |= sealed_in(dict(reply.content[CONFIG]), sealed)
        read = unpacked if packed else decoded
        return Result(job, facts, read(reply.content[ARRAYS], shared))
    except FedKLError as error:
        raise UpdateError(
            f"update of client {job.client} in round {job.round} refused: {error}. Check its "
            "model and its version of FedKL."
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpdateError(
            f"update of client {job.client} in round {job.round} refused: its reply is not one of "
            f"FedKL's ({type(error).__name__}: {error})."
        ) from error


def sealed_in(facts: Mapping[str, Any], length: int) -> dict[str, str]:
    """What a client sealed, of ``length`` characters, as facts of a result; empty for 0.

    Raises:
        UpdateError: It is not there, or of another size. More than that nobody can say of it here.
    """
    if not length:
        return {}
    text = facts.get(SEALED)
    if not isinstance(text, str) or len(text) != length:
        got = "none" if text is None else f"{len(str(text))} characters"
        raise UpdateError(f"sealed private layers: got {got}, expected {length} characters")
    return {SEALED: text}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < _MOST:
        raise UpdateError(f"it claims {value!r} examples")
    return value


def _accuracy(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of an ``examine`` job; a share outside [0, 1] is a lie."""
    other = metrics.get("other")
    thief = {
        name.removeprefix("thief."): float(value)
        for name, value in metrics.items()
        if name.startswith("thief.")
    }
    own, guess = float(metrics["own"]), float(metrics["guess"])
    wrong = [float(v) for v in metrics.get("wrong", [])]
    shares = [own, guess, *wrong, *thief.values(), *([] if other is None else [float(other)])]
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise UpdateError("it reports an accuracy outside [0, 1]")
    other = None if other is None else float(other)
    return {"own": own, "wrong": wrong, "other": other, "thief": thief, "guess": guess}
