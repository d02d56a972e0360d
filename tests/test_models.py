"""Models by name: sizes from the papers, repeatable weights, and every way a name can fail."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedkl.errors import ModelError
from fedkl.models import MODELS, build
from fedkl.rng import derive

FACTORIES = """
from torch import nn
def full(num_classes, channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))
def classes_only(*, num_classes):
    return full(num_classes, 3, 4)
def anything(**kwargs):
    return full(**kwargs)
def nothing():
    return full(10, 3, 4)
def needs_more(num_classes, depth):
    return full(num_classes, 3, 4)
class Several(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = full(10, 3, 4), wrap
        self.net[1].eval()  # as a frozen norm is
    def forward(self, x):
        return self.wrap(self.net(x))
def auxiliary():
    return Several(lambda y: (y, y[:1]))
def named():
    return Several(lambda y: {"logits": y})
def maps():
    return Several(lambda y: y[:, :, None])
def numbers():
    return Several(lambda y: y.tolist())
def fails():
    raise KeyError("backbone")
def text():
    return "a model"
class Holder:
    make = nn.Flatten
constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "factories_of_a_user"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / "broken_of_a_user.py").write_text("raise ZeroDivisionError('at import')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def small(name: str, seed: int = 0, **sizes: int) -> nn.Module:
    return build(name, **{"num_classes": 10, **sizes}, generator=derive(seed, "model"))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_named_model_maps_images_to_logits(name: str, channels: int) -> None:
    model = small(name, num_classes=7, channels=channels).eval()
    with torch.no_grad():
        assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("size", [8, 28, 31, 32, 64])
@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_small_networks_take_several_sizes(name: str, size: int) -> None:
    model = small(name, image_size=size, channels=1)
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_lenet_is_the_one_of_dlg() -> None:
    model = small("lenet")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride, c.padding) for c in convs] == [
        (12, (5, 5), (2, 2), (2, 2)),
        (12, (5, 5), (2, 2), (2, 2)),
        (12, (5, 5), (1, 1), (2, 2)),
    ]
    assert sum(isinstance(m, nn.Sigmoid) for m in model.modules()) == 3
    assert {"conv1", "conv2", "conv3", "fc"} <= {name for name, _ in model.named_children()}
    assert model.get_submodule("fc").in_features == 768


def test_parameter_counts_of_he_et_al() -> None:
    # Table 6: 0.27 M and 0.46 M. Exactly: convolutions, two numbers per norm channel, the head.
    for name, blocks, rounded in (("resnet20", 3, 0.27), ("resnet32", 5, 0.46)):
        widths = [16] + [w for w in (16, 32, 64) for _ in range(2 * blocks)]
        convs = 27 * 16 + sum(9 * a * b for a, b in itertools.pairwise(widths))
        assert count(small(name)) == convs + 2 * sum(widths) + 64 * 10 + 10
        assert round(count(small(name)) / 1e6, 2) == rounded


