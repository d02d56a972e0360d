"""Image generators for attacks that search in their latent space: trained and cached.

A generator, ours or the user's, is an ``nn.Module`` with an integer attribute ``latent`` that maps
noise (N, latent) and labels int64 (N,) to images (N, C, H, W) in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from fedkl import files
from fedkl.attacks.base import Progress
from fedkl.errors import AttackError, CheckpointError, ConfigError, DataError
from fedkl.rng import borrowed

KIND: Final = "fedkl/v1/generator"
BATCH: Final = 64
RATE: Final = 1e-3


class ConditionalGenerator(nn.Module):
    """The decoder of a conditional variational autoencoder (Kingma and Welling 2014; Sohn 2015).

    Two hidden layers from noise and label to pixels: at 32x32 twenty times as fast as convolutions
    of the same likelihood, and meant for images up to about 64x64; bring your own beyond. Without
    batch statistics the image of one latent does not depend on its neighbors, and
    :func:`torch.func.vmap` works.

    Args:
        latent: Length of the noise vector.
        width: Units of a hidden layer.
        image_shape: (C, H, W).
        num_classes: Number of labels.

    Raises:
        ConfigError: One of them is less than 1.
    """

    def __init__(
        self, *, latent: int, width: int, image_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        if min(latent, width, num_classes, *image_shape) < 1:
            raise ConfigError(
                f"got latent {latent}, width {width}, classes {num_classes}, images {image_shape}; "
                "expected 1 or more of each."
            )
        self.latent, self.width = latent, width
        self.image_shape, self.num_classes = image_shape, num_classes
        self.label = nn.Embedding(num_classes, latent)
        self.body = _layers(2 * latent, width, math.prod(image_shape))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Noise (N, latent) and labels int64 (N,) to images (N, C, H, W) in [0, 1]."""
        flat = self.body(torch.cat([noise, self.label(labels)], dim=1)).sigmoid()
        images: Tensor = flat.view(-1, *self.image_shape)
        return images


class _Encoder(nn.Module):
    """Mean and log variance of the latent, for training only."""

    def __init__(self, decoder: ConditionalGenerator) -> None:
        super().__init__()
        self.label = nn.Embedding(decoder.num_classes, decoder.latent)
        inputs = math.prod(decoder.image_shape) + decoder.latent
        self.body = _layers(inputs, decoder.width, 2 * decoder.latent)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        both = self.body(torch.cat([x.flatten(1), self.label(labels)], dim=1))
        mean, log_variance = both.chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)


def _layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, outputs),
    )


