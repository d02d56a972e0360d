"""Models by name: the networks of the papers, torchvision's, and any factory of the user's.

``MODELS`` holds the names that FedKL vouches for; :func:`build` also takes the name of any
torchvision classification model, and ``package.module:factory``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkl.errors import ModelError, unknown
from fedkl.rng import borrowed

_SHOWN = 5  # names listed per kind of mismatch; a wrong file can have hundreds


class LeNet(nn.Sequential):
    """The LeNet of "Deep Leakage from Gradients" (Zhu et al. 2019, section 4).

    Three 5x5 convolutions of 12 channels (strides 2, 2, 1), a sigmoid after each, one linear
    layer. Maps (B, channels, image_size, image_size) to logits (B, num_classes). Weights are
    PyTorch's default; the DLG code draws them from U(-0.5, 0.5), which ``init`` can supply.
    """

    def __init__(self, num_classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        side, width = image_size, channels
        for number, stride in enumerate((2, 2, 1), start=1):
            self.add_module(f"conv{number}", nn.Conv2d(width, 12, 5, stride, padding=2))
            self.add_module(f"act{number}", nn.Sigmoid())
            side, width = (side - 1) // stride + 1, 12
        self.add_module("flatten", nn.Flatten())
        self.add_module("fc", nn.Linear(12 * side * side, num_classes))


class _BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm plus the parameter-free shortcut (option A), then relu."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        front = self.extra // 2
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, front, self.extra - front))
        out: Tensor = self.relu2(y + short)
        return out


class CifarResNet(nn.Sequential):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers, widths 16, 32, 64.

    Maps (B, channels, H, W) to logits (B, num_classes). Convolutions start from the normal law
    of He et al. 2015, as in the paper.
    """

    def __init__(self, blocks: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.add_module("conv1", nn.Conv2d(channels, 16, 3, padding=1, bias=False))
        self.add_module("bn1", nn.BatchNorm2d(16))
        self.add_module("relu1", nn.ReLU())
        width_in = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(_BasicBlock(width_in, width, stride))
                width_in = width
            self.add_module(f"layer{stage}", layer)
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("fc", nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _lenet(num_classes: int, channels: int, image_size: int) -> nn.Module:
    return LeNet(num_classes, channels, image_size)


def _cifar_resnet(blocks: int, num_classes: int, channels: int, image_size: int) -> nn.Module:
    return CifarResNet(blocks, num_classes, channels)  # global pooling: any image size


def _torchvision(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return a tuple while training; every caller wants logits.
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    if channels != 3:
        _replace_first_conv(model, channels)
    return model


def _replace_first_conv(model: nn.Module, channels: int) -> None:
    """Give the first convolution ``channels`` inputs, started as torchvision starts it."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


MODELS: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": _lenet,
    "resnet20": partial(_cifar_resnet, 3),
    "resnet32": partial(_cifar_resnet, 5),
    "resnet18": partial(_torchvision, "resnet18"),
    "resnet34": partial(_torchvision, "resnet34"),
    "vgg16": partial(_torchvision, "vgg16"),
}


def build(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    image_size: int = 32,
    generator: torch.Generator,
    init: Path | None = None,
) -> nn.Module:
    """A fresh model on the CPU that maps (B, channels, image_size, image_size) to logits.

    Args:
        name: one of ``MODELS``; any torchvision classification model (``channels`` must be 3),
            also spelled ``torchvision:NAME``; or ``package.module:factory``, which is called with
            those of ``num_classes``, ``channels`` and ``image_size`` that its signature takes.
        num_classes: number of logits, at least 1.
        channels: channels of an image, at least 1.
        image_size: height and width of an image in pixels, at least 1.
        generator: where the initial weights come from; torch's global state stays untouched.
        init: safetensors file with exactly the model's state dict, loaded over the fresh weights.

    Raises:
        ModelError: the name is unknown, a factory cannot be used, its model does not run on such
            images or gives other than ``num_classes`` logits, or ``init`` does not fit or holds
            NaN or infinity.
    """
    sizes = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    for key, value in sizes.items():
        if value < 1:
            raise ModelError(f"{key} is {value}; give an integer of at least 1.")
    with borrowed(generator):
        model = _fresh(name, sizes)
        _check(model, name, sizes)
    if init is not None:
        _initialize(model, init)
    return model


def logits(output: Any) -> Tensor:
    """Logits of a model's output: itself, or the first of several (auxiliary heads)."""
    if isinstance(output, Tensor):
        return output
    first = output[0] if isinstance(output, tuple | list) else next(iter(output.values()))
    assert isinstance(first, Tensor)
    return first


def _check(model: nn.Module, name: str, sizes: dict[str, int]) -> None:
    """Raises unless two images go in and ``num_classes`` logits each come out."""
    modes = {module: module.training for module in model.modules()}
    classes, channels, size = sizes.values()
    images = f"images of {channels}x{size}x{size}"
    try:
        with torch.no_grad():
            found = logits(model.eval()(torch.rand(2, channels, size, size)))
    except Exception as error:  # a user's model may raise anything
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")
        raise ModelError(
            f"model {name!r} does not run on {images} ({said}). Give the channels and image_size "
            "it is made for."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if found.shape != (2, classes):
        raise ModelError(
            f"model {name!r} gives {tuple(found.shape)} for 2 {images}, expected (2, {classes}): a "
            "logit per class. Give the num_classes it is made for, or let its factory take it."
        )


def _fresh(name: str, sizes: dict[str, int]) -> nn.Module:
    if name in MODELS:
        return _called(partial(MODELS[name], *sizes.values()), name)
    short = name.removeprefix("torchvision:")
    if short in torchvision.models.list_models(module=torchvision.models):
        if sizes["channels"] != 3:
            raise ModelError(
                f"model {name!r} of torchvision takes 3 channels, got {sizes['channels']}. "
                f"Use 3 channels, or one of: {', '.join(sorted(MODELS))}."
            )
        return _called(partial(_torchvision, short, *sizes.values()), name)
    if ":" in short:
        factory = _import_factory(name)
        return _called(partial(factory, **_accepted(factory, sizes)), name)
    raise ModelError(
        unknown("model", name, MODELS)
        + " Any classification model of torchvision works too, and 'package.module:factory'."
    )


def _import_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ModelError(
            f"model {name!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}). Is its folder on PYTHONPATH?"
        ) from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError as error:
        raise ModelError(
            f"model {name!r}: module {module_name!r} has no attribute {attribute!r}. "
            "Name a function or class as 'package.module:factory'."
        ) from error
    if not callable(factory):
        raise ModelError(
            f"model {name!r}: {attribute!r} is a {type(factory).__name__} and not callable. "
            "Name a function or class that returns an nn.Module."
        )
    return factory  # type: ignore[no-any-return]


def _accepted(factory: Callable[..., Any], sizes: dict[str, int]) -> dict[str, int]:
    """Those of ``sizes`` that the factory's signature takes by keyword."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return sizes
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return sizes
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {k: v for k, v in sizes.items() if k in parameters and parameters[k].kind in named}


def _called(factory: Callable[[], Any], name: str) -> nn.Module:
    try:
        model = factory()
    except Exception as error:  # neither a user's factory nor torchvision promises a type
        raise ModelError(
            f"model {name!r}: its factory raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {name!r}: its factory returned a {type(model).__name__}, "
            "expected a torch.nn.Module."
        )
    return model


def _initialize(model: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"initialization {path} cannot be read as safetensors ({error}). "
            "Write it with safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "mismatched": [
            f"{name} (file {tuple(state[name].shape)}, model {tuple(own[name].shape)})"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(_listing(kind, names) for kind, names in problems.items() if names)
        raise ModelError(
            f"initialization {path} is not of this model: {listed}. "
            "Give a file written for the same model, classes, channels and image size."
        )
    if bad := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(
            f"initialization {path} holds NaN or infinity, {_listing('in', bad)}. "
            "Give weights that have not diverged."
        )
    model.load_state_dict(state)


def _listing(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{kind}: {', '.join(names[:_SHOWN])}{more}"
