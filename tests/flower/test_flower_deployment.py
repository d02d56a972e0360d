"""Real processes on loopback: TLS, authentication, crashes, and what is on the wire."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fedhelp import assert_same, make_keys, with_keys
from flowhelp import EXAMPLES
from leakhelp import Secrets, secrets_of

sys.path.insert(0, str(EXAMPLES / "flower-app"))

from deploy import Deployment, descendants, free_port

from fedkl.errors import DataNotFoundError
from fedkl.federation import RunConfig, run
from fedkl.federation.session import Session, load_data
from fedkl.files import read_tensors
from fedkl.flower import settings_from

pytestmark = pytest.mark.slow

SETTINGS = {
    "data.dataset": "fashion-mnist",
    "data.samples": 300,
    "model.name": "lenet",
    "defense.name": "channel",
    "defense.length": 64,
    "federation.rounds": 3,
    "evaluation.every": 0,
    "evaluation.images": 200,
    "evaluation.wrong_keys": 1,
}


@pytest.fixture
def config() -> RunConfig:
    found = settings_from(SETTINGS)[0]
    try:
        load_data(found)
    except DataNotFoundError as error:
        pytest.skip(str(error))
    return found


def started(deployment: Deployment, keys: Path) -> dict[int, dict[str, str]]:
    """Starts three SuperNodes; their node configs."""
    settings = {}
    for number in range(3):
        key = keys / f"client-{number:05d}.key"
        settings[number] = {"key-file": str(key), "group-key-file": str(keys / "group.key")}
        deployment.start_node(number, **settings[number])
    return settings


def submitted(deployment: Deployment, folder: Path, **more: Any) -> None:
    values = {**SETTINGS, "flower.folder": str(folder), **more}
    text = " ".join(f"{n}='{v}'" if isinstance(v, str) else f"{n}={v}" for n, v in values.items())
    deployment.run(text)


def wait_until(condition: Any, deployment: Deployment, timeout: float = 280) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            tails = {n: deployment.log(n)[-2000:] for n in ("superlink", "node-0", "node-1")}
            raise AssertionError("\n".join(f"== {n}\n{t}" for n, t in tails.items()))
        time.sleep(0.1)


def server_app_of(deployment: Deployment) -> list[int]:
    found = []
    for pid in descendants(deployment.processes["superlink"].pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"flwr-serverapp" in command:
            found.append(pid)
    return found


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found += [pid] if state != "Z" else []
    return found


def test_a_deployment_with_faults_equals_the_engine(config: RunConfig, tmp_path: Path) -> None:
    """TLS and authentication; a client and the server app are killed; the result is the same."""
    keys = make_keys(tmp_path / "keys", 3, 64)
    want = run(config, with_keys(tmp_path / "engine", keys))
    folder = tmp_path / "deployment" / "server"
    with Deployment(tmp_path / "deployment", 3) as deployment:
        settings = started(deployment, keys)
        submitted(deployment, folder, **{"flower.timeout": 150.0})
        wait_until(lambda: "Receiving: train" in deployment.log("node-1"), deployment)
        deployment.kill("node-1")  # SIGKILL, in the middle of round 1
        assert "Sending: train" not in deployment.log("node-1")
        deployment.restart_node(1, **settings[1])
        wait_until((folder / "checkpoints" / "round-000001.json").exists, deployment)
        (server,) = server_app_of(deployment)
        os.kill(server, signal.SIGKILL)  # in the middle of round 2
        submitted(deployment, folder, **{"flower.timeout": 150.0})
        wait_until((folder / "summary.json").exists, deployment)
        processes = [p.pid for p in deployment.processes.values()]
        processes += [d for p in processes for d in descendants(p)]
    assert len(processes) > 4
    time.sleep(1)
    assert alive(processes) == []
    tensors, _ = read_tensors(folder / "checkpoints" / "round-000003.safetensors")
    assert_same({n.removeprefix("shared/"): t for n, t in tensors.items()}, want.shared)
    for number in range(3):
        name = f"clients/{number:05d}/round-000003.safetensors"
        mine = read_tensors(tmp_path / "deployment" / f"node-{number}" / "private" / name)[0]
        assert_same(mine, read_tensors(tmp_path / "engine" / name)[0])
    assert not list(folder.rglob("*.key"))  # the server has no key


def test_the_simulation_equals_the_engine(config: RunConfig, tmp_path: Path) -> None:
    """Both examples on Flower's simulation runtime, as `flwr run .` starts it."""
    keys = make_keys(tmp_path / "keys", 3, 64)
    want = run(config, with_keys(tmp_path / "engine", keys))
    folder = with_keys(tmp_path / "simulated", keys)
    with Deployment(tmp_path / "flower", 3, tls=False, simulation=True) as deployment:
        submitted(deployment, folder)
        wait_until((folder / "summary.json").exists, deployment)
    tensors, _ = read_tensors(folder / "checkpoints" / "round-000003.safetensors")
    assert_same({n.removeprefix("shared/"): t for n, t in tensors.items()}, want.shared)
    for number in range(3):
        name = f"clients/{number:05d}/round-000003.safetensors"
        mine = read_tensors(folder / name)[0]
        assert_same(mine, read_tensors(tmp_path / "engine" / name)[0])


