"""LPIPS without weights, with damaged ones, and against its definition; never a download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkl import metrics
from fedkl.errors import DataError
from fedkl.rng import derive


def images(seed: int, count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=derive(seed, "images"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty torch hub cache for one test."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


@pytest.mark.parametrize("backbone", sorted(metrics.LPIPS_BACKBONES))
def test_lpips_without_weights_says_so_and_downloads_nothing(
    hub: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    x = images(0, 1)
    value = metrics.lpips(x, x, backbone)
    assert isinstance(value, metrics.NotAvailable)
    assert str(value).startswith("not available: LPIPS")
    assert str(hub) in str(value)


def test_lpips_agrees_with_its_definition(hub: Path) -> None:
    """The real path, with a backbone of random weights: no trained one may be downloaded here."""
    import torchmetrics
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    network = squeezenet1_1(weights=None).eval()
    torch.save(network.state_dict(), hub / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    linear = torch.load(folder / "squeeze.pth", map_location="cpu")
    x, t = images(0, 2), images(1, 2)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b = (2 * x - 1 - shift) / scale, (2 * t - 1 - shift) / scale
    expected, taps = torch.zeros(2), [1, 4, 7, 9, 10, 11, 12]
    with torch.no_grad():
        for index, layer in enumerate(network.features):
            a, b = layer(a), layer(b)
            if index in taps:
                # A pixel without any feature stays zero.
                unit_a, unit_b = (f / f.norm(dim=1, keepdim=True).clamp(min=1e-4) for f in (a, b))
                weight = linear[f"lin{taps.index(index)}.model.1.weight"].flatten()
                squares = (unit_a - unit_b).square() * weight[:, None, None]
                expected += squares.sum(dim=1).mean(dim=(1, 2))
    before = torch.get_rng_state()
    got = metrics.lpips(x, t, "squeeze")
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(got, Tensor)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert bool((got > 0).all())
    gray = metrics.lpips(x[:1, :1], t[:1, :1], "squeeze")
    color = metrics.lpips(x[:1, :1].repeat(1, 3, 1, 1), t[:1, :1].repeat(1, 3, 1, 1), "squeeze")
    assert isinstance(gray, Tensor)
    assert isinstance(color, Tensor)
    assert gray.shape == (1,)
    assert gray.item() == pytest.approx(color.item())


def test_lpips_with_a_damaged_weight_file(hub: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    (hub / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]).write_bytes(b"cut")
    x = images(0, 1)
    with pytest.raises(DataError, match="cannot be read"):
        metrics.lpips(x, x, "squeeze")
