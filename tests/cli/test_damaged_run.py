"""Acceptance 4 for runs that have lost or changed a part: one line, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli_support import SMALL, Call, extended, refused

from fedkl.key import Key

TRAIN = ["train", *SMALL, "--rounds", "1", "--out", "{tmp}/new"]
CHANNEL = ["--defense", "channel"]
RESUME = ["train", "--out", "{tmp}/run", "--resume"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def cut_all(run: Path) -> None:
    for path in (run / "checkpoints").glob("round-*.safetensors"):
        cut(path)


def spoil_key(run: Path) -> None:
    cut(run / "keys" / "client-00001.key")


def lose_key(run: Path) -> None:
    (run / "keys" / "client-00001.key").unlink()


def open_key(run: Path) -> None:
    (run / "keys" / "client-00001.key").chmod(0o644)


def lock_key(run: Path) -> None:
    Key.generate().save(run / "keys" / "client-00001.key", passphrase="x", overwrite=True)


def never_validated(run: Path) -> None:
    (run / "checkpoints" / "best.safetensors").unlink()
    path = run / "config.json"
    path.write_text(path.read_text().replace('"every": 1', '"every": 0'))


def other_key(run: Path) -> None:
    shutil.copy(run / "keys" / "client-00001.key", run / "keys" / "client-00000.key")


def new_group(run: Path) -> None:
    Key.generate().save(run / "keys" / "group.key", overwrite=True)


def lose_clients(run: Path) -> None:
    shutil.rmtree(run / "clients")


def lose_client(run: Path) -> None:
    shutil.rmtree(run / "clients" / "00002")


def lose_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def lose_most(run: Path) -> None:
    """As a run looks that was killed in its second round, without its checkpoints."""
    lose_checkpoints(run)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()


def lose_config(run: Path) -> None:
    (run / "config.json").unlink()


def begin(run: Path) -> None:
    """As a run looks that was killed in its first round."""
    lose_most(run)
    lose_clients(run)


def short_key_only(run: Path) -> None:
    begin(run)
    lose_config(run)
    short_key(run)


def spoil_summary(run: Path) -> None:
    (run / "summary.json").write_text("[]")


def spoil_figures(run: Path) -> None:
    path = run / "summary.json"
    path.write_text(path.read_text().replace('"own_key": 0', '"own_key": "high", "x": 0'))


def spoil_settings(run: Path) -> None:
    (run / "config.json").write_text("[]")


def settings_are(text: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / "config.json").write_text(text)

    return damage


def short_key(run: Path) -> None:
    Key.from_vector([1.0] * 10).save(run / "keys" / "client-00001.key", overwrite=True)


def spoil_config(run: Path) -> None:
    cut(run / "config.json")


def edit_config(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"lr"', '"lrr"'))


def no_checkpoint(run: Path) -> None:
    for path in (run / "checkpoints").glob("round-*"):
        path.unlink()


def extend(run: Path) -> None:
    """As a run looks that was to go on to round 4 and was killed before round 3 ended."""
    path = run / "config.json"
    path.write_text(path.read_text().replace('"rounds": 2', '"rounds": 4'))


def extend_and_play(run: Path) -> None:
    extended(run, rounds=4, stop=3)


def lose_newest(run: Path) -> None:
    cut(run / "checkpoints" / "round-000002.safetensors")


def nothing(run: Path) -> None:
    pass


EVALUATE = ["evaluate", "{tmp}/run"]
INSPECT = ["inspect", "{tmp}/run"]
AUDIT = ["audit", "--candidates", "10", "--run", "{tmp}/run", "--out", "{tmp}/new"]
CERTIFY = ["certify", "--run", "{tmp}/run", "--out", "{tmp}/new"]
DAMAGED: list[tuple[str, Callable[[Path], None], Sequence[str], Sequence[str]]] = [
    ("another run", nothing, [*TRAIN[:-1], "{tmp}/run"], ["already holds a run", "--resume"]),
    ("other settings", nothing, [*RESUME, "--lr", "0.9"], ["training.lr", "0.9"]),
    ("all checkpoints cut", cut_all, [*RESUME, "--rounds", "3"], ["checkpoint", "can be used"]),
    ("fewer rounds than done", nothing, [*RESUME, "--rounds", "1"], ["2 rounds already"]),
    ("config cut", spoil_config, RESUME, ["config.json", "not valid JSON"]),
    ("config is a list", settings_are("[1]"), RESUME, ["config.json", "got [1]", "Restore it"]),
    ("config is null", settings_are("null"), RESUME, ["config.json", "got None", "Restore it"]),
    ("config is empty", settings_are("{}"), RESUME, ["config.json", "got {}", "Restore it"]),
    ("inspect a run with a passphrase", nothing, [*INSPECT, "--passphrase-file", "/nope"],
     ["--passphrase-file is for key files"]),
    ("inspect a run with settings", nothing, [*INSPECT, "--defense", "pad", "--image-size", "64"],
     ["--image-size and --defense are for --model", "leave"]),
    ("config edited", edit_config, RESUME, ["'lrr'", "'lr'"]),
    ("key cut", spoil_key, RESUME, ["client-00001.key", "not a whole FedKL key file"]),
    ("key lost", lose_key, RESUME, ["client-00001.key is missing", "Restore"]),
    ("key open to all", open_key, RESUME, ["0644", "chmod 600"]),
    ("key encrypted", lock_key, RESUME, ["is encrypted", "a run takes no passphrase", "keygen"]),
    ("key too short", short_key_only, [*TRAIN[:-1], "{tmp}/run", *CHANNEL], ["10 entries", "1024"]),
    ("another's key", other_key, RESUME,
     ["client-00000.key is another key", "client 0", "round-000002", "Put that key file back"]),
    ("a new key", short_key, RESUME, ["client-00001.key is another key", "client 1"]),
    ("a new group key", new_group, RESUME, ["group.key is another key", "Put that key file back"]),
    ("locks lost", lose_clients, [*RESUME, "--rounds", "3"],
     ["00000/round-000002", "and 2 more", "Restore clients/"]),
    ("one lock lost", lose_client, [*RESUME, "--rounds", "3"], ["00002/round-000002", "Restore"]),
    ("checkpoints lost", lose_checkpoints, RESUME, ["no checkpoint", "summary.json", "Restore"]),
    ("checkpoints lost on the way", lose_most, RESUME, ["no checkpoint", "clients/", "round 2"]),
    ("config lost", lose_config, [*TRAIN[:-1], "{tmp}/run"],
     ["what is left of a run", "no config.json", "choose another --out"]),
    ("evaluate: checkpoints cut", cut_all, EVALUATE, ["checkpoint", "can be used"]),
    ("evaluate: best is cut", lambda run: cut(run / "checkpoints" / "best.safetensors"),
     [*EVALUATE, "--checkpoint", "best"], ["best.safetensors"]),
    ("evaluate: none yet", begin, EVALUATE, ["no checkpoint", "first round", "--resume"]),
    ("evaluate: none left", no_checkpoint, EVALUATE, ["no checkpoint", "summary.json", "Restore"]),
    ("evaluate: another's key", other_key, EVALUATE, ["client-00000.key is another key"]),
    ("evaluate: locks lost", lose_clients, EVALUATE, ["00000/round-000002", "Restore clients/"]),
    ("evaluate: one lock lost", lose_client, EVALUATE, ["00002/round-000002"]),
    ("audit: another's key", other_key, AUDIT,
     ["client-00000.key is another key"]),
    ("audit: locks lost", lose_clients, AUDIT,
     ["00000/round-000002"]),
    ("certify: another's key", other_key, CERTIFY,
     ["client-00000.key is another key"]),
    ("certify: locks lost", lose_clients, CERTIFY,
     ["00000/round-000002"]),
    ("evaluate: key lost", lose_key, EVALUATE, ["client-00001.key is missing"]),
    ("evaluate: split", nothing, [*EVALUATE, "--split", "tset"], ["'tset'", "'test'"]),
    ("evaluate: checkpoint", nothing, [*EVALUATE, "--checkpoint", "lst"], ["'lst'", "'last'"]),
    ("evaluate: device", nothing, [*EVALUATE, "--device", "abacus"], ["'abacus'"]),
    ("evaluate: never validated", never_validated, [*EVALUATE, "--checkpoint", "best"],
     ["never validated", "--eval-every 0", "--checkpoint last"]),
    ("inspect: no summary", spoil_summary, INSPECT, ["summary.json is not a run's summary"]),
    ("inspect: odd figures", spoil_figures, INSPECT, ["summary.json is not a run's summary"]),
    ("inspect: no settings", spoil_settings, INSPECT, ["config.json", "expected a table"]),
    ("audit: no summary", spoil_summary, AUDIT, ["summary.json is not a run's summary"]),
    ("audit: odd figures", spoil_figures, AUDIT, ["summary.json is not a run's summary"]),
    ("audit: no settings", spoil_settings, AUDIT, ["config.json", "expected a table"]),
    ("audit: into the run", nothing, [*AUDIT[:-1], "{tmp}/run"], ["holds a run", "another --out"]),
    ("audit: resume of nothing", nothing, [*AUDIT, "--resume"],
     ["no audit to resume", "without --resume"]),
    ("audit: no defense", nothing, [*AUDIT, "--defenses", ""], ["--defenses is empty", "norm"]),
    ("audit: nothing but commas", nothing, [*AUDIT, "--defenses", " ,"], ["--defenses is empty"]),
    ("audit: extended", extend, AUDIT,
     ["run is not finished: 2 of 4 rounds", "is of 2", "train --out", "--resume"]),
    ("audit: extended and killed", extend_and_play, AUDIT, ["run is not finished: 3 of 4 rounds"]),
    ("audit: newest checkpoint cut", lose_newest, AUDIT, ["run is not finished: 1 of 2 rounds"]),
    ("certify: extended and killed", extend_and_play, CERTIFY,
     ["run is not finished: 3 of 4 rounds"]),
    ("certify: no settings", spoil_settings, CERTIFY, ["config.json", "expected a table"]),
    ("certify: into the run", nothing, [*CERTIFY[:-1], "{tmp}/run"], ["holds a run"]),
    ("inspect: config cut", spoil_config, INSPECT, ["config.json"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "damage, words, fragments", [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED]
)
def test_damaged_run(
    call: Call,
    finished: Path,
    damage: Callable[[Path], None],
    words: Sequence[str],
    fragments: Sequence[str],
) -> None:
    damage(finished)
    refused(call, finished.parent, words, fragments)
