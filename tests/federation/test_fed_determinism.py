"""Neither the number of workers nor being killed changes a single bit."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fedhelp import assert_outcome, assert_same, config, digits, make_keys, outcome, with_keys

from fedkl.errors import ConfigError, FedKLError, OutputError
from fedkl.federation import RunConfig, config_from, run

KINDS: dict[str, dict[str, Any]] = {
    "channel": {"defense": "channel", "training": {"keep_momentum": True, "batch_size": 32}},
    "fedsgd": {"defense": "channel", "federation": {"method": "fedsgd"}},
    "fraction": {
        "defense": "fedbn",
        "federation": {"clients": 7, "fraction": 0.5, "dropout": 0.2},
        "data": {"augment": True},
    },
    "pad": {
        "defense": "pad",
        "renewal": {"budget": 2000, "on_spent": "renew", "every": 2, "stagger": True},
        "training": {"keep_momentum": True, "batch_size": 32},
    },
    "pad, fedsgd": {
        "defense": "pad",
        "defense_settings": {"head": True, "lock_head_input": True},
        "federation": {"method": "fedsgd"},
        "renewal": {"every": 1},
    },
    "none": {"defense": "none", "training": {"optimizer": "adam", "lr": 0.01}},
    "noise": {"defense": "norm+prune+noise", "defense_settings": {"noise_multiplier": 0.01}},
}


def settings(kind: str, **more: Any) -> RunConfig:
    given = dict(KINDS[kind])
    given["federation"] = {"rounds": 3, "join_steps": 2, **given.get("federation", {})}
    return config(given.pop("defense"), **given, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_workers_does_not_matter(kind: str, tmp_path: Path) -> None:
    clients = 7 if kind == "fraction" else 3
    keys = make_keys(tmp_path / "keys", clients, seeds=kind.startswith("pad"))
    found = []
    for workers in (1, 2, 3):
        folder = with_keys(tmp_path / str(workers), keys)
        result = run(settings(kind, workers=workers), folder, bundle=digits())
        found.append((result.shared, outcome(folder)))
    for shared, files in found[1:]:
        assert_same(shared, found[0][0])
        assert files == found[0][1]


def test_another_seed_or_key_is_another_run(tmp_path: Path) -> None:
    """What the tests here compare can differ."""
    keys = make_keys(tmp_path / "keys", 3)
    base = run(settings("channel"), with_keys(tmp_path / "a", keys), bundle=digits())
    seed = run(settings("channel", seed=1), with_keys(tmp_path / "b", keys), bundle=digits())
    key = run(settings("channel"), tmp_path / "c", bundle=digits())
    for other in (seed, key):
        assert any(not base.shared[n].equal(other.shared[n]) for n in base.shared)
    assert outcome(tmp_path / "a") != outcome(tmp_path / "c")


def play(folder: Path, wanted: RunConfig, point: str) -> None:
    """A run in a process of its own, which dies at ``point``."""
    if point:
        name, _, count = point.partition(":")
        after, name = name.startswith("after-"), name.removeprefix("after-")
        left, real = [int(count)], os.replace

        def replace(source: Any, target: Any) -> None:
            # Every file becomes real by a rename: dies right before or after the count-th match.
            left[0] -= name in str(target)
            dies = name in str(target) and left[0] == 0
            if dies and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]
    finish(folder, wanted)


def start(folder: Path, wanted: RunConfig, *, point: str = "") -> Any:
    digits()
    # Forked, so that it need not import torch again.
    process = mp.get_context("fork").Process(target=play, args=(folder, wanted, point))
    process.start()
    return process


def finish(folder: Path, wanted: RunConfig) -> None:
    resume = (folder / "config.json").exists()
    run(wanted, folder, resume=resume, bundle=digits())


@pytest.mark.parametrize(
    "points",
    [
        ["config.json:1", "metrics.jsonl:1"],
        ["clients/00001/round-000002:1"],
        ["after-clients/00002/round-000003:1"],
        ["checkpoints/round-000001.safetensors:1", "checkpoints/round-000001.json:1"],
        ["after-checkpoints/round-000002.safetensors:1", "best.safetensors:1"],
        ["after-checkpoints/round-000003.json:1", "summary.json:1"],
        ["after-metrics.jsonl:3"],
    ],
    ids=lambda points: ",".join(points),
)
def test_killed_at_a_given_write(points: list[str], tmp_path: Path) -> None:
    wanted, keys = settings("channel"), make_keys(tmp_path / "keys", 3)
    straight = with_keys(tmp_path / "straight", keys)
    run(wanted, straight, bundle=digits())
    folder = with_keys(tmp_path / "killed", keys)
    for point in points:
        process = start(folder, wanted, point=point)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    finish(folder, wanted)
    assert_outcome(outcome(folder), outcome(straight))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(workers: int, tmp_path: Path) -> None:
    wanted = settings("fraction", workers=workers)
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    begun = time.monotonic()
    run(wanted, straight, bundle=digits())
    lasts, kills, clock = time.monotonic() - begun, 0, random.Random(0)
    for _ in range(5):
        process = start(folder, wanted)
        time.sleep(clock.uniform(0.1, 0.6) * lasts)
        process.kill()
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        if (folder / "summary.json").exists():
            break
    assert kills
    finish(folder, wanted)
    assert_outcome(outcome(folder), outcome(straight))


def test_resumed_with_more_rounds_and_other_workers(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys", 3)
    few = config("channel", federation={"rounds": 1})
    more = config("channel", federation={"rounds": 3}, workers=2, checkpoint_every=2)
    straight, folder = with_keys(tmp_path / "a", keys), with_keys(tmp_path / "b", keys)
    run(config("channel", federation={"rounds": 3}), straight, bundle=digits())
    run(few, folder, bundle=digits())
    got = run(more, folder, resume=True, bundle=digits())
    want = outcome(straight)["summary"]
    assert outcome(folder)["summary"]["accuracy"] == want["accuracy"]
    assert [line["round"] for line in got.validation] == [1, 2, 3]
    with pytest.raises(ConfigError, match="done 3 rounds already"):
        run(few, folder, resume=True, bundle=digits())


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    run(config("none"), tmp_path, bundle=digits())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"training.lr: 0.05 → 0.1"):
        run(config("none", training={"lr": 0.1, "batch_size": 32}), tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(OutputError, match="already holds a run"):
        run(config("none"), tmp_path)
    with pytest.raises(FedKLError, match="no run to resume"):
        run(config("none"), tmp_path / "nowhere", resume=True)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    wanted = config("none", federation={"rounds": 10_000})
    process = start(tmp_path, wanted)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("checkpoints/round-*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(OutputError, match="another process is using"):
            run(wanted, tmp_path, resume=True, bundle=digits())
    finally:
        process.kill()
        process.join(60)
    # The claim went with the process.
    done = json.loads(sorted((tmp_path / "checkpoints").glob("round-*.json"))[-1].read_text())
    enough = config("none", federation={"rounds": done["round"] + 1})
    assert run(enough, tmp_path, resume=True, bundle=digits()).config == enough
    assert os.path.exists(tmp_path / "summary.json")


def test_the_program_reads_its_settings_back() -> None:
    wanted = settings("fraction")
    assert config_from(json.loads(json.dumps(wanted.to_dict()))) == wanted


def test_a_deeper_pad_over_workers_and_a_resume(tmp_path: Path) -> None:
    """The first lock behind a module that is no layer: the spec makes it again in every process."""
    keys = make_keys(tmp_path / "keys", 3, seeds=True)
    lock = {"defense_settings": {"behind": "6", "layers": "first"}}
    straight, folder = with_keys(tmp_path / "a", keys), with_keys(tmp_path / "b", keys)
    want = run(config("pad", federation={"rounds": 3}, **lock), straight, bundle=digits())
    run(config("pad", federation={"rounds": 1}, **lock), folder, bundle=digits())
    more = config("pad", federation={"rounds": 3}, workers=2, **lock)
    got = run(more, folder, resume=True, bundle=digits())
    assert_same(got.shared, want.shared)
    # All but the head lies before that module, and so the head alone is left to share.
    assert got.shared.keys() == {"7.weight", "7.bias"}
