"""What the tests of the command line share: calling it, and one small finished run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_support import EXAMINED, SMALL, Answer, Call

from fedkl.cli import main


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.delenv("FEDKL_PASSPHRASE", raising=False)

    def caller(*words: object) -> Answer:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Answer(code, *capfd.readouterr())

    return caller


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["train", *SMALL, *EXAMINED, "--method", "fedkl", "--defense", "channel"]
    words += ["--rounds", "2"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of two rounds, fedavg with the channel lock."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))
