"""``fedkl certify``: its files, its table, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import Call

from fedkl.audit import AuditConfig
from fedkl.audit.certified import certify_victims
from fedkl.audit.victims import Victims, draw_victims
from fedkl.cli.certify import IDLE, START
from fedkl.cli.configure import build_config
from fedkl.federation.session import load_data

TINY = ("--dataset", "digits", "--image-size", "8", "--channels", "1")


def test_certificate_is_written_and_shown(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = call("certify", *TINY, "--defense", "pad", "--presentations", "1,4", "--out", out)
    assert answer.code == 0
    found = json.loads((out / "certificate.json").read_text())
    one, four = found["certificates"]
    assert (one["presentations"], one["directions"], one["of"]) == (1, 0, 64)
    assert (four["presentations"], four["of"]) == (4, 256)
    assert four["directions"] > 0
    assert found["cancellation"]["cut"] is True
    assert found["command"].startswith("fedkl certify --dataset digits")
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "1378 private numbers" in answer.out
    assert f"{four['bits']:.1f}" in answer.out
    assert "\nOf one presentation, by construction, the lock hides the image: " in answer.out
    assert "Of more presentations this says nothing." in answer.out
    assert "update 4/4" in answer.err


def test_a_pad_that_shares_statistics_is_not_said_to_hide(call: Call, tmp_path: Path) -> None:
    words = (*TINY, "--defense", "pad", "--share-statistics", "--out", tmp_path / "out")
    answer = call("certify", *words)
    assert answer.code == 0
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["cancellation"]["cut"] is False
    assert "the lock does NOT hide it: " in answer.out
    assert "nats" not in answer.out


def test_finished_run_is_certified_with_its_own_keys(
    call: Call, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = call("certify", "--run", finished, "--out", out)
    assert answer.code == 0
    found = json.loads((out / "certificate.json").read_text())
    assert (found["defense"], found["stage"]) == ("channel", "final")
    assert found["certificates"][0]["directions"] > 0.9 * found["certificates"][0]["known"]
    assert not (out / "client").exists()


def test_batches_are_counted_in_presentations(call: Call, tmp_path: Path) -> None:
    answer = call("certify", *TINY, "--batch-size", "2", "--out", tmp_path)
    assert answer.code == 0
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert [one["presentations"] for one in found["certificates"]] == [2]


def certificate(folder: Path, flags: dict[str, object]) -> object:
    own = {"data.dataset": "digits", "data.image_size": 8, "defense.name": "pad"}
    run = build_config(flags={**flags, **own}, base=START)
    audit = AuditConfig(run=run, defenses=("pad",), stage="initial", images=1)
    bundle = load_data(run)
    found = certify_victims(Victims(run, folder, bundle, audit), draw_victims(bundle, audit)[0])
    return found.to_dict()


def test_what_certify_has_no_flag_for_does_nothing(tmp_path: Path) -> None:
    changed: dict[str, dict[str, object]] = {
        "federation": {"clients": 7, "rounds": 50, "join_steps": 400, "settle_steps": 3},
        "training": {"lr": 1.0, "optimizer": "adam", "local_epochs": 9, "schedule": "cosine"},
        "data": {"augment": True, "partition": "dirichlet", "alpha": 9.0, "samples": 50},
        "renewal": {"budget": 3, "every": 2, "on_spent": "renew"},
        "evaluation": {"every": 1, "wrong_keys": 1, "images": 9, "calibration_images": 9},
    }
    flags = {
        f"{section}.{name}": v for section, them in changed.items() for name, v in them.items()
    }
    flags |= {"workers": 2, "checkpoint_every": 3}
    assert set(flags) <= set(IDLE)
    assert certificate(tmp_path, flags) == certificate(tmp_path, {})  # with one key


@pytest.mark.parametrize("flag", ["--lr", "--rounds", "--budget", "--workers", "--eval-every"])
def test_a_flag_that_would_do_nothing_is_none(call: Call, tmp_path: Path, flag: str) -> None:
    answer = call("certify", *TINY, flag, "2", "--out", tmp_path / "out")
    assert answer.code == 2
    assert f"No such option: {flag}" in answer.err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--presentations", "1,x"), "--presentations: expected integers"),
        (("--presentations", "0,1"), "no positive multiple"),
        (("--presentations", "3", "--batch-size", "2"), "no positive multiple of the batch size 2"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--tolerance", "0"), "tolerance must be"),
        (("--tolerance", "2"), "tolerance must be"),
        (("--presentations", "9999"), "takes 9999 test images"),
        (("--noise", "0"), "deviation of noise must be a positive number"),
        (("--defense", "pat"), "Did you mean"),
        (("--run", "/nowhere", "--seed", "1"), "holds no finished run"),
    ],
)
def test_refusals_say_what_to_do(
    call: Call, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    answer = call("certify", *TINY, *words, "--out", tmp_path / "out")
    assert answer.code == 2
    assert answer.err.count("\n") == 1 + answer.err.count("note:")
    assert message in answer.err
    assert not (tmp_path / "out").exists()
