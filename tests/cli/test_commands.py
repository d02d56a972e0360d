"""The commands do what they say: files, figures, resuming, interruption, help."""

from __future__ import annotations

import base64
import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cli_support import SMALL, Call, extended, snapshot, with_

import fedkl.federation
import fedkl.federation.session
from fedkl.attacks import InvertingGradients
from fedkl.audit import arsenal
from fedkl.cli import demo as demo_module
from fedkl.data import DataBundle
from fedkl.errors import DataNotFoundError
from fedkl.federation import RunConfig
from fedkl.key import Key

COMMANDS = ["train", "evaluate", "audit", "audit-update", "certify", "inspect", "keygen", "demo"]
MAIN = [sys.executable, "-m", "fedkl"]


def test_train_writes_what_it_promises(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"method", "defense", "rounds", "seconds", "accuracy"} <= set(summary)
    assert (summary["method"], summary["defense"], summary["rounds"]) == ("fedavg", "channel", 2)
    for name in ("own_key", "wrong_key", "wrong_key_p95", "other_client", "outsider", "no_lock"):
        assert 0 <= summary["accuracy"][name] <= 1
    assert summary["command"].startswith("fedkl train --dataset digits")
    assert summary["versions"]["torch"]
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 2
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "config.json").read_text())["federation"]["rounds"] == 2
    keys = list((finished / "keys").iterdir())
    assert len(keys) == 4  # three clients and their group
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)


def test_train_says_what_is_secret(call: Call, finished: Path) -> None:
    answer = call("train", "--out", finished, "--resume")
    assert f"Secret, for the clients alone: keys/ and clients/ in {finished}" in answer.out
    files = next(line for line in answer.out.splitlines() if "In " in line)
    assert "keys/" not in files
    assert "insider: another client" in answer.out


@pytest.mark.parametrize(
    "command, options",
    [
        ("audit", ["--rounds", "--lr", "--key-length", "--budget"]),
        ("certify", ["--method", "--key-length", "--seed"]),
    ],
)
def test_settings_that_a_run_has_already_stand_under_a_heading(
    call: Call, command: str, options: Sequence[str]
) -> None:
    text = call(command, "--help").out
    assert text.count("─ Without --run") == 1
    head, _, below = text.partition("─ Without --run")
    for option in options:
        assert option not in head
        assert option in below
    assert "--run" in head


def test_train_prints_progress_and_a_table(call: Call, tmp_path: Path) -> None:
    words = ["train", *SMALL, "--defense", "norm", "--rounds", "2", "--out", tmp_path / "run"]
    answer = call(*words)
    assert answer.code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    own = f"{100 * summary['accuracy']['own_key']:.1f} %"
    row = next(line for line in answer.out.splitlines() if "fedavg norm" in line)
    # Without a lock anyone can use the model: no lock is own key, and there is no wrong key.
    assert re.findall(r"[\d.]+ %|–", row) == [own, "–", "–", "–", own, own]
    assert "round 2/2" in answer.err
    assert "left" in answer.err
    assert str(tmp_path / "run") in answer.out


def test_resume_takes_the_settings_of_the_folder(call: Call, finished: Path) -> None:
    answer = call("train", "--out", finished, "--resume", "--rounds", "3")
    assert answer.code == 0
    assert "resumed after round 2" in answer.err
    assert json.loads((finished / "config.json").read_text())["data"]["dataset"] == "digits"
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 3


def test_resume_passes_over_a_truncated_checkpoint_and_says_so(call: Call, finished: Path) -> None:
    newest = finished / "checkpoints" / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    answer = call("train", "--out", finished, "--resume")
    assert answer.code == 0
    assert "checkpoint of round 2 not used" in answer.err
    assert "resumed after round 1" in answer.err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_leaves_a_run_that_resumes(call: Call, tmp_path: Path, workers: str) -> None:
    folder = tmp_path / "run"
    words = ["train", *SMALL, "--method", "fedkl", "--rounds", "100000", "--out", str(folder)]
    process = subprocess.Popen(
        [*MAIN, *with_(words, "--eval-every", "0"), "--workers", workers],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if "round 3/" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, seen + err
    assert "Traceback" not in seen + err
    assert f"continue with: fedkl train --out {folder} --resume" in err
    assert out == ""
    done = max(int(p.stem[6:]) for p in (folder / "checkpoints").glob("round-*.json"))
    assert done >= 2
    answer = call("train", "--out", folder, "--resume", "--rounds", done + 1)
    assert answer.code == 0
    assert f"resumed after round {done}" in answer.err
    assert (folder / "summary.json").exists()


def test_evaluate_gives_the_figures_of_the_run(call: Call, finished: Path) -> None:
    run = json.loads((finished / "summary.json").read_text())["accuracy"]
    answer = call("evaluate", finished, "--json")
    assert answer.code == 0
    again = json.loads(answer.out)
    assert (again["split"], again["round"]) == ("test", 2)
    for name in ("own_key", "other_client", "no_lock", "own_per_client"):
        assert again["accuracy"][name] == run[name]  # all but the wrong keys, drawn afresh
    lines = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["accuracy"]["own_key"], -line["round"]))
    answer = call("evaluate", finished, "--split", "validation", "--checkpoint", "best", "--json")
    found = json.loads(answer.out)
    assert found["round"] == best["round"]
    assert found["accuracy"]["own_key"] == best["accuracy"]["own_key"]


