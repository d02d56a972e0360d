"""What the server does with bad updates, missing clients and dying workers."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from fedhelp import assert_same, config, digits, snapshot, task, workspace
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkl.errors import ConfigError, FederationError, FedKLError, LockError, UpdateError
from fedkl.federation import Event, TrainingConfig, aggregate, client_update, run
from fedkl.federation.engine import sample
from fedkl.federation.jobs import Job, Result
from fedkl.federation.pool import ProcessPool
from fedkl.federation.preflight import preflight
from fedkl.federation.session import Session
from fedkl.key import Key
from fedkl.rng import derive

Change = Callable[[dict[str, Tensor]], None]


def spoil(tensors: dict[str, Tensor], value: float) -> None:
    tensors["1.weight"][0, 0] = value


CHANGES: dict[str, tuple[Change, str]] = {
    "nan": (lambda t: spoil(t, float("nan")), "1.weight holds NaN or infinity"),
    "inf": (lambda t: spoil(t, float("inf")), "1.weight holds NaN or infinity"),
    "missing": (lambda t: t.__delitem__("4.bias"), "missing 4.bias"),
    "extra": (lambda t: t.update(other=torch.zeros(2)), "unexpected other"),
    "shape": (lambda t: t.update({"4.bias": torch.zeros(3)}), "4.bias has shape (3,)"),
    "dtype": (lambda t: t.update({"4.bias": t["4.bias"].double()}), "4.bias is torch.float64"),
}


def tamper(monkeypatch: pytest.MonkeyPatch, change: Change, *, client: int, first: int = 1) -> None:
    """From round ``first`` on, what ``client`` sends is changed on the way."""
    original = Session.run

    def changed(self: Session, job: Job, shared: Any) -> Result:
        result = original(self, job, shared)
        if job.kind != "train" or job.client != client or job.round < first:
            return result
        tensors = snapshot(result.tensors)
        change(tensors)
        return Result(job, result.facts, tensors)

    monkeypatch.setattr(Session, "run", changed)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_bad_update_is_refused_and_the_round_goes_on(
    kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = CHANGES[kind]
    seen: list[dict[str, Tensor]] = []
    tamper(monkeypatch, change, client=1)
    monkeypatch.setattr(
        "fedkl.federation.engine.aggregate",
        lambda updates, weighted: (
            seen.append(aggregate(kept := list(updates)))
            or clients.append([u.client for u in kept])
            or seen[-1]
        ),
    )
    clients: list[list[int]] = []
    events: list[Event] = []
    result = run(config(workers=workers), tmp_path, bundle=digits(), on_event=events.append)
    assert clients == [[0, 2], [0, 2]]
    assert result.counts == {"refused": 2, "dropped": 0}
    notes = [e.message for e in events if e.kind == "note"]
    assert len(notes) == 2
    assert "client 1 in round 1" in notes[0]
    assert message in notes[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["clients"], line["refused"]) for line in lines] == [(2, [1]), (2, [1])]
    assert json.loads((tmp_path / "summary.json").read_text())["counts"] == dict(result.counts)


def test_too_few_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(monkeypatch, CHANGES["nan"][0], client=0, first=2)
    wanted = config(federation={"min_clients": 3, "rounds": 3})
    message = r"round 2: 2 update\(s\) left of 3 asked \(0 dropped out, 1 refused\), min_clients"
    with pytest.raises(FederationError, match=message) as caught:
        run(wanted, tmp_path, bundle=digits())
    assert "client 0 in round 2" in str(caught.value)
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert run(wanted, tmp_path, resume=True, bundle=digits()).counts["refused"] == 0


def test_nobody_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Session.run

    def nothing(self: Session, job: Job, shared: Any) -> Result:
        result = original(self, job, shared)
        return Result(job, result.facts, {})

    monkeypatch.setattr(Session, "run", nothing)
    events: list[Event] = []
    message = r"0 update\(s\) left of 3 asked \(0 dropped out, 3"
    with pytest.raises(FederationError, match=message) as caught:
        run(config(), tmp_path, bundle=digits(), on_event=events.append)
    assert str(caught.value).count("in round 1 refused") == 1  # the notes have them all
    assert len([e for e in events if e.kind == "note"]) == 3
    everyone = config(federation={"dropout": 1.0})
    with pytest.raises(FederationError, match=r"left of 0 asked \(3 dropped out, 0 refused\)"):
        run(everyone, tmp_path / "b", bundle=digits())


def test_a_round_of_which_too_many_drop_out_is_known_before_the_first(tmp_path: Path) -> None:
    wanted = config(federation={"dropout": 0.5, "rounds": 40}, seed=1)
    with pytest.raises(ConfigError, match=r"drop out of round \d+") as caught:
        preflight(wanted, tmp_path / "run", bundle=digits())
    found = re.search(r"(\d) of 3 clients .* round (\d+),", str(caught.value))
    assert found is not None
    assert found[1] == "3"
    fatal = int(found[2])
    assert sample(wanted, 3, fatal) == ([], [0, 1, 2])
    fewer = config(federation={"dropout": 0.5, "rounds": fatal - 1}, seed=1)
    assert fatal > 1
    preflight(fewer, tmp_path / "run", bundle=digits())
    strict = config(federation={"dropout": 0.5, "rounds": 3, "min_clients": 3}, seed=1)
    with pytest.raises(ConfigError, match=r"fewer than min_clients \(3\)"):
        preflight(strict, tmp_path / "run", bundle=digits())
    assert not (tmp_path / "run").exists()


def test_dropouts_are_counted(tmp_path: Path) -> None:
    wanted = config(federation={"clients": 8, "dropout": 0.4, "rounds": 4})
    events: list[Event] = []
    result = run(wanted, tmp_path, bundle=digits(), on_event=events.append)
    lines = result.validation
    lost = sum(len(line["dropped"]) for line in lines)
    assert 0 < lost == result.counts["dropped"] < 32
    assert all(line["clients"] + len(line["dropped"]) == 8 for line in lines)
    assert len([e for e in events if e.kind == "client"]) == 32 - lost


def test_a_client_that_diverges_comes_back(tmp_path: Path) -> None:
    """Its private state of the bad round is not kept, or it would be refused for ever."""
    wanted = config("fedbn", federation={"clients": 2, "rounds": 1})
    session = Session(wanted, tmp_path, digits())
    shared = session.initial()
    session.run(Job("train", 0, 1), shared)
    good = session.store.load(0, before=9)
    broken = {n: torch.full_like(t, float("nan")) for n, t in shared.items() if t.ndim == 2}
    result = session.run(Job("train", 0, 2), {**shared, **broken})
    assert any(bool(t.isnan().any()) for t in result.tensors.values())
    kept = session.store.load(0, before=9)
    assert (kept.round, good.round) == (1, 1)
    assert kept.private is not None
    after = session.run(Job("train", 0, 3), shared)
    assert all(bool(t.isfinite().all()) for t in after.tensors.values())


@pytest.mark.parametrize("method", ["fedavg", "centralized"])
def test_one_client_and_one_round_is_central_training(method: str, tmp_path: Path) -> None:
    wanted = config(federation={"clients": 1, "rounds": 1, "method": method})
    result = run(wanted, tmp_path, bundle=digits())
    session = Session(wanted, tmp_path, digits())
    everything = task(index=torch.arange(len(digits().train)))
    generator = derive(0, "client", 0, "round", 1)
    alone = client_update(session.workspace, session.initial(), everything, generator)
    assert_same(result.shared, alone.update.tensors)


def test_centralized_is_training_without_a_break(tmp_path: Path) -> None:
    """Momentum goes on from epoch to epoch, whatever the number of clients says."""
    model = {"name": "fedhelp:mlp"}
    federation = {"method": "centralized", "rounds": 3}
    result = run(config(model=model, federation=federation), tmp_path, bundle=digits())
    net = Session(config(model=model), tmp_path, digits()).workspace.model
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    rows = torch.cat(Session(config(), tmp_path, digits()).parts)
    for number in (1, 2, 3):
        generator = derive(0, "client", 0, "round", number)
        torch.randint(2**62, (1,), generator=generator)  # what borrowed() takes
        for part in rows[torch.randperm(len(rows), generator=generator)].split(32):
            optimizer.zero_grad()
            x, y = digits().train.batch(part)
            cross_entropy(net(x), y).backward()
            optimizer.step()
    assert_same(result.shared, net.state_dict())


@pytest.mark.parametrize("model", ["mlp", "tied"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedsgd_is_sgd_on_one_big_batch(model: str, momentum: float, tmp_path: Path) -> None:
    training = {"batch_size": 10_000, "momentum": momentum, "nesterov": momentum > 0}
    wanted = config(
        model={"name": f"fedhelp:{model}"},
        training={**training, "weight_decay": 0.01, "lr": 0.1},
        federation={"method": "fedsgd", "clients": 4, "rounds": 3},
        data={"partition": "dirichlet"},
    )
    result = run(wanted, tmp_path, bundle=digits())
    net = Session(wanted, tmp_path / "b", digits()).workspace.model
    start = snapshot(net.state_dict())
    optimizer = torch.optim.SGD(
        net.parameters(), 0.1, momentum, nesterov=momentum > 0, weight_decay=0.01
    )
    x, y = digits().train.batch(torch.arange(len(digits().train)))
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(result.shared[name], value.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(result.shared[name], start[name]) == name.startswith("frozen")


def test_the_lock_learns_under_fedsgd(tmp_path: Path) -> None:
    space = workspace("channel", TrainingConfig(batch_size=32), method="fedsgd")
    shared = snapshot(space.shared)
    key = Key.generate()
    space.enter(shared, key, None)
    start = snapshot(space.private)
    got = client_update(space, shared, task(key=key), derive(0, "x"))
    learned = [n for n in start if "keylock" in n]
    assert learned
    assert all(not torch.equal(got.private[n], start[n]) for n in learned)


def dies(self: Session, job: Job, shared: Any) -> Result:
    if job.client == 1:
        os._exit(9)
    time.sleep(60)
    raise AssertionError("the pool waited for this worker")


def refuses(self: Session, job: Job, shared: Any) -> Result:
    raise UpdateError(f"in process {os.getpid()}")


def breaks(self: Session, job: Job, shared: Any) -> Result:
    raise ZeroDivisionError("a bug")


class Odd(LockError):
    """An error that the parent does not know by name."""


def oddly(self: Session, job: Job, shared: Any) -> Result:
    raise Odd("an odd one")


def half(self: Session, job: Job, shared: Any) -> Result:
    """Dies while its answer is on the way: ten bytes of a thousand."""

    def send(connection: Connection, data: bytes) -> None:
        os.write(connection.fileno(), struct.pack("!i", 1000) + b"x" * 10)
        os._exit(7)

    Connection._send_bytes = send  # type: ignore[attr-defined]  # in the worker's process alone
    return Result(job, {"loss": 0.0}, {})


def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", dies)
    with pytest.raises(FederationError, match=r"worker process \d+ died \(exit code 9\)"):
        run(config(workers=2, federation={"clients": 3}), tmp_path, bundle=digits())
    assert not mp.active_children()


def test_a_worker_that_dies_in_the_middle_of_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "run", half)
    session = Session(config(), tmp_path, digits())
    with ProcessPool(lambda: session, 1, fork=True) as pool:
        results = pool.run([Job("train", 0, 1)], session.initial())
        with pytest.raises(FederationError, match=r"died \(exit code 7\)"):
            next(results)


@pytest.mark.parametrize(
    "fake, kind, message",
    [
        (refuses, UpdateError, r"in process \d+"),
        (breaks, RuntimeError, "ZeroDivisionError: a bug"),
        (oddly, RuntimeError, "an odd one"),
    ],
)
def test_errors_of_a_worker_arrive(
    fake: Any,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Session, "run", fake)
    with pytest.raises(kind, match=message) as caught:
        run(config(workers=2), tmp_path, bundle=digits())
    assert type(caught.value) is kind
    assert isinstance(caught.value, FedKLError) == (kind is UpdateError)
    assert str(os.getpid()) not in str(caught.value)
    assert not mp.active_children()


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def parent(folder: Path, pids: Any) -> None:
    session = Session(config(), folder, digits())
    pool = ProcessPool(lambda: session, 2, fork=True)
    pids.send([p.pid for p in pool._processes])
    jobs = (Job("train", client, 1) for client in [0, 1, 2] * 10_000)
    for _ in pool.run(jobs, session.initial()):
        pass


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[tuple[Any, list[int]]]:
    digits()
    ours, theirs = mp.get_context("fork").Pipe()
    process = mp.get_context("fork").Process(target=parent, args=(tmp_path, theirs))
    process.start()
    yield process, ours.recv()
    process.kill()
    process.join()


def test_workers_end_with_their_parent(forked: tuple[Any, list[int]]) -> None:
    process, pids = forked
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def test_no_process_is_left_after_a_run(tmp_path: Path) -> None:
    run(config(workers=3), tmp_path, bundle=digits())
    assert not mp.active_children()
