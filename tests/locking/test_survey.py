"""What ``lockable`` lists, and every kind of layer: supported, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, lockable

from .zoo import IMAGE, SMALL, Tokens

KEY = Key.generate()


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3))


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.LSTM(3, 4), "recurrent"),
    (lambda: nn.GRU(3, 4), "recurrent"),
    (lambda: nn.RNN(3, 4), "recurrent"),
    (lambda: nn.GRUCell(3, 4), "recurrent"),
    (lambda: nn.MultiheadAttention(4, 2), "attention"),
    (lambda: nn.Embedding(3, 4), "looks rows up"),
    (lambda: nn.EmbeddingBag(3, 4), "looks rows up"),
    (lambda: nn.Bilinear(3, 4, 5), "not supported"),
    (lambda: nn.LocalResponseNorm(2), "no scale and shift"),
    (lambda: nn.PReLU(), "no scale and shift that a lock could take over"),
    (lambda: nn.LazyBatchNorm2d(), "lazy"),
    (lambda: nn.LazyConv2d(3, 3), "lazy"),
    (lambda: torchvision.ops.FrozenBatchNorm2d(4), "frozen"),
    (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), "parametrized"),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "parametrized"),
    (old_weight_norm, "parametrized"),
    (lambda: nn.LayerNorm([3, 256, 256]), "more than 65536 scales"),
]


@pytest.mark.parametrize("factory, reason", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_with_a_reason(factory: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(factory())
    row = next(r for r in lockable(model) if r.name == "0")
    assert not row.lockable
    assert reason in row.reason
    assert row.features == 0
    with pytest.raises(LockError, match=r"cannot lock 0: |is lazy"):
        lock(model, KEY, layers="0", inplace=True)


SUPPORTED: list[Callable[[], nn.Module]] = [
    *(factory for kind, (factory, _) in SMALL.items() if kind != "tokens"),
    lambda: nn.Sequential(nn.SyncBatchNorm(4), nn.Linear(4, 2)),
    lambda: nn.Sequential(nn.InstanceNorm3d(4, affine=True), nn.Linear(4, 2)),
    lambda: nn.Sequential(torchvision.ops.misc.Conv2dNormActivation(3, 4)),
    lambda: nn.Sequential(torchvision.models.convnext.LayerNorm2d(4), nn.Linear(4, 2)),
]


@pytest.mark.parametrize("factory", SUPPORTED)
def test_whatever_is_lockable_can_be_locked(factory: Callable[[], nn.Module]) -> None:
    model = factory()
    rows = [r for r in lockable(model) if r.lockable]
    assert rows
    for row in rows:
        norm = "norm" in row.kind
        if not norm and any("norm" in r.kind for r in rows):
            continue  # where a norm stands behind, only an example tells
        (site,) = lock_spec(lock(model, KEY, layers=[row.name])).sites
        assert site.inserted is not norm
        features = 1
        for size in site.shape:
            features *= size
        assert features == row.features
        total = sum(p.numel() for p in model.parameters())
        assert row.added_share == pytest.approx(2048 * features / max(total, 1))


def test_a_model_that_cannot_be_copied_says_so() -> None:
    with pytest.raises(LockError, match=r"cannot be copied .*inplace=True"):
        lock(old_weight_norm(), KEY)


def test_lockable_lists_every_module_with_tensors_once() -> None:
    names = [row.name for row in lockable(Tokens())]
    assert len(names) == len(set(names))
    assert {"embed", "layer.self_attn", "layer.self_attn.out_proj", "layer.norm2", "head"} <= {
        *names
    }
    locked = lock(SMALL["no norm"][0](), KEY, example=IMAGE)
    rows = {row.name: row for row in lockable(locked)}
    for name in ("0", "0.inserted_norm"):
        assert rows[name].reason == "already locked; unlock the model first"


def test_lazy_models_are_locked_after_their_first_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten())
    with pytest.raises(LockError, match=r"0\.weight.* is lazy; run the model once"):
        lock(model, KEY, example=IMAGE)
    model(IMAGE)
    (site,) = lock_spec(lock(model, KEY, example=IMAGE)).sites
    assert (site.name, site.shape) == ("1", (4,))


def test_sync_batch_norm_is_locked_like_any_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(sync[1]) is nn.SyncBatchNorm
    with torch.no_grad():
        a, b = (lock(m, KEY, layers="1").eval()(IMAGE) for m in (model, sync))
    assert torch.equal(a, b)


def test_a_frozen_batch_norm_gets_a_norm_in_front() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torchvision.ops.FrozenBatchNorm2d(4), nn.Flatten())
    (site,) = lock_spec(lock(model, KEY, layers="first", example=IMAGE)).sites
    assert site.name == "0.inserted_norm"
