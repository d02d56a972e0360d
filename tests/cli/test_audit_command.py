"""``fedkl audit`` and ``audit-update``: what they write, their exit codes, and bad input."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_support import Call, snapshot, with_
from safetensors.torch import load_file, save_file
from update_files import write_update_files

from fedkl.attacks import (
    IDLG,
    NEED_MANY,
    InvertingGradients,
    Peel,
    Resources,
)
from fedkl.audit import EXIT_CODES, AuditConfig, arsenal, update
from fedkl.cli import main
from fedkl.errors import ConfigError

DIGITS = ["--dataset", "digits", "--image-size", "16", "--channels", "1", "--samples", "60"]
FEW = [
    *("--rounds", "1", "--images", "2", "--candidates", "10", "--effort", "quick"),
    *("--attacks", "inverting-gradients"),
]
AUDIT = ["audit", *DIGITS, *FEW, "--out", "{tmp}/new"]
UPDATE = [
    *("audit-update", "--model", "lenet", "--before", "{tmp}/before.safetensors"),
    *("--after", "{tmp}/after.safetensors", "--config", "{tmp}/steps.toml"),
    *("--effort", "quick", "--out", "{tmp}/new"),
]
TEN = [
    *("audit-update", "--model", "lenet", "--before", "{tmp}/before10.safetensors"),
    *("--after", "{tmp}/after10.safetensors", "--config", "{tmp}/ten.toml"),
    *("--effort", "quick", "--public", "digits", "--out", "{tmp}/new"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An update, and one of everything that is wrong."""
    return write_update_files(tmp_path)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arsenal, "make_attack", lambda *_, **__: InvertingGradients(iterations=10))


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
    ("too many candidates", with_(AUDIT, "--candidates", "100"),
     ["found among 100 of its class", "give --candidates 36 or fewer"]),
    ("too many images", with_(AUDIT, "--images", "100000"),
     ["100000 victims", "digits has", "--images 359 or fewer"]),
    ("zero seeds", with_(AUDIT, "--seeds", "0"), ["seeds must be at least 1"]),
    ("certificate of several", [*with_(AUDIT, "--aggregated", "2"), "--certificate"],
     ["one client's update", "aggregated is 2"]),
    ("more aggregated than there are", with_(AUDIT, "--aggregated", "7"), ["aggregated is 7"]),
    ("no number", with_(AUDIT, "--images", "many"), ["--images", "integer"]),
    ("model", with_(AUDIT, "--model", "lenett"), ["'lenett'", "'lenet'"]),
    ("data set", with_(AUDIT, "--dataset", "digit"), ["'digit'", "'digits'"]),
    ("run is nowhere", ["audit", "--run", "{tmp}/nowhere", "--out", "{tmp}/new"], ["no finished"]),
    ("run is empty", ["audit", "--run", "{tmp}/empty", "--out", "{tmp}/new"], ["summary.json"]),
    ("out is a file", with_(AUDIT, "--out", "{tmp}/file"), ["not a folder"]),
    ("no such flag", [*AUDIT, "--atacks", "dlg"], ["--atacks"]),
    ("two of one", with_(UPDATE, "--attacks", ""), ["no attack"]),
    ("update: attack", with_(UPDATE, "--attacks", "dgl"), ["'dgl'", "'dlg'"]),
    ("update: needs more", with_(UPDATE, "--attacks", "ggl,idlg,shadow"),
     ["ggl, shadow: these learn", "--public"]),
    ("update: needs many", with_(TEN, "--attacks", "shadow-label"), ["shadow-label", "20 or more"]),
    ("update: public", with_(UPDATE, "--public", "digit"), ["'digits'"]),
    ("update: other classes", with_(UPDATE, "--public", "digits"), ["10 classes, the model 4"]),
    ("update: public nowhere", with_(UPDATE, "--public", "mnist", "--data-root", "{tmp}/empty"),
     ["empty", "mnist"]),
    ("update: root of nothing", with_(UPDATE, "--data-root", "{tmp}"), ["--public", "nothing"]),
    ("update: none works", with_(UPDATE, "--attacks", "closed-form"),
     ["no attack could", "Conv2d"]),
    ("update: model", with_(UPDATE, "--model", "resnet20"),
     ["does not fit", "missing", "its own lock spec"]),
    ("update: unknown model", with_(UPDATE, "--model", "lenett"), ["'lenet'"]),
    ("update: no file", with_(UPDATE, "--after", "{tmp}/none"),
     ["none is not there", "safetensors"]),
    ("update: cut", with_(UPDATE, "--after", "{tmp}/cut.safetensors"), ["cut.safetensors"]),
    ("update: missing", with_(UPDATE, "--after", "{tmp}/less.safetensors"), ["missing fc.bias"]),
    ("update: extra", with_(UPDATE, "--after", "{tmp}/more.safetensors"), ["unexpected extra"]),
    ("update: shape", with_(UPDATE, "--after", "{tmp}/shape.safetensors"), ["fc.bias has shape"]),
    ("update: half precision", with_(UPDATE, "--after", "{tmp}/half.safetensors"),
     ["float16, expected torch.float32", "Cast them before you save them"]),
    ("update: nan", with_(UPDATE, "--after", "{tmp}/nan.safetensors"), ["NaN", "fc.bias"]),
    ("update: no change", with_(UPDATE, "--after", "{tmp}/before.safetensors"), ["equal"]),
    ("update: no steps", with_(UPDATE, "--config", "{tmp}/none.toml"), ["check --config"]),
    ("update: no TOML", with_(UPDATE, "--config", "{tmp}/broken.toml"), ["not a TOML file"]),
    ("update: typo", with_(UPDATE, "--config", "{tmp}/typo.toml"), ["'batch_sice'", "batch_size"]),
    ("update: type", with_(UPDATE, "--config", "{tmp}/type.toml"), ["expected float", "'fast'"]),
    ("update: zero", with_(UPDATE, "--config", "{tmp}/zero.toml"), ["batch_size", "at least 1"]),
    ("update: labels", with_(UPDATE, "--config", "{tmp}/labels.toml"),
     ["2 labels", "1 image behind"]),
    ("update: class", with_(UPDATE, "--config", "{tmp}/class.toml"), ["labels [4]", "0 … 3"]),
    ("update: huge rate", with_(UPDATE, "--config", "{tmp}/huge.toml"),
     ["lr must be a number of at"]),
    ("update: tiny rate", with_(UPDATE, "--config", "{tmp}/tiny.toml"),
     ["lr is 1e-300, and the change of conv1.weight divided by it", "give the learning rate"]),
    ("update: tiny rate of steps", with_(UPDATE, "--config", "{tmp}/tiny2.toml"),
     ["lr is 1e-300", "give the learning rate"]),
    ("update: rate of zero", with_(UPDATE, "--config", "{tmp}/still.toml"),
     ["lr must be a positive number, got 0.0", "or leave lr out"]),
    ("update: momentum", with_(UPDATE, "--config", "{tmp}/momentum.toml"), ["momentum must be 0"]),
    ("update: nesterov", with_(UPDATE, "--config", "{tmp}/nesterov.toml"),
     ["nesterov needs a momentum above 0", "nesterov = false"]),
    ("update: bright", with_(UPDATE, "--truth", "{tmp}/bright.safetensors"), ["expected [0, 1]"]),
    ("update: two truths", with_(UPDATE, "--truth", "{tmp}/two.safetensors"), ["(2, 1, 16, 16)"]),
    ("update: no rate", with_(UPDATE, "--config", "{tmp}/rate.toml"), ["lr is needed"]),
    ("update: no spec", with_(UPDATE, "--spec", "{tmp}/none.json"), ["none.json"]),
    ("update: empty spec", with_(UPDATE, "--spec", "{tmp}/nothing.json"), ["lock spec"]),
    ("update: odd spec", with_(UPDATE, "--spec", "{tmp}/odd.json"), ["lock spec"]),
    ("update: truth", with_(UPDATE, "--truth", "{tmp}/no-images.safetensors"), ["'images'"]),
    ("update: small", with_(UPDATE, "--truth", "{tmp}/small.safetensors"), ["true images"]),
    ("update: into a run", with_(UPDATE, "--out", "{tmp}/a-run"), ["holds a run", "another --out"]),
    ("update: into an audit", with_(UPDATE, "--out", "{tmp}/an-audit"), ["holds an audit"]),
    ("update: into another", with_(UPDATE, "--out", "{tmp}/an-update"), ["update.json", "--out"]),
    ("update: gradient of steps",
     [*with_(UPDATE, "--config", "{tmp}/seven.toml"), "--gradient"],
     ["a gradient is of one step", "local_steps = 7", "momentum = 0.9"]),
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


