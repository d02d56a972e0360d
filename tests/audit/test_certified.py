"""Certificates of what a federation's clients send, and their entry in an audit's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from audithelp import small_audit

from fedkl.audit import certified, grid, run_audit
from fedkl.audit.certified import certify_victims
from fedkl.audit.victims import Victims, draw_victims
from fedkl.errors import AttackError
from fedkl.federation import config_from
from fedkl.federation.session import load_data
from fedkl.report import spectrum_plot

RUN = config_from(
    {
        "data": {"dataset": "digits", "image_size": 8, "channels": 1, "samples": 60},
        "federation": {"rounds": 1, "clients": 2, "join_steps": 1},
    }
)
BUNDLE = load_data(RUN)


def victims(folder: Path, defense: str, **settings: int) -> tuple[Victims, torch.Tensor]:
    audit = small_audit(run=RUN, stage="initial", **settings)
    return Victims(audit.defended(defense, 0), folder, BUNDLE, audit), draw_victims(BUNDLE, audit)


@pytest.mark.parametrize("defense", ["none", "norm", "fedbn", "channel"])
def test_nothing_per_channel_hides_more_than_a_few_directions(tmp_path: Path, defense: str) -> None:
    client, rows = victims(tmp_path, defense)
    (found,) = certify_victims(client, rows[0]).certificates
    assert found.of == 64
    # A batch norm takes two numbers a channel away, and batches of one image leave dark corners.
    assert found.known - 3 <= found.directions <= found.known
    assert found.directions >= 60
    assert found.bits > 0.85 * found.bits_known


def test_a_pad_hides_a_few_presentations_and_not_many(tmp_path: Path) -> None:
    client, rows = victims(tmp_path, "pad", observations=5)
    found = certify_victims(client, rows[0], updates=(1, 2, 5))
    one, two, five = found.certificates
    assert (one.directions, two.directions) == (0, 0)
    assert one.known >= 60
    assert five.directions > 0.4 * five.known
    assert one.bits < 0.15 * one.bits_known
    assert five.bits / five.bits_known > 2 * one.bits / one.bits_known
    assert found.cancellation is not None
    assert found.cancellation.cut
    assert spectrum_plot(found.to_dict(), title="pad").startswith(b"\x89PNG")


def test_a_pad_too_large_for_a_matrix_is_checked_by_construction(tmp_path: Path) -> None:
    client, rows = victims(tmp_path, "pad")
    found = certify_victims(client, rows[0], largest=100)
    assert found.certificates == ()
    assert "1378 private numbers" in found.note
    assert found.cancellation is not None
    assert found.cancellation.cut
    (line,) = found.rows()
    assert line["directions"] is None
    assert line["first_lock_hides_one_image"] is True


def test_a_batch_is_one_update(tmp_path: Path) -> None:
    client, rows = victims(tmp_path, "pad", batch_size=2)
    found = certify_victims(client, rows[0])
    assert found.cancellation is None  # one shift for two images
    assert found.certificates[0].presentations == 2
    assert found.certificates[0].of == 128


@pytest.fixture
def unattacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit whose attacks are left out."""
    nothing = {"attack": "", "notes": [], "rows": [], "pictures": [], "skipped": "not now"}
    nothing["left_out"] = []
    monkeypatch.setattr(grid, "attacked", lambda *_: nothing)


@pytest.mark.usefixtures("unattacked")
def test_audit_has_a_line_per_defense_and_resumes(tmp_path: Path) -> None:
    audit = small_audit(
        run=RUN, stage="initial", images=1, defenses=("channel", "pad"), certificate=True
    )
    first = run_audit(audit, tmp_path)
    found = json.loads((tmp_path / "audit.json").read_text())["certificate"]
    assert found == first["certificate"]
    lines = {line["defense"]: line for line in found["defenses"]}
    assert list(lines) == ["none", "norm", "fedbn", "channel", "pad"]
    assert lines["channel"]["directions"] >= 60
    assert lines["pad"]["directions"] == 0
    assert lines["pad"]["first_lock_hides_one_image"] is True
    again = run_audit(audit, tmp_path, resume=True)
    assert again["certificate"] == found


@pytest.mark.usefixtures("unattacked")
def test_audit_without_is_as_before(tmp_path: Path) -> None:
    audit = small_audit(run=RUN, stage="initial", images=1)
    assert run_audit(audit, tmp_path)["certificate"] is None


@pytest.mark.usefixtures("unattacked")
def test_an_image_without_a_gradient_does_not_end_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AttackError("nothing to be seen")

    monkeypatch.setattr(certified, "certify", refuse)
    audit = small_audit(run=RUN, stage="initial", images=1, certificate=True)
    lines = run_audit(audit, tmp_path)["certificate"]["defenses"]
    assert [line["directions"] for line in lines] == [None] * 4


@pytest.mark.usefixtures("unattacked")
def test_what_the_attacks_found_outlives_a_certificate_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    audit = small_audit(run=RUN, stage="initial", images=1, certificate=True)
    with monkeypatch.context() as patched:
        patched.setattr(grid, "certify_audit", fail)
        with pytest.raises(MemoryError):
            run_audit(audit, tmp_path)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["certificate"] is None
    assert found["skipped"]
    assert run_audit(audit, tmp_path, resume=True)["certificate"] is not None


def test_noised_updates_have_no_certificate_and_pruned_ones_do(tmp_path: Path) -> None:
    client, rows = victims(tmp_path / "noise", "norm+noise")
    with pytest.raises(AttackError, match=r"noised by 0\.0025; a certificate .* without noise"):
        certify_victims(client, rows[0])
    client, rows = victims(tmp_path / "prune", "norm+prune")
    (found,) = certify_victims(client, rows[0]).certificates
    assert found.directions > 0.9 * found.of
