"""``fedkl audit`` and ``audit-update``: what they write, their exit codes, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cli_support import Call, snapshot
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fedkl.attacks import InvertingGradients
from fedkl.audit import EXIT_CODES, AuditConfig, arsenal
from fedkl.cli import main
from fedkl.errors import ConfigError
from fedkl.models import build
from fedkl.rng import derive

DIGITS = ["--dataset", "digits", "--image-size", "16", "--channels", "1", "--samples", "60"]
FEW = [
    "--rounds",
    "1",
    "--images",
    "2",
    "--candidates",
    "10",
    "--effort",
    "quick",
    "--attacks",
    "inverting-gradients",
]
AUDIT = ["audit", *DIGITS, *FEW, "--out", "{tmp}/new"]
UPDATE = [
    *("audit-update", "--model", "lenet", "--before", "{tmp}/before.safetensors"),
    *("--after", "{tmp}/after.safetensors", "--config", "{tmp}/steps.toml"),
    *("--effort", "quick", "--out", "{tmp}/new"),
]
STEPS = "num_classes = 4\nchannels = 1\nimage_size = 16\nbatch_size = 1\nlr = 0.1\n"


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=10))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An update, and one of everything that is wrong."""
    model = build("lenet", num_classes=4, channels=1, image_size=16, generator=derive(0, "m"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_file(before, tmp_path / "before.safetensors")
    x = torch.rand(1, 1, 16, 16, generator=derive(0, "x"))
    cross_entropy(model(x), torch.tensor([2])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = {n: t.detach().clone() for n, t in model.state_dict().items()}
    save_file(after, tmp_path / "after.safetensors")
    save_file({"images": x}, tmp_path / "truth.safetensors")
    save_file({"pictures": x}, tmp_path / "no-images.safetensors")
    save_file({"images": x[..., :8].clone()}, tmp_path / "small.safetensors")
    save_file({n: t for n, t in after.items() if n != "fc.bias"}, tmp_path / "less.safetensors")
    save_file({**after, "extra": x}, tmp_path / "more.safetensors")
    save_file({**after, "fc.bias": torch.zeros(5)}, tmp_path / "shape.safetensors")
    save_file({**after, "fc.bias": torch.full((4,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "after.safetensors").read_bytes()[:99])
    (tmp_path / "steps.toml").write_text(STEPS)
    (tmp_path / "typo.toml").write_text(STEPS + "batch_sice = 1\n")
    (tmp_path / "type.toml").write_text(STEPS.replace("= 0.1", '= "fast"'))
    (tmp_path / "zero.toml").write_text(STEPS.replace("batch_size = 1", "batch_size = 0"))
    (tmp_path / "labels.toml").write_text(STEPS + "labels = [1, 2]\n")
    (tmp_path / "class.toml").write_text(STEPS + "labels = [4]\n")
    (tmp_path / "momentum.toml").write_text(STEPS + "momentum = -0.5\n")
    save_file({"images": 255 * x}, tmp_path / "bright.safetensors")
    save_file({"images": x.repeat(2, 1, 1, 1)}, tmp_path / "two.safetensors")
    (tmp_path / "rate.toml").write_text(STEPS.replace("lr = 0.1", "local_steps = 2"))
    (tmp_path / "broken.toml").write_text("lr = ")
    (tmp_path / "nothing.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"scheme": "channel"}')
    (tmp_path / "file").write_text("I am a file")
    (tmp_path / "empty").mkdir()
    return tmp_path


def with_(words: Sequence[str], *changes: str) -> list[str]:
    """``words`` with the values of flags replaced, or flags added."""
    found = list(words)
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        if flag in found:
            found[found.index(flag) + 1] = value
        else:
            found += [flag, value]
    return found


BAD: list[tuple[str, Sequence[str], Sequence[str]]] = [
    ("attack", with_(AUDIT, "--attacks", "invertig-gradients"), ["'inverting-gradients'"]),
    ("no attack", with_(AUDIT, "--attacks", ","), ["no attack"]),
    ("threat", with_(AUDIT, "--threats", "adaptve"), ["'adaptve'", "'adaptive'"]),
    ("defense", with_(AUDIT, "--defenses", "chanel"), ["'chanel'", "'channel'"]),
    ("stage", with_(AUDIT, "--stage", "finale"), ["'finale'", "'final'"]),
    ("effort", with_(AUDIT, "--effort", "fast"), ["'fast'", "standard"]),
    ("zero images", with_(AUDIT, "--images", "0"), ["images must be at least 1"]),
    ("zero batch", with_(AUDIT, "--batch-size", "0"), ["batch_size must be at least 1"]),
    ("zero steps", with_(AUDIT, "--local-steps", "0"), ["local_steps must be at least 1"]),
    ("zero observations", with_(AUDIT, "--observations", "0"), ["observations", "at least 1"]),
    ("too many candidates", with_(AUDIT, "--candidates", "100"), ["99 or more", "fewer"]),
    ("zero seeds", with_(AUDIT, "--seeds", "0"), ["seeds must be at least 1"]),
    ("no number", with_(AUDIT, "--images", "many"), ["--images", "integer"]),
    ("model", with_(AUDIT, "--model", "lenett"), ["'lenett'", "'lenet'"]),
    ("data set", with_(AUDIT, "--dataset", "digit"), ["'digit'", "'digits'"]),
    ("run is nowhere", ["audit", "--run", "{tmp}/nowhere", "--out", "{tmp}/new"], ["no finished"]),
    ("run is empty", ["audit", "--run", "{tmp}/empty", "--out", "{tmp}/new"], ["summary.json"]),
    ("out is a file", with_(AUDIT, "--out", "{tmp}/file"), ["not a folder"]),
    ("no such flag", [*AUDIT, "--atacks", "dlg"], ["--atacks"]),
    ("two of one", with_(UPDATE, "--attacks", ""), ["no attack"]),
    ("update: attack", with_(UPDATE, "--attacks", "dgl"), ["'dgl'", "'dlg'"]),
    ("update: needs more", with_(UPDATE, "--attacks", "ggl"), ["generator"]),
    ("update: model", with_(UPDATE, "--model", "resnet20"), ["does not fit", "missing"]),
    ("update: unknown model", with_(UPDATE, "--model", "lenett"), ["'lenet'"]),
    ("update: no file", with_(UPDATE, "--after", "{tmp}/none"), ["none", "safetensors"]),
    ("update: cut", with_(UPDATE, "--after", "{tmp}/cut.safetensors"), ["cut.safetensors"]),
    ("update: missing", with_(UPDATE, "--after", "{tmp}/less.safetensors"), ["missing fc.bias"]),
    ("update: extra", with_(UPDATE, "--after", "{tmp}/more.safetensors"), ["unexpected extra"]),
    ("update: shape", with_(UPDATE, "--after", "{tmp}/shape.safetensors"), ["fc.bias has shape"]),
    ("update: nan", with_(UPDATE, "--after", "{tmp}/nan.safetensors"), ["NaN", "fc.bias"]),
    ("update: no change", with_(UPDATE, "--after", "{tmp}/before.safetensors"), ["equal"]),
    ("update: no steps", with_(UPDATE, "--config", "{tmp}/none.toml"), ["check --config"]),
    ("update: no TOML", with_(UPDATE, "--config", "{tmp}/broken.toml"), ["not a TOML file"]),
    ("update: typo", with_(UPDATE, "--config", "{tmp}/typo.toml"), ["'batch_sice'", "batch_size"]),
    ("update: type", with_(UPDATE, "--config", "{tmp}/type.toml"), ["expected float", "'fast'"]),
    ("update: zero", with_(UPDATE, "--config", "{tmp}/zero.toml"), ["batch_size", "at least 1"]),
    ("update: labels", with_(UPDATE, "--config", "{tmp}/labels.toml"), ["2 labels", "1 images"]),
    ("update: class", with_(UPDATE, "--config", "{tmp}/class.toml"), ["labels [4]", "0 … 3"]),
    ("update: momentum", with_(UPDATE, "--config", "{tmp}/momentum.toml"), ["momentum must be 0"]),
    ("update: bright", with_(UPDATE, "--truth", "{tmp}/bright.safetensors"), ["expected [0, 1]"]),
    ("update: two truths", with_(UPDATE, "--truth", "{tmp}/two.safetensors"), ["(2, 1, 16, 16)"]),
    ("update: rate", with_(UPDATE, "--config", "{tmp}/rate.toml"), ["lr is needed"]),
    ("update: no spec", with_(UPDATE, "--spec", "{tmp}/none.json"), ["none.json"]),
    ("update: empty spec", with_(UPDATE, "--spec", "{tmp}/nothing.json"), ["lock spec"]),
    ("update: odd spec", with_(UPDATE, "--spec", "{tmp}/odd.json"), ["lock spec"]),
    ("update: truth", with_(UPDATE, "--truth", "{tmp}/no-images.safetensors"), ["'images'"]),
    ("update: small", with_(UPDATE, "--truth", "{tmp}/small.safetensors"), ["true images"]),
    ("update: into a file", with_(UPDATE, "--out", "{tmp}/file"), ["not a folder"]),
]  # fmt: skip


@pytest.mark.parametrize("words, fragments", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(call: Call, place: Path, words: Sequence[str], fragments: Sequence[str]) -> None:
    before = snapshot(place)
    answer = call(*(word.replace("{tmp}", str(place)) for word in words))
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err
    for fragment in fragments:
        assert fragment in answer.err
    assert snapshot(place) == before


def test_the_table_is_long_enough() -> None:
    assert len({row[0] for row in BAD}) == len(BAD) >= 30


@pytest.fixture(scope="module")
def _audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=10))
        words = [word.replace("{tmp}", str(folder)) for word in AUDIT]
        words = with_(words, "--defenses", "norm", "--out", str(folder / "a"))
        assert main(words) in EXIT_CODES.values()
    return folder / "a"


@pytest.fixture
def audited(_audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_audited, tmp_path / "a"))


def test_audit_writes_what_it_promises(audited: Path) -> None:
    result = json.loads((audited / "audit.json").read_text())
    assert {"config", "controls", "rows", "summary", "verdict", "command"} <= set(result)
    assert result["command"].startswith("fedkl audit --dataset digits")
    assert {row["defense"] for row in result["rows"]} == {"none", "norm", "fedbn"}
    page = (audited / "report.html").read_text()
    assert result["verdict"]["overall"] in page


def spoil_cell(folder: Path) -> None:
    path = min((folder / "cells").iterdir())
    path.write_text("{")


def spoil_config(folder: Path) -> None:
    (folder / "audit-config.json").write_text("{")


def other_config(folder: Path) -> None:
    path = folder / "audit-config.json"
    path.write_text(path.read_text().replace('"images": 2', '"images": 3'))


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(
    "damage, resume, fragment",
    [
        (spoil_config, True, "audit-config.json"),
        (other_config, True, "other settings"),
        (other_config, False, "--resume"),
    ],
)
def test_damaged_audit(
    call: Call, audited: Path, damage: Callable[[Path], None], resume: bool, fragment: str
) -> None:
    damage(audited)
    before = snapshot(audited)
    words = with_(AUDIT, "--out", str(audited), "--defenses", "norm")
    answer = call(*words, *(["--resume"] if resume else []))
    assert answer.code == 2
    assert fragment in answer.err
    assert "Traceback" not in answer.err
    assert snapshot(audited) == before


@pytest.mark.usefixtures("_short")
def test_damaged_cell_is_mended(call: Call, audited: Path) -> None:
    before = (audited / "audit.json").read_text()
    spoil_cell(audited)
    answer = call(*with_(AUDIT, "--out", str(audited), "--defenses", "norm"), "--resume")
    assert answer.code in EXIT_CODES.values()
    assert "damaged" in answer.err
    after = json.loads((audited / "audit.json").read_text())
    assert after["rows"] == json.loads(before)["rows"]


@pytest.mark.usefixtures("_short")
def test_interruption_says_how_to_go_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InvertingGradients, "reconstruct", interrupt)
    answer = call(*with_(AUDIT, "--out", str(tmp_path / "a")))
    assert answer.code == 130
    assert "--resume" in answer.err
    assert "Traceback" not in answer.err


def test_update_gives_the_image_away(call: Call, place: Path) -> None:
    words = [word.replace("{tmp}", str(place)) for word in UPDATE]
    answer = call(*words, "--truth", str(place / "truth.safetensors"), "--attacks", "idlg")
    assert answer.code == 0, answer.err
    found = json.loads((place / "new" / "update.json").read_text())
    (attack,) = found["attacks"]
    assert attack["labels"] == [2]
    assert attack["loss"] is not None
    assert (place / "new" / attack["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    assert len(attack["ssim"]) == 1
    answer = call(*with_(words, "--out", str(place / "again"), "--attacks", "idlg"))
    assert "Without --truth" in answer.out
    assert load_file(place / "truth.safetensors")["images"].shape == (1, 1, 16, 16)


def test_update_of_a_locked_run(call: Call, finished: Path, tmp_path: Path) -> None:
    """What a server keeps of a locked client: shared tensors alone, the lock an unknown."""
    first, last = sorted((finished / "checkpoints").glob("round-*.safetensors"))[-2:]
    for name, path in (("before", first), ("after", last)):
        tensors = load_file(path)
        shared = {n[7:]: t for n, t in tensors.items() if n.startswith("shared/")}
        save_file(shared, tmp_path / f"{name}.safetensors")
    (tmp_path / "steps.toml").write_text("image_size = 16\nlr = 0.05\nlabels = [3]\n")
    words = [word.replace("{tmp}", str(tmp_path)) for word in UPDATE]
    answer = call(*words, "--spec", str(finished / "summary.json"))
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "new" / "update.json").read_text())
    assert "inverting-gradients+affine" in str(found["attacks"][0]["notes"])


@pytest.mark.usefixtures("_short")
def test_resumed_audit_has_the_same_json(call: Call, audited: Path) -> None:
    before = json.loads((audited / "audit.json").read_text())
    (audited / "audit.json").unlink()
    min((audited / "cells").iterdir()).unlink()
    words = [*before["command"].split()[1:], "--resume"]
    assert call(*words[:-1], "--out", str(audited), "--resume").code in EXIT_CODES.values()
    after = json.loads((audited / "audit.json").read_text())
    assert "--resume" not in after["command"]
    del before["command"], after["command"]  # of another --out: the fixture's copy
    assert after == before


def test_flags_reach_the_audit(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is not handed on would be a silent nothing."""
    seen: list[AuditConfig] = []

    def look(config: AuditConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("fedkl.audit.run_audit", look)
    words = [word.replace("{tmp}", str(tmp_path)) for word in AUDIT]
    flags = ["--certificate", "--aggregated", "2", "--batch-size", "3", "--local-steps", "4"]
    call(*words, *flags, "--observations", "5", "--seeds", "6", "--stage", "mid")
    (config,) = seen
    assert config.certificate
    assert (config.aggregated, config.batch_size, config.local_steps) == (2, 3, 4)
    assert (config.observations, config.seeds, config.stage) == (5, 6, "mid")
    assert (config.images, config.candidates, config.effort) == (2, 10, "quick")


def test_run_and_settings_that_contradict_it(call: Call, finished: Path, tmp_path: Path) -> None:
    words = ["audit", "--run", str(finished), "--out", str(tmp_path / "new")]
    (tmp_path / "a.toml").write_text("[federation]\nrounds = 2\n")
    answer = call(*words, "--config", str(tmp_path / "a.toml"))
    assert (answer.code, "leave --config out" in answer.err) == (2, True)
    answer = call(*words, "--defenses", "norm,pad")
    assert (answer.code, "names pad" in answer.err) == (2, True)
    assert not (tmp_path / "new").exists()