def test_resnet20_has_the_strides_and_shortcuts_of_option_a() -> None:
    model = small("resnet20").eval()
    shapes = {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: tuple(o.shape[1:])})
        )
    model(torch.rand(1, 3, 32, 32))
    assert shapes == {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}
    block = model.get_submodule("layer2")[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    y = block(x)  # the residual is silent: what is left is the shortcut
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", ["lenet", "resnet20", "resnet18"])
def test_weights_depend_on_the_generator_and_on_nothing_else(name: str) -> None:
    first, again, other = small(name), small(name), small(name, seed=1)
    before = torch.get_rng_state()
    torch.manual_seed(99)
    moved = small(name)
    torch.set_rng_state(before)
    for a, b, c in zip(first.parameters(), again.parameters(), moved.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_global_randomness_stays_untouched() -> None:
    before = torch.get_rng_state()
    small("lenet")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:squeezenet1_1"])
def test_other_torchvision_models_by_name(name: str) -> None:
    model = small(name, num_classes=4).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ModelError, match="3 channels, got 1"):
        small(name, channels=1)


def test_torchvision_models_with_a_fixed_image_size() -> None:
    with pytest.raises(ModelError, match="factory raised"):
        small("vit_b_16", image_size=30)  # no multiple of its patches


@pytest.mark.parametrize("name", ["resnet21", "torchvision:lenet", "squeezenet9"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ModelError, match="lenet, resnet18") as caught:
        small(name)
    assert "package.module:factory" in str(caught.value)


@pytest.mark.parametrize("key", ["num_classes", "channels", "image_size"])
def test_sizes_below_one_are_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key} is 0"):
        small("lenet", **{key: 0})


def test_factories_get_the_arguments_they_take(factories: str) -> None:
    assert small(f"{factories}:full", image_size=4)(torch.rand(2, 3, 4, 4)).shape == (2, 10)
    assert count(small(f"{factories}:classes_only", num_classes=7, image_size=4)) == 7 * 49
    assert count(small(f"{factories}:anything", channels=1, image_size=5)) == 260
    assert count(small(f"{factories}:nothing", image_size=4)) == 490
    flat = small(f"{factories}:Holder.make", num_classes=12, image_size=2)
    assert isinstance(flat, nn.Flatten)


def test_a_factory_draws_from_the_generator(factories: str) -> None:
    first, again = (small(f"{factories}:nothing", image_size=4)[1].weight for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["auxiliary", "named"])
def test_a_model_may_give_more_than_logits_and_stays_as_it_is(factories: str, name: str) -> None:
    model = small(f"{factories}:{name}", image_size=4)
    assert model.training
    assert not model.net[1].training


@pytest.mark.parametrize(
    "name, sizes, expected",
    [
        ("nothing", {"image_size": 4, "channels": 1}, r"not run on images of 1x4x4 \(Runtime"),
        ("nothing", {"image_size": 8}, r"not run on images of 3x8x8 \(.*made for"),
        ("nothing", {"image_size": 4, "num_classes": 7}, r"gives \(2, 10\).*expected \(2, 7\)"),
        ("maps", {"image_size": 4}, r"gives \(2, 10, 1\).*a logit per class"),
        ("numbers", {"image_size": 4}, "does not run on"),
    ],
)
def test_models_that_do_not_fit_the_images(
    factories: str, name: str, sizes: dict[str, int], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        small(f"{factories}:{name}", **sizes)


def test_images_too_small_for_a_network_of_torchvision() -> None:
    with pytest.raises(ModelError, match="'alexnet' does not run on images of 3x16x16") as caught:
        small("alexnet", image_size=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("no_such_package.models:net", "cannot be imported .ModuleNotFoundError"),
        ("broken_of_a_user:net", "cannot be imported .ZeroDivisionError: at import"),
        ("factories_of_a_user:absent", "no attribute 'absent'"),
        ("factories_of_a_user:constant", "is a int and not callable"),
        ("factories_of_a_user:fails", "factory raised KeyError: 'backbone'"),
        ("factories_of_a_user:needs_more", "factory raised TypeError.*depth"),
        ("factories_of_a_user:text", "returned a str"),
        (":net", "cannot be imported"),
        ("factories_of_a_user:", "no attribute ''"),
    ],
)
def test_factories_that_cannot_be_used(factories: str, name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        small(name)


def test_initialization_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    source = small("resnet20", seed=5)
    save_file(source.state_dict(), path)
    model = build("resnet20", num_classes=10, generator=derive(0, "x"), init=path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_initialization_that_does_not_fit_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    state = small("lenet").state_dict()
    del state["conv1.bias"]
    state["fc.bias"] = torch.zeros(11)
    state.update({f"extra{i}": torch.zeros(1) for i in range(7)})
    save_file(state, path)
    with pytest.raises(ModelError) as caught:
        build("lenet", num_classes=10, generator=derive(0, "x"), init=path)
    message = str(caught.value)
    assert "missing: conv1.bias;" in message
    assert "extra0, extra1, extra2, extra3, extra4 and 2 more" in message
    assert "fc.bias (file (11,), model (10,))" in message


def test_initialization_that_has_diverged(tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    state = small("lenet").state_dict()
    state["fc.bias"][3] = torch.nan
    save_file(state, path)
    with pytest.raises(ModelError, match="holds NaN or infinity, in: fc"):
        build("lenet", num_classes=10, generator=derive(0, "x"), init=path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_initialization_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "init.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        build("lenet", num_classes=10, generator=derive(0, "x"), init=path)