def test_the_quickstart_with_the_mod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "user"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))  # where the private states go
    with Deployment(tmp_path / "flower", 2, tls=False, simulation=True) as deployment:
        deployment.run("rounds=2", EXAMPLES / "quickstart-mod")
        wait_until(lambda: deployment.status().startswith("finished"), deployment)
        assert deployment.status() == "finished:completed"
        log = deployment.output()
    assert "accuracy" in log
    kept = sorted(p.relative_to(home).as_posix() for p in (home / ".fedkl").rglob("round-*"))
    assert kept == [
        f".fedkl/node-{n}/clients/{n:05d}/round-{r:06d}.safetensors" for n in (0, 1) for r in (1, 2)
    ]
    assert len(list((home / ".fedkl").rglob("*.key"))) == 2


# --- what is on the wire --------------------------------------------------------------------------

PLANTED = """
import torch
from pathlib import Path
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedkl.files import read_tensors

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    folder = Path(context.node_config["fedkl-folder"]) / "clients"
    tensors, _ = read_tensors(sorted(folder.rglob("*.safetensors"))[-1])
    record = ArrayRecord()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            for dtype in (torch.float16, torch.float32, torch.float64):
                record[f"w{len(record)}"] = Array(tensor.to(dtype).numpy())
    return Message(RecordDict({"arrays": record}), reply_to=message)


@server.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    grid.send_and_receive(
        [Message(RecordDict(), dst_node_id=n, message_type="train") for n in nodes], timeout=200
    )
    Path(context.run_config["done"]).write_text("done")
"""
PLANTED_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "planted"
version = "1.0.0"
description = ""
license = "MIT"
dependencies = []
[tool.flwr.app]
publisher = "fedkl"
[tool.flwr.app.components]
serverapp = "planted:server"
clientapp = "planted:client"
[tool.flwr.app.config]
done = ""
"""


class Recorder:
    """A TCP proxy that writes down what clients send."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.port = free_port()
        self.sent: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                return
            record = bytearray()
            self._sockets += [inside, outside]
            for a, b, keep in ((inside, outside, record), (outside, inside, None)):
                threading.Thread(target=self._pump, args=(a, b, keep), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket, keep: bytearray | None) -> None:
        while True:
            try:
                data = a.recv(65536)
                if keep is not None:
                    self.sent.append(data)
                if not data:
                    b.shutdown(socket.SHUT_WR)
                    return
                b.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            each.close()


@contextmanager
def recorder(to: int) -> Iterator[Recorder]:
    found = Recorder(to)
    try:
        yield found
    finally:
        found.close()


def test_nothing_private_is_on_the_wire(config: RunConfig, tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", 3, 64)
    place = tmp_path / "deployment"
    folder = place / "server"
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "planted.py").write_text(PLANTED)
    (planted / "pyproject.toml").write_text(PLANTED_PROJECT)
    with Deployment(place, 3, tls=False) as deployment, recorder(deployment.port) as wire:
        deployment.fleet_port = wire.port
        started(deployment, keys)
        submitted(deployment, folder, **{"federation.rounds": 2})
        wait_until((folder / "summary.json").exists, deployment)
        run_bytes = len(wire.sent)
        done = tmp_path / "done"
        deployment.run(f"done='{done}'", planted)
        wait_until(done.exists, deployment)
        sent, after = b"".join(wire.sent[:run_bytes]), b"".join(wire.sent[run_bytes:])
    found: dict[int, Secrets] = {}
    for number in range(3):
        private = tmp_path / f"copy-{number}"
        shutil.copytree(place / f"node-{number}" / "private", private)
        found[number] = secrets_of(private, config, Session(config, private))
    kinds = {name for secrets in found.values() for name in secrets.found_in(after)}
    for kind in ("scale_weight", "shift_weight", "running_mean", "running_var"):
        assert {f"{kind} float16", f"{kind} float32", f"{kind} float64"} <= kinds
    assert len(sent) > 2 * 3 * 4 * 13_000  # two rounds of three updates of LeNet
    assert [secrets.found_in(sent) for secrets in found.values()] == [set()] * 3