def test_evaluate_changes_nothing(call: Call, finished: Path) -> None:
    before = snapshot(finished)
    answer = call("evaluate", finished)
    assert answer.code == 0
    assert "fedavg channel" in answer.out
    assert snapshot(finished) == before


def test_keygen_prints_the_fingerprint_alone(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    answer = call("keygen", path)
    assert answer.code == 0
    assert answer.out == Key.load(path).fingerprint + "\n"
    assert answer.err == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keygen_encrypts(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pass").write_text("open sesame\nsecond line\n")
    assert call("keygen", tmp_path / "a.key", "--passphrase-file", tmp_path / "pass").code == 0
    Key.load(tmp_path / "a.key", passphrase="open sesame")
    monkeypatch.setenv("FEDKL_PASSPHRASE", "from the environment")
    assert call("keygen", tmp_path / "b.key").code == 0
    key = Key.load(tmp_path / "b.key", passphrase="from the environment")
    answer = call("inspect", tmp_path / "b.key")
    assert answer.code == 0
    assert key.fingerprint in answer.out
    assert "opens with this passphrase" in answer.out


def test_keygen_imports_a_vector(call: Call, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32)
    np.save(tmp_path / "v.npy", values)
    assert call("keygen", tmp_path / "v.key", "--from-vector", tmp_path / "v.npy").code == 0
    assert Key.load(tmp_path / "v.key").vector(16).tolist() == values.tolist()
    assert "vector (imported)" in call("inspect", tmp_path / "v.key").out


def test_inspect_shows_no_secret(call: Call, finished: Path) -> None:
    path = finished / "keys" / "client-00000.key"
    secret = json.loads(path.read_text())["secret"]
    for answer in (call("inspect", path), call("inspect", finished)):
        assert answer.code == 0
        assert secret not in answer.out + answer.err
        assert base64.b64decode(secret).hex() not in answer.out + answer.err
    assert Key.load(path).fingerprint in call("inspect", path).out


def test_inspect_of_an_encrypted_key_needs_no_passphrase(call: Call, tmp_path: Path) -> None:
    key = Key.generate()
    key.save(tmp_path / "a.key", passphrase="x")
    answer = call("inspect", tmp_path / "a.key")
    assert answer.code == 0
    assert key.fingerprint in answer.out


def test_inspect_run_shows_settings_and_figures(call: Call, finished: Path) -> None:
    answer = call("inspect", finished)
    assert answer.code == 0
    assert "dataset = digits" in answer.out
    assert "after round 2" in answer.out
    (finished / "summary.json").unlink()
    assert f"fedkl train --out {finished} --resume" in call("inspect", finished).out


def test_inspect_of_an_extended_run_shows_no_figures_of_before(call: Call, finished: Path) -> None:
    extended(finished, rounds=4, stop=3)
    answer = call("inspect", finished)
    assert "rounds = 4" in answer.out
    assert "after round 3" in answer.out
    assert f"Not finished; continue with: fedkl train --out {finished} --resume" in answer.out
    assert "Accuracy on the test set" not in answer.out


@pytest.mark.parametrize(
    "layers, rows",
    [("all", ["conv1", "conv2", "conv3"]), ("first", ["conv1"]), ("conv[23]", ["conv2", "conv3"])],
)
def test_inspect_model_shows_what_would_be_locked(
    call: Call, layers: str, rows: Sequence[str]
) -> None:
    answer = call("inspect", "--model", "lenet", "--layers", layers, "--image-size", "16")
    assert answer.code == 0
    cells = [[cell.strip() for cell in line.split("│")] for line in answer.out.splitlines()]
    locked = [row[1] for row in cells if len(row) > 6 and row[6].startswith("locks")]
    assert locked == rows


def test_inspect_shows_modules_behind_which_a_lock_can_stand(call: Call) -> None:
    size = ("--image-size", "16", "--channels", "1")
    answer = call("inspect", "--model", "resnet20", "--defense", "pad", "--behind", "layer2", *size)
    assert answer.code == 0
    assert "pad, layers all, behind layer2: 7 site(s)." in answer.out
    cells = [[cell.strip() for cell in line.split("│")] for line in answer.out.splitlines()]
    locked = [row[1] for row in cells if len(row) > 6 and row[6].startswith("locks")]
    assert locked[-1] == "layer2"
    assert all(name.startswith("layer3.") for name in locked[:-1])
    (places,) = [line for line in answer.out.splitlines() if line.startswith("nothing goes around")]
    assert "conv1, bn1, layer1.0" in places
    assert "layer2.0.bn1" not in places
    refused = call("inspect", "--model", "resnet20", "--behind", "layer9", *size)
    assert refused.code == 2
    assert "unknown module 'layer9'. Did you mean" in refused.err


def test_demo_falls_back_resumes_and_reports(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fedkl.federation.session.load_data

    def missing(config: RunConfig) -> DataBundle:
        if config.data.dataset == "fashion-mnist":
            raise DataNotFoundError("data set 'fashion-mnist' not found: try another.")
        return real(config)

    monkeypatch.setattr(fedkl.federation.session, "load_data", missing)
    monkeypatch.setitem(demo_module.SMALL, "training.local_epochs", 1)
    monkeypatch.setattr(demo_module, "VICTIMS", 2)
    monkeypatch.setattr(arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=5))
    words = ["demo", "--rounds", "1", "--workers", "1", "--out", tmp_path / "demo"]
    answer = call(*words)
    assert answer.code == 0, answer.err
    assert "note: data set 'fashion-mnist' not found" in answer.err
    assert re.search(r"test set after 1 round\b", answer.out)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "1,797 digits" in page
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 'href="audit/report.html"' in page
    leaks = json.loads((tmp_path / "demo" / "audit" / "audit.json").read_text())
    attacked = {row["defense"] for row in leaks["rows"]}
    assert attacked == {"none", "norm", "fedbn", "channel", "pad"}
    for name, verdict in leaks["verdict"]["defenses"].items():
        assert f"{name}: {verdict['verdict']}" in answer.out
    assert set(leaks["verdict"]["defenses"]) == {"channel", "pad"}
    summaries = {}
    for name, arm in demo_module.DEMO_ARMS.items():
        assert name in page
        assert re.search(rf"│ {re.escape(name)} +│", answer.out)
        assert arm.meaning in answer.out
        summaries[name] = (tmp_path / "demo" / name / "summary.json").read_bytes()
    (tmp_path / "demo" / "fedavg" / "summary.json").unlink()
    answer = call(*words)
    assert answer.code == 0
    assert answer.err.count("done already") == len(demo_module.DEMO_ARMS) - 1
    assert "fedavg: note: resumed after round 1" in answer.err
    again = json.loads((tmp_path / "demo" / "fedavg" / "summary.json").read_text())
    assert again["accuracy"] == json.loads(summaries.pop("fedavg"))["accuracy"]
    for name, summary in summaries.items():
        assert (tmp_path / "demo" / name / "summary.json").read_bytes() == summary
    answer = call(*words, "--seed", "1")  # other settings, same folder
    assert answer.code == 2
    assert "seed: 0 → 1" in answer.err


@pytest.mark.parametrize("words", [[], ["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help_is_worth_reading(call: Call, words: Sequence[str]) -> None:
    answer = call(*words)
    assert answer.code == 0
    assert "Examples" in answer.out
    assert "fedkl" in answer.out
    assert answer.err == ""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from fedkl.cli import main; main(['train', '--help']); "
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--keep-momentum" in done.stdout


def test_version(call: Call) -> None:
    answer = call("--version")
    assert answer.code == 0
    assert re.fullmatch(r"fedkl \d\S+\n", answer.out)


def test_internal_error_shows_a_traceback_without_values(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        passphrase = "".join(["hun", "ter2"])
        raise RuntimeError(f"{len(passphrase)} went wrong")

    monkeypatch.setattr(fedkl.federation, "run", broken)
    answer = call("train", *SMALL, "--rounds", "1", "--out", tmp_path / "run")
    assert answer.code == 70
    assert "internal error: RuntimeError: 7 went wrong" in answer.err
    assert "Traceback" in answer.err
    assert "hunter2" not in answer.err


def test_message_does_not_obey_control_characters(call: Call, tmp_path: Path) -> None:
    answer = call("evaluate", f"{tmp_path}/\x1b[2Jgone\nagain")
    assert answer.code == 2
    assert "\x1b" not in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(("word", "code"), [("--version", 0), ("nonsense", 2)])
def test_as_a_module(word: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "fedkl", word], capture_output=True, text=True)
    assert done.returncode == code
    assert ("fedkl" in done.stdout) == (code == 0)
    assert "Traceback" not in done.stderr


SHORTCUT = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        y = self.conv(x)
        return self.fc((self.bn(y) + y).mean(dim=(2, 3)))

def factory(num_classes, channels, image_size):
    return Net()
"""


@pytest.mark.filterwarnings("always::fedkl.errors.ShortcutWarning")
def test_a_way_around_the_pad_is_told_in_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shortcut_net.py").write_text(SHORTCUT)
    monkeypatch.syspath_prepend(tmp_path)
    sizes = ["--channels", "1", "--image-size", "8", "--defense", "pad"]
    answer = call("inspect", "--model", "shortcut_net:factory", *sizes)
    assert answer.code == 0
    (line,) = [line for line in answer.err.splitlines() if "warning" in line.lower()]
    assert line.startswith("warning: something of the input passes the first lock, on bn, by")
