"""(e) Inverting Gradients here and in ``breaching`` 0.1.2: throughput, and time to a likeness.

The same victim (network, weights, image), loss (cosine distance plus total variation), optimizer
(signed Adam, the same decay and box) and thread count, in two child processes that take turns. A
unit of work is one iteration of one trial; preparation, and the scores by which ``breaching``
chooses among trials, are subtracted: a sample is the time of its iterations minus that of one.
``breaching`` runs trials one after another, FedKL as one batch. Time to SSIM 0.9: plain Adam on
both sides, which finds more than signed steps on images in [0, 1]; both start from Gaussian noise
of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import HERE, ROOT, Note, Row, Stepper, ask, in_turns, ratio_row

PYTHON = ROOT / ".venv-breaching" / "bin" / "python"
# model, image size, trials, iterations a sample, target
SHAPES = (
    ("lenet", 32, 1, 101, ""),
    ("lenet", 32, 64, 11, ">= 5"),
    ("resnet20", 32, 1, 11, ""),
    ("resnet20", 32, 64, 3, ">= 1.5"),
)
BUDGETS = (2000, 3000, 4000)  # iterations tried in turn until SSIM 0.9
VICTIMS, LIKENESS = 3, 0.9
TV = 1e-6


def measure(repeats: int, quick: bool, note: Note) -> list[Row]:
    """Rows of part (e): about 20 s per repeat on a quiet core, and four minutes besides."""
    if not PYTHON.exists():
        subprocess.run([str(HERE / "setup-breaching.sh")], check=True)
    rows = []
    for model, size, trials, iterations, target in SHAPES[:1] if quick else SHAPES:
        shape = {"model": model, "size": size, "trials": trials, "iterations": iterations}
        note(f"(e) {model}, {trials} trial(s): {repeats} pairs of {iterations} iterations")
        rows.append(_throughput(shape, repeats, target, note))
    if not quick:
        note(f"(e) time to SSIM {LIKENESS} on {VICTIMS} images")
        rows.append(_time_to_likeness())
        note("(e) ResNet-18 at 224x224")
        rows.append(_large())
    return rows


def _throughput(shape: Mapping[str, Any], repeats: int, target: str, note: Note) -> Row:
    children = {
        "breaching": Stepper("attacks.py", {**shape, "role": "theirs"}, str(PYTHON)),
        "fedkl": Stepper("attacks.py", {**shape, "role": "ours"}),
    }
    answers = in_turns(children, repeats, note)
    for child in children.values():
        child.close()
    wall = {name: [one["wall"] for one in found] for name, found in answers.items()}
    cpu = {name: [one["cpu"] for one in found] for name, found in answers.items()}
    work = shape["trials"] * (shape["iterations"] - 1)
    pace = ", ".join(f"{name} {work / sorted(c)[len(c) // 2]:.0f}" for name, c in cpu.items())
    return ratio_row(
        "e",
        f"breaching / FedKL, Inverting Gradients, {shape['model']} {shape['size']}², "
        f"{shape['trials']} trial(s)",
        ("breaching", "fedkl"),
        wall,
        cpu=cpu,
        target=target,
        note=f"trial-iterations a processor second: {pace}",
    )


def _time_to_likeness() -> Row:
    # Without total variation: breaching's takes three channels for granted.
    settings = {"model": "lenet", "size": 32, "channels": 1, "trials": 1, "tv": 0.0}
    settings["role"] = "likeness"
    theirs = ask("attacks.py", {**settings, "who": "theirs"}, str(PYTHON))
    ours = ask("attacks.py", {**settings, "who": "ours"})
    what = f"breaching / FedKL, time to mean SSIM {LIKENESS}, LeNet, {VICTIMS} Fashion-MNIST images"
    samples = {"breaching [s]": [theirs["wall"]], "fedkl [s]": [ours["wall"]]}
    words = "; ".join(
        f"{name}: {found['wall']:.0f} s, {found['iterations']} iterations, SSIM {found['ssim']:.3f}"
        for name, found in (("breaching", theirs), ("FedKL", ours))
    )
    reached = min(theirs["ssim"], ours["ssim"]) >= LIKENESS
    figure = theirs["wall"] / ours["wall"] if reached else None
    return Row("e", what, figure, None, None, ">= 1", samples, words)


def _large() -> Row:
    found = ask(
        "attacks.py",
        {"model": "resnet18", "size": 224, "trials": 1, "iterations": 3, "role": "once"},
    )
    pace = found["wall"] / 3
    return Row(
        "e",
        "Inverting Gradients, ResNet-18 224², one trial: seconds an iteration",
        pace,
        samples={"fedkl [s]": [found["wall"]]},
        note=f"3 iterations, loss {found['losses'][0]:.4f} → {found['losses'][-1]:.4f}",
    )


def _victim(settings: Mapping[str, Any], number: int = 0) -> tuple[Any, Any, Any, Any]:
    """Model, image (1, C, S, S), label (1,) and gradient: the same in every child.

    With one channel a Fashion-MNIST test image, else a crop of one of scikit-learn's photographs.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from fedkl.models import build
    from fedkl.rng import derive

    torch.set_num_threads(1)
    generator = derive(0, "victim", settings["model"])
    size, channels = settings["size"], settings.get("channels", 3)
    model = build(
        settings["model"], num_classes=10, channels=channels, image_size=size, generator=generator
    )
    if settings["model"] == "lenet":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    x = _fashion(number) if channels == 1 else _photo(number, size)
    y = torch.tensor([number % 10])
    model.train()
    gradient = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    return model, x, y, [g.detach() for g in gradient]


