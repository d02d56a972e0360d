"""The group key: all clients' locks start alike, and only the key decides what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkl.errors import DataError, LockError
from fedkl.key import Key
from fedkl.locking import (
    Channel,
    affines,
    calibrate,
    lock,
    merge,
    private_state,
    restart_lock,
    set_key,
    shared_state,
    unlock,
)

ALICE, BOB, GROUP = (Key._of("seed", bytes([n]) * 32) for n in (1, 2, 3))
X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 48, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3072, 5),
    )


@pytest.mark.parametrize("settings", [{}, {"spread": 2.0, "gain": 1.0}, {"chain": True}])
def test_clients_of_a_group_start_alike(settings: dict[str, object]) -> None:
    a, b = (lock(network(), k, example=X, group=GROUP, **settings) for k in (ALICE, BOB))
    for name, (scale, shift) in affines(a).items():
        torch.testing.assert_close((scale, shift), affines(b)[name], rtol=1e-4, atol=1e-4)
        spread = settings.get("spread", Channel().spread)
        torch.testing.assert_close(
            scale.abs(), torch.full_like(scale, spread), rtol=1e-4, atol=1e-4
        )
        assert 0.3 < (scale > 0).float().mean() < 0.7, "signs are random"
    other = affines(lock(network(), ALICE, group=BOB))
    assert any((other[n][0] * v[0] < 0).any() for n, v in affines(a).items())


def test_lock_weights_still_depend_on_the_own_key() -> None:
    a, b = (dict(lock(network(), k, group=GROUP).named_parameters()) for k in (ALICE, BOB))
    name = "0.inserted_norm.keylock.scale_weight"
    agreement = torch.corrcoef(torch.stack([a[name].flatten(), b[name].flatten()]))[0, 1]
    assert abs(agreement) < 0.05


def test_a_wrong_key_hears_nothing_of_the_group() -> None:
    model = lock(network(), ALICE, group=GROUP)
    right = torch.cat([scale for scale, _ in affines(model).values()])
    correlations = []
    for n in range(20):
        set_key(model, Key._of("seed", bytes([100 + n]) * 32))
        wrong = torch.cat([scale for scale, _ in affines(model).values()])
        correlations.append(float(torch.corrcoef(torch.stack([right, wrong]))[0, 1]))
    # 112 independent channels: a correlation has a standard deviation of 0.095.
    assert abs(sum(correlations) / 20) < 0.08
    set_key(model, ALICE)
    torch.testing.assert_close(torch.cat([s for s, _ in affines(model).values()]), right)


def test_restart_is_the_start() -> None:
    model = lock(network(), ALICE, group=GROUP)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    restart_lock(model, BOB, GROUP)
    restart_lock(model, ALICE, GROUP)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["paper", "paper-sigmoid", "fedbn", "norm"])
def test_schemes_without_a_start_of_their_own_refuse_a_group(scheme: str) -> None:
    with pytest.raises(LockError, match="leave group out"):
        lock(network(), ALICE, scheme=scheme, example=X, group=GROUP)


def test_calibrate_is_the_mean_over_batches_and_touches_private_norms_only() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    model = lock(net, ALICE, layers=["1"])
    model.train()
    shared = {n: t.clone() for n, t in shared_state(model).items()}
    with torch.no_grad():
        features = [model[0](part) for part in X.split(2)]
    calibrate(model, X.split(2))
    expected = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    expected = torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0)
    torch.testing.assert_close(model[1].running_var, expected)
    assert all(torch.equal(t, shared[n]) for n, t in shared_state(model).items())
    assert model[1].momentum == 0.1
    assert all(m.training for m in model.modules())
    calibrate(model, X.split(2), every_norm=True)
    assert not torch.equal(shared_state(model)["3.running_mean"], shared["3.running_mean"])


def test_a_group_start_of_zero_shifts_is_finite_along_a_chain() -> None:
    model = lock(network(), ALICE, example=X, group=GROUP, chain=True, shift_spread=0.0)
    assert all(torch.isfinite(t).all() for t in private_state(model).values())
    assert all((shift == 0).all() for _, shift in affines(model).values())


def test_keys_that_resemble_each_other_refuse_a_group() -> None:
    # Two vectors of U(0, 1) have a cosine of 0.75: every key would open the start of every other.
    with pytest.raises(LockError, match="leave group out"):
        lock(network(), ALICE, law="uniform", group=GROUP)


def test_restart_clears_a_bias() -> None:
    model = lock(network(), ALICE, bias=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.fill_(7.0)
    restart_lock(model, ALICE)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def normed() -> nn.Module:
    """A network whose own norm has seen (other) images."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 5))
    net(X)
    return net


def test_restart_and_unlock_give_the_statistics_before_locking() -> None:
    net = normed()
    before = {n: t.clone() for n, t in net.named_buffers()}
    model = lock(net, ALICE, example=X)
    model(X + 3)  # private features move private statistics
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    public = dict(unlock(model).named_buffers())
    assert all(torch.equal(public[n], t) for n, t in before.items())
    assert torch.equal(merge(model)[1].running_mean, model[1].running_mean), "merge keeps them"
    restart_lock(model, ALICE)
    assert all(torch.equal(dict(model.named_buffers())[n], t) for n, t in before.items())


def test_unlock_keeps_statistics_that_are_shared_anyway() -> None:
    model = lock(normed(), ALICE, example=X, share_statistics=True)
    model(X + 3)
    assert torch.equal(unlock(model)[1].running_mean, model[1].running_mean)


def test_calibrate_without_batches_or_interrupted_changes_nothing() -> None:
    model = lock(normed(), ALICE, example=X)
    before = {n: t.clone() for n, t in model.named_buffers()}
    with pytest.raises(DataError, match="no batch"):
        calibrate(model, [])
    with pytest.raises(RuntimeError, match="channels"):
        calibrate(model, [X + 1, X[:, :2]])
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers())
    assert model[1].momentum == 0.1