def test_missing_cma_is_told_before_a_generator_is_trained(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    words = with_(TEN, "--attacks", "ggl,idlg", "--effort", "paper")
    answer = call(*(word.replace("{tmp}", str(place)) for word in words))
    assert (answer.code, "pip install 'fedkl[audit]'" in answer.err) == (2, True), answer
    assert not (place / "new").exists()


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
    assert "No verdict: " in answer.out
    assert attack["loss"] is not None
    assert (place / "new" / attack["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    assert len(attack["ssim"]) == 1
    answer = call(*with_(words, "--out", str(place / "again"), "--attacks", "idlg"))
    assert "Without --truth" in answer.out
    assert load_file(place / "truth.safetensors")["images"].shape == (1, 1, 16, 16)


@pytest.mark.parametrize("public", [True, False])
def test_all_are_the_attacks_that_can_be_mounted(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    mounted: list[str] = []

    def none(_: object, attacks: Mapping[str, Any], *__: Any, **___: Any) -> dict[str, Any]:
        mounted.extend(attacks)
        return {"attacks": [], "failed": [], "measured": True}

    monkeypatch.setattr(update, "audit_update", none)
    words = [word.replace("{tmp}", str(place)) for word in (TEN if public else UPDATE)]
    assert call(*words, "--attacks", "all").code == 0
    assert {"idlg", "peel"} <= set(mounted)
    assert ("shadow" in mounted) is ("ggl" in mounted) is public
    assert not set(mounted) & set(NEED_MANY)


@pytest.fixture
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks of the audit, with next to no effort."""
    real = arsenal.make_attack

    def little(name: str, effort: str, **given: Any) -> Any:
        if name == "idlg":
            return IDLG(iterations=5)
        if name == "shadow":
            return Resources(public=given["public"]).shadow(100, epochs=1, hidden=0)
        return real(name, effort, **given)

    monkeypatch.setattr(arsenal, "make_attack", little)


@pytest.mark.usefixtures("_little")
def test_finished_attacks_stay_when_a_later_one_fails(call: Call, place: Path) -> None:
    words = [word.replace("{tmp}", str(place)) for word in TEN]
    answer = call(*words, "--attacks", "idlg,closed-form,shadow")
    assert answer.code == 0, answer.err
    found = json.loads((place / "new" / "update.json").read_text())
    assert [one["attack"] for one in found["attacks"]] == ["idlg", "shadow"]
    (failed,) = found["failed"]
    assert failed["attack"] == "closed-form"
    assert "Conv2d" in failed["reason"]
    assert "left out: closed-form: the first layer" in answer.out
    assert [one["labels"] for one in found["attacks"]] == [[2], [2]]
    for one in found["attacks"]:
        assert (place / "new" / one["pictures"][0]).is_file()


@pytest.mark.usefixtures("_little")
def test_what_is_finished_is_on_disk_before_the_next_begins(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Peel, "reconstruct", interrupt)
    words = [word.replace("{tmp}", str(place)) for word in TEN]
    assert call(*words, "--attacks", "idlg,peel").code == 130
    found = json.loads((place / "new" / "update.json").read_text())
    assert [one["attack"] for one in found["attacks"]] == ["idlg"]


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
    words = with_(before["command"].split()[1:], "--out", str(audited))
    assert call(*words, "--resume").code in EXIT_CODES.values()
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
    flags = ["--iterations", "7", "--parallel", "8"]
    flags += ["--aggregated", "2", "--batch-size", "3", "--local-steps", "4"]
    call(*words, *flags, "--observations", "5", "--seeds", "6", "--stage", "mid")
    call(*words, "--certificate")  # not of an aggregate
    config, other = seen
    assert (config.certificate, other.certificate) == (False, True)
    assert (config.aggregated, config.batch_size, config.local_steps) == (2, 3, 4)
    assert (config.iterations, config.parallel) == (7, 8)
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