def _photo(number: int, size: int) -> Any:
    import torch
    from sklearn.datasets import load_sample_image
    from torch.nn.functional import interpolate

    photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])  # 427 x 640
    at = 40 * number
    crop = torch.from_numpy(photo[at : at + 256, at : at + 256].copy())
    return interpolate(crop.permute(2, 0, 1)[None].float() / 255, (size, size), mode="area")


def _fashion(number: int) -> Any:
    import torch

    from fedkl.federation import config_from
    from fedkl.federation.session import load_data

    bundle = load_data(config_from({"data": {"dataset": "fashion-mnist", "channels": 1}}))
    return bundle.test.batch(torch.tensor([number]))[0]


def _ours(settings: Mapping[str, Any], numbers: Sequence[int] = (0,)) -> Callable[..., Any]:
    from fedkl.attacks import InvertingGradients
    from fedkl.observation import OPEN, Observation, Training
    from fedkl.rng import derive

    victims = [_victim(settings, number) for number in numbers]
    model = victims[0][0]
    names = [name for name, _ in model.named_parameters()]
    observations = [
        Observation(
            model=model,
            kind="gradient",
            changes=(dict(zip(names, gradient, strict=True)),),
            image_shape=tuple(x.shape[1:]),
            num_classes=10,
            training=Training(),
            threat=OPEN,
        )
        for _, x, _, gradient in victims
    ]

    def reconstruct(iterations: int, *, signed: bool = True) -> Any:
        attack = InvertingGradients(
            iterations=iterations,
            restarts=settings["trials"],
            tv=settings.get("tv", TV),
            signed=signed,
        )
        return attack.reconstruct(observations, generator=derive(0, "attack"))

    return reconstruct


def _theirs(settings: Mapping[str, Any], number: int = 0) -> Callable[..., Any]:
    from importlib.resources import files

    import breaching
    import torch
    from omegaconf import OmegaConf

    model, x, y, gradient = _victim(settings, number)
    folder = Path(str(files("breaching"))) / "config" / "attack"
    base = OmegaConf.load(folder / "_default_optimization_attack.yaml")
    config = OmegaConf.merge(base, OmegaConf.load(folder / "invertinggradients.yaml"))
    config.restarts.num_trials = settings["trials"]
    config.regularization.total_variation.scale = settings.get("tv", TV)
    metadata = SimpleNamespace(shape=tuple(x.shape[1:]), modality="vision")
    # No buffers: the client trains, its batch norms use the batch's own statistics.
    payload = {
        "metadata": metadata,
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": None,
    }
    user = {"labels": y, "num_data_points": 1, "local_hyperparams": None}
    shared = {"metadata": user, "gradients": gradient, "buffers": None}

    def reconstruct(iterations: int, *, signed: bool = True) -> Any:
        config.optim.max_iterations = iterations
        config.optim.signed = "hard" if signed else None
        attacker = breaching.attacks.prepare_attack(model, torch.nn.CrossEntropyLoss(), config)
        found, _ = attacker.reconstruct([payload], [shared], {})
        return found["data"].clamp(0, 1)

    return reconstruct


def _serve(settings: Mapping[str, Any]) -> None:
    """A sample per line of input."""
    run = (_ours if settings["role"] == "ours" else _theirs)(settings)
    run(2)
    for _ in sys.stdin:
        clocks = [(time.perf_counter(), time.process_time())]
        for iterations in (settings["iterations"], 1):
            run(iterations)
            clocks.append((time.perf_counter(), time.process_time()))
        wall, cpu = (2 * b - a - c for a, b, c in zip(*clocks, strict=True))
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


def _likeness(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the smallest budget that reaches the likeness, all images together."""
    import torch

    from fedkl import metrics

    truth = torch.cat([_victim(settings, number)[1] for number in range(VICTIMS)])
    if settings["who"] == "ours":
        run = _ours(settings, range(VICTIMS))
        every = [lambda n: torch.cat([one.images[0] for one in run(n, signed=False)])]
    else:
        single = [_theirs(settings, number) for number in range(VICTIMS)]
        every = [lambda n, one=one: one(n, signed=False) for one in single]
        torch.manual_seed(0)  # breaching draws its starts from torch's own generator
    every[0](2)
    for budget in BUDGETS:
        start = time.perf_counter()
        images = torch.cat([one(budget) for one in every])
        wall = time.perf_counter() - start
        ssim = float(metrics.ssim(images, truth).mean())
        if ssim >= LIKENESS:
            break
    return {"wall": wall, "iterations": budget, "ssim": ssim}


def _once(settings: Mapping[str, Any]) -> dict[str, Any]:
    run = _ours(settings)
    start = time.perf_counter()
    found = run(settings["iterations"])[0]
    return {"wall": time.perf_counter() - start, "losses": list(found.losses)}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["role"] in ("ours", "theirs"):
        _serve(given)
    else:
        print(json.dumps({"likeness": _likeness, "once": _once}[given["role"]](given)))
