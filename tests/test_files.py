"""Atomic files: whole or absent, and no damaged byte goes unnoticed."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkl import files
from fedkl.errors import CheckpointError, FedKLError, OutputError, StateError
from fedkl.files import (
    make_folder,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]


def sample() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- bytes


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_are_written_and_replaced_without_leftovers(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old", durable=durable)
    write_bytes(str(path), b"new" * 1000, durable=durable)
    assert path.read_bytes() == b"new" * 1000
    assert os.listdir(tmp_path) == ["file"]


@posix
def test_modes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "public", b"")
        write_bytes(tmp_path / "private", b"", private=True)
    finally:
        os.umask(before)
    assert mode(tmp_path / "public") == 0o640
    assert mode(tmp_path / "private") == 0o600


@posix
def test_private_narrows_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    write_bytes(path, b"secret", private=True)
    assert mode(path) == 0o600


@posix
def test_private_bytes_are_never_in_an_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []

    def fsync(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(tmp_path / "key", b"secret", private=True)
    assert modes[0] == 0o600  # the temporary file, before the rename
    assert len(modes) == 2  # and the folder


def test_durable_false_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise AssertionError("fsync called")

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(tmp_path / "t", sample(), durable=False)
    write_json(tmp_path / "j", {}, durable=False)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    seen: list[str] = []

    def fsync(descriptor: int) -> None:
        seen.extend(name for name in os.listdir(tmp_path) if name != "file")
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    (temporary,) = seen
    assert temporary.startswith(".")
    assert temporary.endswith(".tmp")


@pytest.mark.parametrize("links", [True, False])
def test_overwrite_false_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def link(source: object, target: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "file"
    write_bytes(path, b"first", overwrite=False)
    with pytest.raises(OutputError, match="exists") as caught:
        write_bytes(path, b"second", overwrite=False)
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


# ---- errors, one table


def write_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    write_bytes(folder / "file" / "x", b"")


def write_over_a_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    write_bytes(folder / "sub", b"")


def folder_is_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    make_folder(folder / "file")


def folder_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    make_folder(folder / "file" / "sub")


def read_broken_json(folder: Path) -> None:
    (folder / "x.json").write_text('{"round": 3, "acc')
    read_json(folder / "x.json")


def read_nan(folder: Path) -> None:
    (folder / "x.json").write_text('{"loss": NaN}')
    read_json(folder / "x.json")


def read_deep_json(folder: Path) -> None:
    (folder / "x.json").write_text("[" * 200_000)
    read_json(folder / "x.json")


def read_latin_json(folder: Path) -> None:
    (folder / "x.json").write_bytes(b'"\xe4"')
    read_json(folder / "x.json")


def read_empty_tensors(folder: Path) -> None:
    (folder / "x").write_bytes(b"")
    read_tensors(folder / "x")


def read_foreign_tensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, folder / "x")  # whole, but nobody vouches for its bytes
    read_tensors(folder / "x")


def test_a_missing_file_is_not_called_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "x")
    assert "not valid JSON" not in str(caught.value)


ERRORS: list[tuple[Callable[[Path], object], type[FedKLError], str]] = [
    (lambda f: write_bytes(f / "no" / "x", b""), OutputError, "Create the folder first"),
    (write_below_a_file, OutputError, "is a file, not a folder"),
    (write_over_a_folder, OutputError, "There is a folder of that name"),
    (lambda f: write_bytes(f / ("x" * 300), b""), OutputError, "shorter"),
    (lambda f: write_json(f / "x", {"loss": math.nan}), OutputError, "None instead of NaN"),
    (lambda f: write_json(f / "x", {"a": {1, 2}}), OutputError, "set"),
    (folder_is_a_file, OutputError, "is a file, expected a folder"),
    (folder_below_a_file, OutputError, "is a file, not a folder"),
    (lambda f: read_json(f / "x"), CheckpointError, "does not exist"),
    (lambda f: read_json(f), CheckpointError, "cannot be read"),
    (read_broken_json, CheckpointError, "line 1 column 14"),
    (read_nan, CheckpointError, "NaN is not a JSON number"),
    (read_deep_json, CheckpointError, "not valid JSON"),
    (read_latin_json, CheckpointError, "not valid JSON"),
    (lambda f: read_tensors(f / "x"), CheckpointError, "does not exist"),
    (lambda f: read_tensors(f), CheckpointError, "cannot be read"),
    (read_empty_tensors, CheckpointError, "0 bytes"),
    (read_foreign_tensors, CheckpointError, "not a whole tensor file"),
    (lambda f: write_tensors(f / "x", {}, {"sha256": "0"}), StateError, "rename the key"),
    (lambda f: write_tensors(f / "x", {}, {"round": 3}), StateError, "str()"),  # type: ignore
    (lambda f: write_tensors(f / "x", {"__metadata__": torch.ones(1)}), StateError, "rename"),
    (lambda f: write_tensors(f / "x", {"s": torch.eye(2).to_sparse()}), StateError, "'s'"),
    (
        lambda f: write_tensors(f / "x", {"c": torch.ones(1, dtype=torch.complex128)}),
        StateError,
        "common dtype",
    ),
    (lambda f: write_tensors(f / "no" / "x", {}), OutputError, "Create the folder first"),
]


@posix
@pytest.mark.parametrize("act, error, text", ERRORS)
def test_errors_name_the_path_and_the_remedy(
    tmp_path: Path, act: Callable[[Path], object], error: type[FedKLError], text: str
) -> None:
    with pytest.raises(error) as caught:
        act(tmp_path)
    message = str(caught.value)
    assert text in message
    assert str(tmp_path) in message or "tensor 's'" in message or "__metadata__" in message
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_folder_that_nobody_can_write_to() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/nope: no folder can be made"):
        make_folder("/proc/nope")
    with pytest.raises(OutputError, match="cannot write /proc"):
        make_folder("/proc")  # exists, root or not: no files can be made in it


def test_make_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "kept").write_text("x")
    make_folder(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == ["kept"]


# ---- JSON


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
values = st.recursive(
    scalars.filter(lambda x: not (isinstance(x, float) and math.isinf(x))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@one_folder
@given(value=values)
def test_json_round_trip(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "x.json", value, durable=False)
    assert read_json(tmp_path / "x.json") == value


def test_json_is_indented_and_keeps_its_order(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": [None]})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": 1,\n  "a": [\n    null\n  ]\n}\n'


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(OutputError):
        write_json(tmp_path / "x.json", math.inf)
    assert read_json(tmp_path / "x.json") == 1


# ---- tensors


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    state = {}
    for name in draw(st.sets(st.text(max_size=8), max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        octets = torch.randint(0, 2, shape)
        state[name] = octets.to(draw(st.sampled_from(DTYPES)))
    return state


@one_folder
@given(state=states(), meta=st.dictionaries(st.text(), st.text(), max_size=3))
def test_tensors_round_trip(
    tmp_path: Path, state: dict[str, torch.Tensor], meta: dict[str, str]
) -> None:
    meta.pop("sha256", None)
    write_tensors(tmp_path / "x", state, meta, durable=False)
    got, notes = read_tensors(tmp_path / "x")
    assert notes == meta
    assert set(got) == set(state)
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor)


def test_bits_survive(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, -0.0, math.inf, 1e-45])
    write_tensors(tmp_path / "x", {"odd": odd})
    got, _ = read_tensors(tmp_path / "x")
    assert torch.equal(got["odd"].view(torch.int32), odd.view(torch.int32))


def test_views_of_one_memory_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True)
    matrix = base.detach().reshape(3, 4)
    state = {
        "base": base,
        "again": base,
        "transposed": matrix.T,
        "row": matrix[1],
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    write_tensors(tmp_path / "x", state)
    got, _ = read_tensors(tmp_path / "x")
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor.detach()), name
    got["base"][:] = -1  # writable, and alone
    assert torch.equal(got["again"], torch.arange(12.0))
    assert torch.equal(base.detach(), torch.arange(12.0))


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, sample(), {"round": "3", "run": "ü"})
    data = path.read_bytes()
    read_tensors(path)
    for position in range(len(data)):
        # 0x29 turns the blanks behind the header into tabs, which JSON would let pass.
        for flip in (0x01, 0x20, 0x29, 0x80):
            edited = bytearray(data)
            edited[position] ^= flip
            path.write_bytes(edited)
            with pytest.raises(CheckpointError):
                read_tensors(path)


def test_every_truncation_and_any_appendix_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, sample())
    data = path.read_bytes()
    for cut in [data[:size] for size in range(len(data))] + [data + b"\0"]:
        path.write_bytes(cut)
        with pytest.raises(CheckpointError):
            read_tensors(path)


@pytest.mark.parametrize(
    "other, meta",
    [
        ({"b": torch.zeros(2, 2)}, {}),  # name
        ({"a": torch.zeros(4)}, {}),  # shape
        ({"a": torch.zeros(2, 2, dtype=torch.int32)}, {}),  # dtype
        ({"a": torch.full((2, 2), -0.0)}, {}),  # bytes
        ({"a": torch.zeros(2, 2)}, {"k": "v"}),  # metadata
    ],
)
def test_the_digest_covers(other: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    reference = files._digest({"a": torch.zeros(2, 2)}, {})
    assert files._digest({"a": torch.zeros(2, 2)}, {}) == reference
    assert files._digest(other, meta) != reference


def test_the_digest_ignores_the_order(tmp_path: Path) -> None:
    state = sample()
    turned = dict(reversed(state.items()))
    notes = {"a": "1", "b": "2"}
    assert files._digest(state, notes) == files._digest(turned, dict(reversed(notes.items())))


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_tensors(tmp_path / "x", sample(), {"round": "3"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight"), sample()["weight"])
        notes = file.metadata()
    assert notes["round"] == "3"
    assert len(notes["sha256"]) == 64
    assert json.dumps(notes)
