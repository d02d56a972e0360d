"""The loop of one's own learns, keeps what is private, and gives the same update again."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedkl.errors import KeyFileError
from fedkl.key import Key

SCRIPT = Path(__file__).parents[1] / "examples" / "own-loop" / "fedavg.py"


@pytest.fixture
def fedavg(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_loop_fedavg", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RENEW_EVERY", 2)
    return module


def test_own_loop_resumes_across_a_renewal(fedavg: ModuleType, tmp_path: Path) -> None:
    found = fedavg.main(tmp_path, 3)
    assert len(found) == 3
    assert min(found) > 0.5
    shared = load_file(tmp_path / "global-0003.safetensors")
    assert not {"0.weight", "9.weight", "9.bias"} & set(shared)
    assert not [name for name in shared if "keylock" in name]
    for number in (3, 2):  # the clients have their states of these rounds already
        (tmp_path / f"global-000{number}.safetensors").unlink()
    assert fedavg.main(tmp_path, 3) == found
    again = load_file(tmp_path / "global-0003.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in shared.items())


def test_own_loop_refuses_a_private_state_of_another_key(
    fedavg: ModuleType, tmp_path: Path
) -> None:
    fedavg.main(tmp_path, 1)
    path, other = tmp_path / "client-1" / "client.key", Key.generate()
    was = Key.load(path).fingerprint
    path.unlink()
    other.save(path)
    with pytest.raises(KeyFileError, match=rf"client-1.*key {was}.*{other.fingerprint}"):
        fedavg.main(tmp_path, 2)
    state = tmp_path / "client-1" / "round-0001.safetensors"
    save_file(load_file(state), state)  # of before keys were named
    fedavg.main(tmp_path, 2)


def test_own_loop_renews_pads_and_keeps_them_to_its_owner(
    fedavg: ModuleType, tmp_path: Path
) -> None:
    fedavg.main(tmp_path, 2)
    folder = tmp_path / "client-1"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    epochs = [
        {int(t) for n, t in load_file(path).items() if n.endswith("keylock.epoch")}
        for path in sorted(folder.glob("round-*"))
    ]
    assert epochs == [{0}, {0}, {2}]
