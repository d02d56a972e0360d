"""A Flower deployment on this machine: certificates, a SuperLink, three SuperNodes, one run.

    python deploy.py --folder /tmp/fedkl-deployment --rounds 3

TLS everywhere and SuperNode authentication, as a real one has; only the machines are missing. What
each process is started with is written to `commands.txt`, to be taken to the machines.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedkl import Key

APP = Path(__file__).parent
BIN = Path(sys.executable).parent
_PRIVATE = serialization.PrivateFormat
_PLAIN = serialization.NoEncryption()


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(folder: Path) -> None:
    """`ca.pem`, `server.pem` and `server.key` for localhost, good for a week. For tests only."""
    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "FedKL test CA")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    pair = [
        ("ca.pem", _certificate(root, root, ca, ca).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True)),
        ("server.pem", _certificate(name, root, server, ca).add_extension(
            x509.SubjectAlternativeName(hosts), critical=False)),
    ]  # fmt: skip
    for file, builder in pair:
        signed = builder.sign(ca, hashes.SHA384())
        (folder / file).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding = serialization.Encoding.PEM
    _secret(folder / "server.key", server.private_bytes(encoding, _PRIVATE.PKCS8, _PLAIN))


def _certificate(subject: x509.Name, issuer: x509.Name, key: Any, by: Any) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
    )


def node_key(folder: Path) -> None:
    """`auth.key` and `auth.pub`, by which the SuperLink knows a SuperNode."""
    key = ec.generate_private_key(ec.SECP384R1())
    encoding = serialization.Encoding.PEM
    _secret(folder / "auth.key", key.private_bytes(encoding, _PRIVATE.OpenSSH, _PLAIN))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "auth.pub").write_bytes(public)


def _secret(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def descendants(pid: int) -> list[int]:
    """Ids of all processes below `pid`, in groups of their own or not (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (children := parents.get(todo.pop(), []))
        found += children
    return found


class Deployment:
    """A SuperLink and SuperNodes in processes of their own; all end with the `with` block.

    `tls=False` leaves out encryption and authentication, to look at what is sent; `simulation`
    makes the SuperLink run its nodes by itself.
    """

    def __init__(
        self, folder: Path, nodes: int, *, tls: bool = True, simulation: bool = False
    ) -> None:
        self.folder = folder.absolute()
        self.nodes = nodes
        self.tls = tls
        self.simulation = simulation
        self.port = free_port()
        self.fleet_port = self.port  # a proxy may stand in between
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.tls:
            certificates(self.folder)
        try:
            self.start_superlink()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_superlink(self) -> None:
        """Starts the SuperLink and tells `flwr` where it is."""
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", str(self.folder / "superlink.db")]
        command += ["--disable-runtime-dependency-installation"]
        connection = [f'address = "127.0.0.1:{self.port}"']
        if self.tls:
            command += ["--ssl-ca-certfile", str(self.folder / "ca.pem")]
            command += ["--ssl-certfile", str(self.folder / "server.pem")]
            command += ["--ssl-keyfile", str(self.folder / "server.key")]
            command += ["--enable-supernode-auth"]
            connection.append(f'root-certificates = "{self.folder / "ca.pem"}"')
        else:
            command += ["--insecure"]
            connection.append("insecure = true")
        if self.simulation:
            command += ["--simulation"]
            connection.append(f"options.num-supernodes = {self.nodes}")
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n' + "\n".join(connection) + "\n"
        )
        self.start("superlink", command, home)
        self._wait_for_port(self.port)

    def start_node(self, number: int, **settings: str) -> None:
        """Starts one SuperNode; it gets its folder, and `settings` in its node config."""
        place = self.folder / f"node-{number}"
        place.mkdir(mode=0o700, exist_ok=True)
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.fleet_port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        if self.tls:
            command += ["--root-certificates", str(self.folder / "ca.pem")]
            command += ["--auth-supernode-private-key", str(place / "auth.key")]
            if not (place / "auth.key").exists():
                node_key(place)
                self.flwr("supernode", "register", str(place / "auth.pub"), "here")
        else:
            command += ["--insecure"]
        config = {"fedkl-folder": str(place / "private"), **settings}
        text = " ".join(f'{name}="{value}"' for name, value in config.items())
        command += ["--node-config", f"partition-id={number} num-partitions={self.nodes} {text}"]
        self.start(f"node-{number}", command, place / "home")

    def restart_node(self, number: int, *, timeout: float = 150, **settings: str) -> None:
        """Starts a SuperNode that died until the SuperLink takes it back.

        While the SuperLink still believes in the dead one, for up to a minute, it refuses a second
        one with the same key. A service manager does the same with "restart always".
        """
        name = f"node-{number}"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            before = self.log("superlink").count("Activated node_id")
            refused = self.log(name).count("Failed to activate SuperNode")
            self.start_node(number, **settings)
            while self.processes[name].poll() is None and time.monotonic() < end:
                if self.log("superlink").count("Activated node_id") > before:
                    return
                if self.log(name).count("Failed to activate SuperNode") > refused:
                    break
                time.sleep(0.2)
            self.kill(name)
            time.sleep(5)
        raise TimeoutError(f"{name} was not taken back:\n{self.log(name)[-3000:]}")

    def start(self, name: str, command: Sequence[str], home: Path) -> None:
        """Starts a process in a group of its own, with its output in `<name>.log`."""
        home.mkdir(exist_ok=True)
        with (self.folder / "commands.txt").open("a") as file:
            file.write(f"FLWR_HOME={home} {shlex.join(command)}\n")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(home),
                cwd=self.folder,
                start_new_session=True,
            )

    def _environment(self, home: Path) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        return {**os.environ, **quiet, "PATH": path, "FLWR_HOME": str(home)}

    def flwr(self, *arguments: str, timeout: float = 120) -> str:
        """Runs `flwr` against the SuperLink; its output."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            env=self._environment(self.folder / "home"),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def run(self, settings: str, app: Path = APP) -> None:
        """Submits an app with settings such as `federation.rounds=3`; does not wait for it."""
        self.flwr("run", str(app), "here", "--run-config", settings)

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Ends a process and all that it started."""
        process = self.processes.pop(name)
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        process.wait(30)

    def status(self) -> str:
        """Of the newest run, such as `running` or `finished:completed`."""
        runs = json.loads(self.flwr("list", "here", "--format", "json"))["runs"]
        return str(runs[0]["status"]) if runs else ""

    def output(self) -> str:
        """What the server app of the newest run has logged."""
        runs = json.loads(self.flwr("list", "here", "--format", "json"))["runs"]
        return self.flwr("log", str(runs[0]["run-id"]), "here", "--show")

    def stop(self) -> None:
        """Ends everything."""
        for name in reversed(list(self.processes)):
            self.kill(name)

    def log(self, name: str) -> str:
        """Output of a process so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, timeout: float = 300) -> None:
        """Waits until `text` is in the output of a process."""
        end = time.monotonic() + timeout
        while text not in self.log(name):
            if name not in self.processes or self.processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended:\n{self.log(name)[-3000:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"{text!r} not from {name}:\n{self.log(name)[-3000:]}")
            time.sleep(0.2)

    def _wait_for_port(self, port: int, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if self.processes["superlink"].poll() is not None:
                break
            time.sleep(0.2)
        raise RuntimeError(f"the SuperLink did not start:\n{self.log('superlink')[-3000:]}")


def main() -> None:
    """The whole federation once; prints what the server app logs about accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="everything goes here")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the `with` block ends
    with Deployment(options.folder, 3) as deployment:
        group = deployment.folder / "group.key"
        if not group.exists():  # all clients get a copy, the server does not
            Key.generate().save(group)
        for number in range(3):
            deployment.start_node(number, **{"group-key-file": str(group)})
        folder = deployment.folder / "server"
        summary = folder / "summary.json"
        summary.unlink(missing_ok=True)
        deployment.run(f'flower.folder="{folder}" federation.rounds={options.rounds}')
        shown = 0
        while not summary.exists():
            time.sleep(1)
            shown = show(folder / "metrics.jsonl", shown)
            if deployment.status() in ("finished:failed", "finished:stopped"):
                sys.exit(f"the run failed:\n{deployment.output()[-3000:]}")
        show(folder / "metrics.jsonl", shown)
        print(f"test: own key {json.loads(summary.read_text())['accuracy']['own_key']:.4f}")
        print(f"checkpoints and summary: {folder}")


def show(path: Path, after: int) -> int:
    """Prints the evaluations that are new; their number."""
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines[after:]:
        facts = json.loads(line)
        print(f"round {facts['round']}: own key {facts['accuracy']['own_key']:.4f}", flush=True)
    return len(lines)


if __name__ == "__main__":
    main()
