"""``fedkl certify``: its files, its table, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import Call

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
    assert "the lock hides the image" in answer.out
    assert "update 4/4" in answer.err


def test_a_pad_that_shares_statistics_is_not_said_to_hide(call: Call, tmp_path: Path) -> None:
    words = (*TINY, "--defense", "pad", "--share-statistics", "--out", tmp_path / "out")
    answer = call("certify", *words)
    assert answer.code == 0
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["cancellation"]["cut"] is False
    assert "the lock does NOT hide it" in answer.out


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


@pytest.mark.parametrize(
    "words, message",
    [
        (("--presentations", "1,x"), "--presentations: expected integers"),
        (("--presentations", "0,1"), "no positive multiple"),
        (("--presentations", "3", "--batch-size", "2"), "no positive multiple of the batch size 2"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--tolerance", "0"), "tolerance must be"),
        (("--tolerance", "2"), "tolerance must be"),
        (("--presentations", "9999"), "take 9999 test images"),
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