def train_generator(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    steps: int = 3000,
    latent: int = 32,
    width: int = 512,
    weight: float = 1.0,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> ConditionalGenerator:
    """A conditional generator trained on public images, as the decoder of an autoencoder.

    Adam at 1e-3 falling along a cosine, batches of 64; cross entropy per pixel (summed) plus the
    divergence of the latent's law from N(0, 1). About three minutes on one core for 32x32 grey.

    Args:
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,) in [0, num_classes).
        num_classes: Number of labels.
        steps: Optimizer steps.
        latent, width: As :class:`ConditionalGenerator`.
        weight: Factor on the divergence; less gives sharper images and a rougher latent space.
        generator: For initial weights, batches and noise: the same gives the same network.
        progress: Told (steps done, steps, mean loss per image of the last 50 steps).

    Returns:
        The decoder, in eval mode, its parameters frozen.

    Raises:
        DataError: Images or labels that do not fit.
        ConfigError: Settings out of range.
    """
    _check_data(images, labels, num_classes)
    if steps < 1 or weight < 0:
        raise ConfigError(f"got steps {steps}, weight {weight}; expected steps >= 1, weight >= 0.")
    channels, height, wide = images.shape[1:]
    with borrowed(generator):
        decoder = ConditionalGenerator(
            latent=latent,
            width=width,
            image_shape=(channels, height, wide),
            num_classes=num_classes,
        )
        encoder = _Encoder(decoder)
    _fit(decoder, encoder, images, labels, steps, weight, generator, progress)
    _freeze(decoder)
    return decoder


def _fit(
    decoder: ConditionalGenerator,
    encoder: _Encoder,
    images: Tensor,
    labels: Tensor,
    steps: int,
    weight: float,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """The steps of :func:`train_generator`, in place."""
    both = nn.ModuleList([decoder, encoder])
    optimizer = torch.optim.Adam(both.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recent: list[float] = []
    for step in range(steps):
        pick = torch.randint(len(images), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, decoder.latent, generator=generator)
        loss = _bound(decoder, encoder, images[pick], labels[pick], noise, weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], float(loss.detach())]
        if progress is not None and (step % 50 == 49 or step == steps - 1):
            progress(step + 1, steps, sum(recent) / len(recent))


def _bound(
    decoder: ConditionalGenerator,
    encoder: _Encoder,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    weight: float,
) -> Tensor:
    """Minus the evidence lower bound per image (Kingma and Welling 2014, equation 10)."""
    mean, log_variance = encoder(x, y)
    made = decoder(mean + noise * (log_variance / 2).exp(), y)
    likelihood: Tensor = binary_cross_entropy(made, x, reduction="sum")
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    bound: Tensor = (likelihood + weight * divergence) / len(x)
    return bound


def save_generator(
    path: str | os.PathLike[str],
    model: ConditionalGenerator,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes ``path`` (safetensors) and, beside it, ``path`` + ``.json`` with its settings.

    Args:
        path: Ends with ``.safetensors``; its folder must exist.
        model: As :func:`train_generator` made it.
        facts: More to keep in the JSON file: how it was trained.

    Raises:
        OutputError: A file cannot be written.
    """
    form = {
        "latent": model.latent,
        "width": model.width,
        "image_shape": list(model.image_shape),
        "num_classes": model.num_classes,
    }
    # First the settings: a crash in between leaves no tensor file that cannot be read.
    files.write_json(f"{path}.json", {"kind": KIND, "form": form, "facts": facts or {}})
    files.write_tensors(path, model.state_dict(), {"kind": KIND})


def load_generator(path: str | os.PathLike[str]) -> ConditionalGenerator:
    """The generator :func:`save_generator` wrote, in eval mode, its parameters frozen.

    Raises:
        CheckpointError: A file is missing, damaged, or the two do not belong together.
    """
    side = files.read_json(f"{path}.json")
    tensors, meta = files.read_tensors(path)
    try:
        if side["kind"] != KIND or meta.get("kind") != KIND:
            raise ValueError(f"kinds {side['kind']!r} and {meta.get('kind')!r}")
        form = side["form"]
        with borrowed(torch.Generator()):
            model = ConditionalGenerator(**{**form, "image_shape": tuple(form["image_shape"])})
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} and {path}.json are no generator of FedKL ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Train it again (fedkl.attacks.train_generator)."
        ) from error
    _freeze(model)
    return model


def cached_generator(
    folder: str | os.PathLike[str],
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    **settings: Any,
) -> ConditionalGenerator:
    """The generator for these images, settings and randomness: from ``folder``, or trained there.

    Args:
        folder: Made if need be. The file's name is a digest of everything the result depends on.
        images, labels, num_classes, progress: As :func:`train_generator`.
        generator: As there; it moves on only when the generator is trained.
        settings: ``steps``, ``latent``, ``width``, ``weight`` of :func:`train_generator`.

    Raises:
        DataError, ConfigError: As :func:`train_generator`.
        CheckpointError: The file is there and damaged.
        OutputError: The folder cannot be written.
    """
    _check_data(images, labels, num_classes)
    digest = hashlib.sha256()
    form = [KIND, torch.__version__, list(images.shape), num_classes, sorted(settings.items())]
    for part in (json.dumps(form).encode(), *map(_bytes, (images, labels, generator.get_state()))):
        digest.update(hashlib.sha256(part).digest())
    path = files.make_folder(folder) / f"generator-{digest.hexdigest()[:32]}.safetensors"
    if path.exists():
        return load_generator(path)
    model = train_generator(
        images, labels, num_classes, generator=generator, progress=progress, **settings
    )
    save_generator(path, model, {"settings": settings, "images": len(images)})
    return model


def check_generator(model: object) -> int:
    """The latent length of a generator.

    Raises:
        AttackError: ``model`` is no ``nn.Module`` with an integer attribute ``latent``.
    """
    latent = getattr(model, "latent", None)
    if not isinstance(model, nn.Module) or not isinstance(latent, int) or latent < 1:
        raise AttackError(
            f"got a {type(model).__name__} with latent {latent!r} as generator; expected an "
            "nn.Module with an integer attribute latent that maps noise (N, latent) and labels "
            "(N,) to images (N, C, H, W) in [0, 1]."
        )
    return latent


def _check_data(images: Tensor, labels: Tensor, num_classes: int) -> None:
    fits = images.dim() == 4 and labels.shape == images.shape[:1] and len(images) > 0
    if not fits or not images.is_floating_point() or labels.dtype != torch.int64:
        raise DataError(
            f"got images {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)} "
            f"{labels.dtype}; expected float (N, C, H, W) and int64 (N,) with N >= 1."
        )
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1 or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"got pixels in [{low:.3g}, {high:.3g}], labels in [{int(labels.min())}, "
            f"{int(labels.max())}]; expected pixels in [0, 1], labels in [0, {num_classes})."
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _freeze(model: nn.Module) -> None:
    model.eval().requires_grad_(False)
