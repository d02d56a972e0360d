"""A lock without effect is an error, and the check leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import affines, is_locked, lock, set_key

from .zoo import IMAGE, SMALL, Dead, Tokens, images

KEY = Key.generate()
ENCODER = images(3, 5, 16)


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("dead", ["unused", "canceled"])
def test_a_dead_module_is_an_error(dead: str, chain: bool) -> None:
    """In the chained form too, where a dead lock still feeds the next one."""
    model = Dead()
    with pytest.raises(LockError, match=rf"do not change the output on this example: {dead}\."):
        lock(model, KEY, layers=["bn", dead], chain=chain, example=IMAGE)
    with pytest.raises(LockError, match=r"canceled, unused"):
        lock(model, KEY, chain=chain, example=IMAGE)
    lock(model, KEY, layers="bn", chain=chain, example=IMAGE)


@pytest.mark.parametrize("layers", ["all", "bn|unused", "first"])
def test_a_failed_lock_in_place_leaves_the_model_as_it_was(layers: str) -> None:
    model = Dead() if layers != "first" else nn.Conv2d(3, 4, 8)  # one value per channel and image
    x = IMAGE if layers != "first" else IMAGE[:1]
    before = [(type(m), list(m._modules), list(m._parameters)) for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(LockError):
        lock(model, KEY, layers=layers, example=x, inplace=True)
    assert not is_locked(model)
    assert [(type(m), list(m._modules), list(m._parameters)) for m in model.modules()] == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_a_failure_half_way_is_undone_and_reported_as_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(LockError, match="instance norm behind a linear layer"):
        lock(model, KEY, layers=["0", "3"], norm="instance", example=IMAGE, inplace=True)
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]


def test_the_fused_path_of_an_encoder_layer_uses_the_lock() -> None:
    """In eval and no-grad mode it reads norm1.weight without calling norm1."""
    model = lock(encoder(), KEY, layers=["norm1", "norm2"], example=ENCODER).eval()
    called = []
    model.get_submodule("norm1").register_forward_pre_hook(lambda *_: called.append(1))
    slow = model(ENCODER)
    assert called
    del model.get_submodule("norm1")._forward_pre_hooks[next(iter(
        model.get_submodule("norm1")._forward_pre_hooks))]  # fmt: skip
    with torch.no_grad():
        fast = model(ENCODER)
    torch.testing.assert_close(fast, slow.detach(), rtol=0, atol=1e-5)
    set_key(model, Key.generate())
    with torch.no_grad():
        assert float((model(ENCODER) - fast).abs().max()) > 0.1


@pytest.mark.parametrize("zero_head", [False, True])
def test_a_layer_that_the_fused_path_reads_past_is_an_error(zero_head: bool) -> None:
    model = Tokens()
    if not zero_head:
        nn.init.normal_(model.head.weight)
    with pytest.raises(LockError, match=r"in no-grad mode .*past these locks: layer\.linear1"):
        lock(model, KEY, layers="layer.linear1", example=SMALL["tokens"][1])


@pytest.mark.parametrize(
    "layers, reason",
    [
        ("self_attn", "attention reads its weights directly"),
        ("self_attn.out_proj", "inside attention"),
    ],
)
def test_attention_is_refused_with_a_reason(layers: str, reason: str) -> None:
    with pytest.raises(LockError, match=reason):
        lock(encoder(), KEY, layers=layers, example=ENCODER)


class Skips(nn.Module):
    """Leaves its norm out in eval mode although the block around it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.conv, self.block.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block.conv(x)
        out: Tensor = self.block.bn(x) if self.training else x
        return out.flatten(1)


def test_a_norm_skipped_in_eval_mode_is_an_error() -> None:
    with pytest.raises(LockError, match=r"in eval mode .*block\.bn"):
        lock(Skips(), KEY, layers="block.bn", example=IMAGE)


class Residual(nn.Module):
    """A block that is dropped for the whole batch nine times out of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.drop = StochasticDepth(0.8, "batch")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.bn(self.conv(x)))
        return out.flatten(1)


def test_stochastic_depth_does_not_hide_a_lock() -> None:
    model = nn.Sequential(Residual(), nn.Flatten())
    assert set(affines(lock(model, KEY, example=IMAGE))) == {"0.bn"}


@pytest.mark.parametrize("seed", range(8))
def test_one_channel_behind_a_relu_can_be_locked(seed: int) -> None:
    """Its own γ and β may well silence the ReLU; that is no fault of the model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten())
    assert affines(lock(model, Key.generate(), example=IMAGE))["1"][0].shape == (1,)


@pytest.mark.parametrize("kind", ["batch", "no norm", "tokens", "auxiliary head", "instance"])
def test_the_check_leaves_no_trace(kind: str) -> None:
    factory, example = SMALL[kind]
    model = factory().eval()
    model.requires_grad_(False)
    first = next(model.children())
    first.train()
    states = torch.get_rng_state()
    layers = "layer.norm1" if kind == "tokens" else "all"
    locked = lock(model, KEY, layers=layers, example=example)
    assert torch.equal(states, torch.get_rng_state())
    before = model.state_dict()
    after = locked.state_dict()
    kept = [n for n in before if n in after]
    assert kept
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert not locked.training
    assert next(locked.children()).training
    assert all(p.grad is None for p in locked.parameters())
    assert all(s._witness is None for s in locked.modules() if hasattr(s, "_witness"))


class Counter(nn.Module):
    """Its forward has a side effect."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.fc(x)
        return out


def test_the_argument_does_not_run() -> None:
    model = Counter()
    lock(model, KEY, layers="fc", example=images(4, 4))
    assert model.calls == 0


@pytest.mark.parametrize(
    "model, example, message",
    [
        (
            nn.Conv2d(3, 4, 3),
            images(2, 5, 8, 8),
            r"the example \(Tensor of \(2, 5, 8, 8\)\): RuntimeError",
        ),
        (nn.Conv2d(3, 4, 3), [IMAGE], r"does not run on the example \(list of \(4, 3, 8, 8\)\)"),
        (nn.Conv2d(3, 4, 8), IMAGE[:1], "train mode.*at least two inputs"),
    ],
)
def test_examples_that_do_not_fit(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(LockError, match=message):
        lock(model, KEY, layers="first", example=example)


def test_one_value_per_channel_is_fine_with_a_group_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    locked = lock(model, KEY, layers="1", norm="group", example=IMAGE[:1]).eval()
    assert not torch.equal(locked(IMAGE[:1]), locked(IMAGE[1:2]))  # the norm leaves something


class Checkpointed(nn.Module):
    """What lies in between is computed once more on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.bn, self.conv(x), use_reentrant=False)
        out: Tensor = self.fc(y.relu().mean((2, 3)))
        return out


@pytest.mark.parametrize("scheme", ["channel", "pad"])
def test_activation_checkpointing_asks_for_a_lock_twice(scheme: str) -> None:
    settings = {"head": False} if scheme == "pad" else {}
    model = lock(Checkpointed(), KEY, scheme=scheme, example=IMAGE, **settings)
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.get_submodule("bn.keylock").parameters())
