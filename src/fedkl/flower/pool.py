"""Clients behind Flower's grid as a pool of the in-process engine."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedkl.errors import FederationError, FedKLError, UpdateError, number_of
from fedkl.federation.jobs import Job, Result
from fedkl.federation.pool import Pool
from fedkl.federation.sealed import sealed_length
from fedkl.federation.session import Session
from fedkl.files import make_folder, write_tensors
from fedkl.flower.node import job_text
from fedkl.flower.replies import introduction, lost, result_of, sealed_in
from fedkl.flower.secagg import secure_round
from fedkl.flower.settings import PROTOCOL, FlowerConfig, digest
from fedkl.flower.strategies import Combiner
from fedkl.flower.wire import ARRAYS, CONFIG, encoded, packed_record

log = logging.getLogger("flwr.fedkl")
_POLL: Final = 1.0  # seconds between two looks at who is there
_AGAIN: Final = 60.0  # seconds until a node that was refused may introduce itself again


class GridPool(Pool):
    """Sends the engine's jobs to SuperNodes and returns what they answer.

    A client that does not answer, or whose answer cannot be read, is left out of the results.

    Args:
        grid: Flower's grid.
        session: The server's session, for names and shapes.
        flower: Settings.
        folder: Run folder, for ``updates/``.
        combiner: A strategy of Flower that takes part in every round.
    """

    def __init__(
        self,
        grid: Grid,
        session: Session,
        flower: FlowerConfig,
        folder: Path,
        combiner: Combiner | None = None,
    ) -> None:
        self.grid = grid
        self.session = session
        self.flower = flower
        self.folder = folder
        self.combiner = combiner
        self.settings = digest(session.config, flower)
        self.packed = flower.packed or combiner is not None
        self.sealed = sealed_length(session.workspace.private) if session.seals else 0
        self._facts: dict[int, Mapping[str, Any]] = {}  # of a node that introduced itself
        self._refused: dict[int, float] = {}  # node -> when
        self._started = False
        self._group: str | None = None

    def run(self, jobs: Iterable[Job], shared: Mapping[str, Tensor]) -> Iterator[Result]:
        """Results in the order of ``jobs``, without those of clients that did not answer.

        Raises:
            FederationError: There is nobody to do a single job.
        """
        todo = {job.client: job for job in jobs}
        kinds = {job.kind for job in todo.values()}
        if not todo:
            return
        nodes = self._wait_for(set(todo))
        if kinds == {"train"} and self.flower.secagg:
            found = self._train_in_secret(todo, nodes, shared)
        else:
            found = self._ask(todo, nodes, shared)
        if not found and kinds == {"examine"}:
            raise FederationError(
                "no client answered when asked for its accuracy; look at the clients' logs, or "
                "raise flower.timeout."
            )
        yield from (found[client] for client in todo if client in found)

    def _wait_for(self, clients: set[int]) -> dict[int, int]:
        """Node ids of the clients that are there; waits while too few of them are.

        At the start everybody gets the time to come, unless as many as there should be have come
        and some had to be refused.
        """
        least = min(len(clients), max(1, self.session.config.federation.min_clients))
        end = time.monotonic() + self.flower.timeout
        while True:
            nodes = {c: n for c, n in self.clients().items() if c in clients}
            late = time.monotonic() > end
            known = len(self._facts) + len(self._refused)
            complete = self._started or len(nodes) == len(clients)
            if len(nodes) >= least and (complete or late or known >= len(self.session.parts)):
                self._started = True
                return nodes
            if late:
                raise FederationError(
                    f"{len(nodes)} of {number_of(len(clients), 'client')} there after "
                    f"{self.flower.timeout:g} s, {least} are needed; start their SuperNodes, or "
                    "raise flower.timeout."
                )
            time.sleep(min(_POLL, self.flower.timeout / 4))

    def clients(self) -> dict[int, int]:
        """Client number -> node id of every node that is there and has introduced itself."""
        online = sorted(self.grid.get_node_ids())
        now = time.monotonic()
        self._refused = {n: at for n, at in self._refused.items() if now - at < _AGAIN}
        new = [n for n in online if n not in self._facts and n not in self._refused]
        if new:
            self._introduce(new)
        found: dict[int, int] = {}
        for node in online:
            if node in self._facts:
                found.setdefault(self._facts[node]["client"], node)
        return found

    def _introduce(self, nodes: list[int]) -> None:
        record = RecordDict({CONFIG: ConfigRecord(self._common())})
        replies = self._send(dict.fromkeys(nodes, record), MessageType.QUERY)
        told: dict[int, Mapping[str, Any]] = {}
        # What a node could not answer has been logged; asking at once again would not help.
        self._refused |= {node: time.monotonic() for node in nodes if node not in replies}
        for node, reply in replies.items():
            try:
                told[node] = introduction(reply, len(self.session.parts))
            except FedKLError as error:
                self._refuse(node, str(error))
        if self._group is None and told:
            self._group = Counter(str(f["group"]) for f in told.values()).most_common(1)[0][0]
        taken = {facts["client"]: node for node, facts in self._facts.items()}
        online = set(self.grid.get_node_ids())
        for node, facts in sorted(told.items()):
            client = facts["client"]
            if facts["group"] != self._group:
                self._refuse(node, f"client {client} has another group key than the others; give "
                             "all clients the same group-key-file.")  # fmt: skip
            elif taken.get(client, node) != node and taken[client] in online:
                self._refuse(node, f"client {client} is node {taken[client]} already; give every "
                             "node a partition-id of its own.")  # fmt: skip
            else:
                self._facts.pop(taken.get(client, node), None)
                self._facts[node] = facts
                taken[client] = node

    def _refuse(self, node: int, reason: str) -> None:
        self._refused[node] = time.monotonic()
        log.warning("node %d refused: %s", node, reason)

    def _common(self) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "settings": self.settings, "packed": self.packed}

    def _ask(
        self, todo: Mapping[int, Job], nodes: Mapping[int, int], shared: Mapping[str, Tensor]
    ) -> dict[int, Result]:
        first = next(iter(todo.values()))
        training = first.kind == "train"
        arrays = packed_record(shared) if self.packed else encoded(shared)
        extra = {}
        if training and self.combiner is not None:
            extra = self.combiner.configure(first.round, shared, list(nodes.values()))
        config = ConfigRecord({**extra, **self._common(), "job": job_text(first)})
        record = RecordDict({ARRAYS: arrays, CONFIG: config})
        kind = MessageType.TRAIN if training else MessageType.EVALUATE
        asked = {nodes[client]: client for client in todo if client in nodes}
        self._note_absent(todo, nodes, first)
        found: dict[int, Result] = {}
        for node, reply in self._send(dict.fromkeys(asked, record), kind).items():
            client = asked[node]
            try:
                found[client] = result_of(
                    reply, todo[client], shared, packed=self.packed, sealed=self.sealed
                )
            except UpdateError as error:
                log.warning("client %d refused: %s", client, error)
                continue
            if training and self.combiner is not None:
                self.combiner.received(client, reply)
        if training and self.flower.save_updates:
            self._save(first.round, shared, found)
        return found

    def _train_in_secret(
        self, todo: Mapping[int, Job], nodes: Mapping[int, int], shared: Mapping[str, Tensor]
    ) -> dict[int, Result]:
        """One result per client, each with the mean of all: nobody's own is known."""
        job = next(iter(todo.values()))
        self._note_absent(todo, nodes, job)
        # As the clients weight themselves: settings are the same on both sides, or refused.
        weighted = self.session.config.federation.weighted
        summed = secure_round(
            self.grid,
            job.round,
            shared,
            {n: int(self._facts[n]["examples"]) if weighted else 1 for n in nodes.values()},
            {**self._common(), "job": job_text(job)},
            clipping_range=self.flower.clipping_range,
            timeout=self.flower.timeout,
        )
        if summed is None:
            return {}
        by_node = {node: client for client, node in nodes.items()}
        found = {}
        for node, facts in summed.facts.items():
            job = todo[by_node[node]]
            told = {"kind": facts["kind"], "examples": facts["examples"]}
            try:
                told |= sealed_in(facts, self.sealed)
            except UpdateError as error:  # its update is in the sum, and stays there
                log.warning("client %d, round %d: %s", job.client, job.round, error)
            found[job.client] = Result(job, told, summed.mean)
        return found

    def _note_absent(self, todo: Mapping[int, Job], nodes: Mapping[int, int], job: Job) -> None:
        if absent := [client for client in todo if client not in nodes]:
            log.warning("round %d: client(s) %s are not there", job.round, absent)

    def _send(self, records: Mapping[int, RecordDict], kind: str) -> dict[int, Message]:
        """Replies by node; whoever does not answer is asked again, as often as configured."""
        found: dict[int, Message] = {}
        for attempt in range(1 + self.flower.retries):
            missing = [n for n in records if lost(found.get(n))]
            if attempt and missing:
                missing = self._back(missing)
            if not missing:
                break
            messages = [Message(records[n], dst_node_id=n, message_type=kind) for n in missing]
            replies = self.grid.send_and_receive(messages, timeout=self.flower.timeout)
            found |= {reply.metadata.src_node_id: reply for reply in replies}
        for node in records:
            reply = found.get(node)
            if reply is None:
                log.warning("node %d did not answer within %g s", node, self.flower.timeout)
            elif reply.has_error():
                reason = " ".join(str(reply.error.reason).split())
                log.warning("node %d could not do its part: %s", node, reason)
        return {node: reply for node, reply in found.items() if not reply.has_error()}

    def _back(self, nodes: list[int]) -> list[int]:
        """Those of ``nodes`` that are there, after waiting a while for all of them."""
        log.info("waiting for node(s) %s to come back", nodes)
        end = time.monotonic() + self.flower.patience
        while True:
            online = set(self.grid.get_node_ids())
            if online >= set(nodes) or time.monotonic() > end:
                return [node for node in nodes if node in online]
            time.sleep(min(_POLL, self.flower.patience / 4))

    def _save(self, round_: int, shared: Mapping[str, Tensor], found: Mapping[int, Result]) -> None:
        folder = make_folder(self.folder / "updates" / f"round-{round_:06d}")
        write_tensors(folder / "global.safetensors", shared, {"round": str(round_)})
        for client, result in found.items():
            facts = {"client": str(client), "round": str(round_), "kind": result.facts["kind"]}
            facts["examples"] = str(result.facts["examples"])
            write_tensors(folder / f"client-{client:05d}.safetensors", result.tensors, facts)
