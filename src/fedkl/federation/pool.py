"""Who does the jobs: this process, or several. The results come in the order of the jobs."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing as mp
import signal
import struct
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Final, cast

import torch
from safetensors.torch import load as decode_tensors
from safetensors.torch import save as encode_tensors
from torch import Tensor

from fedkl import errors
from fedkl.errors import FederationError, FedKLError
from fedkl.federation.jobs import Job, Result
from fedkl.federation.session import Session

_AHEAD: Final = 2  # jobs in a worker's hands: one at work, one waiting


class Pool(ABC):
    """Does jobs on a global state."""

    @abstractmethod
    def run(self, jobs: Iterable[Job], shared: Mapping[str, Tensor]) -> Iterator[Result]:
        """Results in the order of ``jobs``, as they become available."""

    def close(self) -> None:  # noqa: B027 - nothing to end in one process
        """Ends the workers, if there are any."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SerialPool(Pool):
    """Does the jobs in this process."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self, jobs: Iterable[Job], shared: Mapping[str, Tensor]) -> Iterator[Result]:
        """One after the other."""
        for job in jobs:
            yield self.session.run(job, shared)


class ProcessPool(Pool):
    """Does the jobs in ``workers`` processes of one torch thread each.

    Private states and keys do not travel: workers read and write them on the disk.

    Args:
        make_session: Called in every worker. Under the ``fork`` start method it may return one
            that exists already, whose data the processes then share.
        workers: Number of processes.
        fork: Fork this process instead of starting fresh ones; only sound on the CPU.
    """

    def __init__(self, make_session: Callable[[], Session], workers: int, *, fork: bool) -> None:
        context: Any = mp.get_context("fork" if fork else "spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            inherited = [*self._connections, ours] if fork else []
            process = context.Process(
                target=_work, args=(theirs, make_session, inherited), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, jobs: Iterable[Job], shared: Mapping[str, Tensor]) -> Iterator[Result]:
        """Hands jobs out as workers become free and puts the results back in order.

        Raises:
            FederationError: A worker died.
            FedKLError: What a job raised.
        """
        todo = list(jobs)
        # What clients sealed goes to a worker once, as the state does: all jobs have the same.
        sealed = dict(todo[0].sealed) if todo else {}
        state = _encode({"shared": True, "sealed": sealed}, shared)
        given, out, done = 0, 0, {}
        busy: dict[Connection, list[int]] = {c: [] for c in self._connections}
        for connection in self._connections[: len(todo)]:
            self._send(connection, state)
        while out < len(todo):
            given = self._hand_out(todo, given, busy)
            for ready in wait([c for c, held in busy.items() if held]):
                connection = cast(Connection, ready)
                number = busy[connection].pop(0)
                done[number] = self._receive(connection, todo[number])
            while out in done:
                yield done.pop(out)
                out += 1

    def _hand_out(self, todo: Sequence[Job], given: int, busy: dict[Connection, list[int]]) -> int:
        for depth in range(_AHEAD):
            for connection in self._connections[: len(todo)]:
                if given < len(todo) and len(busy[connection]) <= depth:
                    job = dataclasses.replace(todo[given], sealed={})
                    self._send(connection, _encode(dataclasses.asdict(job), {}))
                    busy[connection].append(given)
                    given += 1
        return given

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            connection.send_bytes(data)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection, job: Job) -> Result:
        try:
            facts, tensors = _decode(connection.recv_bytes())
        except (EOFError, OSError) as error:  # OSError: it died in the middle of a message
            raise self._died(connection) from error
        if "error" in facts:
            kind = getattr(errors, facts["error"], None)
            if kind is None:
                raise RuntimeError(f"a worker failed:\n{facts['message']}")
            raised: FedKLError = kind(facts["message"])
            raise raised
        return Result(job, facts, tensors)

    def _died(self, connection: Connection) -> FederationError:
        process = self._processes[self._connections.index(connection)]
        process.join(1)
        return FederationError(
            f"worker process {process.pid} died (exit code {process.exitcode}); it may have run "
            "out of memory. Continue with --resume, with fewer --workers."
        )

    def close(self) -> None:
        """Stops the workers at once; what they have not reported is done again on resume."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _work(
    connection: Connection, make_session: Callable[[], Session], inherited: Sequence[Connection]
) -> None:
    # Ctrl-C goes to the parent alone, which ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    session: Session | None = None
    shared: dict[str, Tensor] = {}
    sealed: dict[str, str] = {}
    try:
        while True:
            facts, tensors = _decode(connection.recv_bytes())
            if "shared" in facts:
                shared, sealed = tensors, facts["sealed"]
                continue
            try:
                session = session or make_session()
                result = session.run(Job(**facts | {"sealed": sealed}), shared)
                answer = _encode(result.facts, result.tensors)
            except FedKLError as error:
                answer = _encode({"error": type(error).__name__, "message": str(error)}, {})
            except Exception:
                answer = _encode({"error": "", "message": traceback.format_exc()}, {})
            connection.send_bytes(answer)
    except (EOFError, OSError):
        return  # the parent is gone


def _encode(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Facts as JSON and tensors as safetensors in one message; never a pickle."""
    text = json.dumps(dict(facts)).encode()
    body = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    return struct.pack("<Q", len(text)) + text + encode_tensors(body)


def _decode(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), decode_tensors(data[8 + size :])
