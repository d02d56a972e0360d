"""An update from two weight files, against one that torch made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkl import at_length
from fedkl.attacks.labels import infer_labels
from fedkl.attacks.network import Network
from fedkl.audit.steps import UpdateConfig
from fedkl.audit.update import attackers, audit_update, observe_update
from fedkl.errors import AttackError, ConfigError, StateError
from fedkl.federation import TrainingConfig
from fedkl.federation.length import length_of
from fedkl.models import build
from fedkl.rng import derive

State = dict[str, Tensor]
LR = 0.1


def config(**settings: Any) -> UpdateConfig:
    return UpdateConfig(num_classes=4, channels=1, image_size=16, lr=LR, **settings)


def made(
    model: str, steps: int = 1, batch: int = 3, *, wide: bool = False
) -> tuple[State, State, Tensor, Tensor]:
    """Before, after, images and labels of SGD in train mode; ``wide``: weights within ±0.5."""
    net = build(model, num_classes=4, channels=1, image_size=16, generator=derive(0, "model"))
    if wide:
        for parameter in net.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=derive(0, "wide"))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    x = torch.rand(steps * batch, 1, 16, 16, generator=derive(0, "x"))
    y = torch.arange(steps * batch) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
        optimizer.zero_grad()
        cross_entropy(net(xs), ys).backward()
        optimizer.step()
    return before, {n: t.clone() for n, t in net.state_dict().items()}, x, y


def test_a_pruned_update_is_told_by_its_ratio() -> None:
    assert UpdateConfig.from_dict({"prune_ratio": 0.9}).training.prune_ratio == 0.9
    with pytest.raises(ConfigError, match=r"prune_ratio must be in \[0, 1\), got 1"):
        UpdateConfig.from_dict({"prune_ratio": 1})


def test_nesterov_without_momentum_is_refused_as_in_a_run() -> None:
    messages = set()
    for make in (lambda: config(nesterov=True), lambda: TrainingConfig(momentum=0.0)):
        with pytest.raises(
            ConfigError, match=r"nesterov needs .*got 0.*nesterov = false"
        ) as caught:
            make()
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert config(nesterov=True, momentum=0.5).training.nesterov


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_true_images_explain_the_update_and_its_statistics(model: str, steps: int) -> None:
    before, after, x, y = made(model, steps)
    seen = observe_update(model, config(batch_size=3, local_steps=steps), before, after)
    network = Network(seen)
    targets = torch.nn.functional.one_hot(y, 4).float()
    change, heard = network.sent({}, x, targets)
    scale = max(float(t.abs().max()) for t in seen.changes[0].values())
    for name, value in seen.changes[0].items():
        torch.testing.assert_close(change[name], value, rtol=1e-2, atol=1e-3 * scale)
    assert bool(seen.statistics) == bool(heard) == (model == "resnet20")
    if heard:
        told = network.statistics.observed(seen.statistics[0])
        assert set(told) == set(heard)
        for name in told:
            torch.testing.assert_close(heard[name], told[name], rtol=1e-2, atol=1e-3)
        other, _ = network.sent({}, x.flip(0), targets)
        assert any(not torch.allclose(other[n], change[n], rtol=1e-2) for n in change)


def test_statistics_that_did_not_move_are_none() -> None:
    before, after, *_ = made("resnet20")
    still = {n: before[n] if "running" in n or "tracked" in n else t for n, t in after.items()}
    assert observe_update("resnet20", config(batch_size=3), before, still).statistics == ()
    gradients = {n: before[n] - t for n, t in after.items()}
    found = observe_update("resnet20", config(batch_size=3), before, gradients, gradient=True)
    assert found.statistics == ()


def test_a_gradient_needs_no_buffers() -> None:
    before, after, *_ = made("resnet20")
    names = {n for n in before if "running" not in n and "tracked" not in n}
    gradient = {n: (before[n] - after[n]) / LR for n in names}
    seen = observe_update("resnet20", config(batch_size=3), before, gradient, gradient=True)
    assert seen.statistics == ()
    assert seen.changes[0].keys() == names
    del gradient["conv1.weight"]
    with pytest.raises(StateError, match=r"missing conv1\.weight"):
        observe_update("resnet20", config(batch_size=3), before, gradient, gradient=True)


def test_a_gradient_is_an_update_of_one_step() -> None:
    before, after, *_ = made("lenet", batch=1)
    gradient = {n: (before[n] - after[n]) / LR for n in before}
    update = observe_update("lenet", config(), before, after)
    direct = observe_update("lenet", config(), before, gradient, gradient=True)
    assert update.kind == direct.kind == "gradient"
    for name, value in direct.changes[0].items():
        torch.testing.assert_close(update.changes[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps, gradient", [(1, True), (1, False), (2, False)])
def test_the_true_images_explain_an_update_of_one_length(steps: int, gradient: bool) -> None:
    """Whatever the rate, and at the length that is seen, if another one was said."""
    before, after, x, y = made("lenet", steps, wide=True)  # has no buffers
    sent = at_length(after, 0.7, received=before)
    if gradient:
        sent = {n: before[n] - value for n, value in sent.items()}
    given = config(update_length=3.0, batch_size=3, local_steps=steps)
    seen = observe_update("lenet", given, before, sent, gradient=gradient)
    change, _ = Network(seen).sent({}, x, torch.nn.functional.one_hot(y, 4).float())
    for name, value in seen.changes[0].items():
        torch.testing.assert_close(change[name], value, rtol=1e-2, atol=1e-3)
    assert length_of(change) == pytest.approx(length_of(seen.changes[0]), rel=1e-3)


def without_rate(**settings: Any) -> UpdateConfig:
    return UpdateConfig(num_classes=4, channels=1, image_size=16, **settings)


def test_the_true_images_explain_an_update_whose_rate_is_not_told() -> None:
    """The change is the gradient times what nobody knows: it must not pass for the gradient."""
    before, after, x, y = made("lenet", wide=True)
    seen = observe_update("lenet", without_rate(batch_size=3), before, after)
    change, _ = Network(seen).sent({}, x, torch.nn.functional.one_hot(y, 4).float())
    for name, value in seen.changes[0].items():
        torch.testing.assert_close(change[name], value, rtol=1e-2, atol=1e-4)
    with pytest.raises(AttackError, match=r"learning rate is not known.*labels = "):
        infer_labels(seen, Network(seen))
    # A gradient has been scaled by no rate: its size is known.
    gradient = {n: (before[n] - after[n]) / LR for n in before}
    direct = observe_update("lenet", without_rate(batch_size=3), before, gradient, gradient=True)
    assert direct.training.length is None
    assert infer_labels(direct, Network(direct)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_searches_find_the_image_without_a_rate(tmp_path: Path, name: str) -> None:
    before, after, x, y = made("lenet", batch=1, wide=True)
    seen = observe_update("lenet", without_rate(), before, after)
    found = audit_update(seen, attackers([name], seen, effort="quick"), tmp_path, truth=x)
    (entry,) = found["attacks"]
    assert entry["labels"] == y.tolist()
    assert entry["ssim"][0] > 0.5


def test_what_is_found_is_the_image(tmp_path: Path) -> None:
    before, after, x, y = made("lenet", batch=1, wide=True)
    seen = observe_update("lenet", config(), before, after)
    names = ["idlg"]
    found = audit_update(seen, attackers(names, seen, effort="quick"), tmp_path, truth=x)
    (entry,) = found["attacks"]
    assert entry["labels"] == y.tolist()
    assert entry["ssim"][0] > 0.5
    assert (tmp_path / entry["pictures"][0]).exists()
