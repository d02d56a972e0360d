"""The pad scheme: its formulas against a naive reference, what is private, renewal, errors."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError, SecretError
from fedkl.key import Key
from fedkl.locking import (
    Pad,
    affines,
    check_optimizer,
    epoch_of,
    load_private_state,
    load_shared_state,
    lock,
    lock_like,
    lock_spec,
    private_state,
    renew,
    restart_lock,
    set_key,
    shared_state,
    sources_of,
    unlock,
)
from fedkl.locking.pad import LEARNED, SCALE_LAWS
from fedkl.rng import derive

from .zoo import IMAGE, SMALL, Tokens, TwoParents, images

KEY = Key._of("seed", bytes(range(32)))  # the same in every run: figures below depend on it
OTHER = Key._of("seed", bytes(range(1, 33)))


def net(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def deep() -> nn.Sequential:
    """With a layer left to share where stem and head are private."""
    return nn.Sequential(*net(nn.BatchNorm2d(4))[:4], nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 3))


def padded(*, head: bool = False, **kwargs: Any) -> nn.Module:
    return lock(net(nn.BatchNorm2d(4)), KEY, scheme="pad", head=head, example=IMAGE, **kwargs)


def reference(x: Tensor, kind: str, eps: float = 1e-5) -> Tensor:
    """The norm alone, by its definition."""
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3), "group": (2, 3, 4)}[kind]
    shape = x.shape
    if kind == "group":
        x = x.reshape(shape[0], 2, -1, *shape[2:])
    if kind == "rms":
        return x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return ((x - mean) / (variance + eps).sqrt()).reshape(shape)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "group": lambda: nn.GroupNorm(2, 4),
}


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(NORMS)),
    learned=st.sampled_from(LEARNED),
    law=st.sampled_from(sorted(SCALE_LAWS)),
    spread=st.floats(0.1, 30),
    gain=st.floats(0.5, 10),
)
def test_lock_computes_scale_times_norm_plus_shift(
    kind: str, learned: str, law: str, spread: float, gain: float
) -> None:
    model = net(NORMS[kind]())
    scheme = Pad(learned=learned, scale_law=law, spread=spread, gain=gain)
    locked = lock(model, KEY, scheme=scheme, example=IMAGE)
    source = sources_of(locked)["1"]
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn(p.shape, generator=derive(3, "learned")))
    pad = Pad(scale_law=law).draw("1", (4, 6, 6), KEY, 0, spread=spread)
    gamma, beta = pad[0], pad[1]
    if learned != "none":
        entries = {"batch": 4, "instance": 4, "group": 4, "layer": 144}[kind]
        factor = gain * math.sqrt(144 / entries if learned == "position" else 1)
        gamma = gamma + factor * source.scale_learned
        beta = beta + factor * source.shift_learned
    x = locked[0](IMAGE)  # type: ignore[index, operator]
    want = gamma * reference(x, kind) + beta
    got = locked.train()[1](x)  # type: ignore[index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_step_moves_the_lock_by_the_square_of_the_gain() -> None:
    model, moved = net(nn.BatchNorm2d(4)), {}
    for gain in (1.0, 3.0):
        locked = lock(model, KEY, scheme=Pad(gain=gain), example=IMAGE)
        before = affines(locked)["1"]
        parameters = list(sources_of(locked)["1"].parameters())
        locked(IMAGE).square().mean().backward()
        torch.optim.SGD(parameters, lr=0.1).step()
        after = affines(locked)["1"]
        moved[gain] = torch.stack([b - a for a, b in zip(before, after, strict=True)])
    assert float(moved[1.0].abs().max()) > 0
    torch.testing.assert_close(moved[3.0], 9 * moved[1.0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("law", SCALE_LAWS)
def test_laws_of_the_pad(law: str) -> None:
    gamma, beta = Pad(scale_law=law).draw("a", (200, 20, 20), KEY, 0, spread=5.0)
    count = gamma.numel()
    assert abs(float((gamma > 0).float().mean()) - 0.5) < 4 * 0.5 / math.sqrt(count)
    assert abs(float(beta.mean())) < 4 * 5 / math.sqrt(count)
    assert float(beta.std()) == pytest.approx(5.0, rel=0.01)
    mean, deviation = SCALE_LAWS[law]
    assert float(gamma.square().mean()) == pytest.approx(mean**2 + deviation**2, rel=0.02)
    flat = torch.stack([gamma.flatten(), beta.flatten(), gamma.abs().flatten() - 1])
    flat = flat[: 2 if law == "sign" else 3]
    assert float((torch.corrcoef(flat) - torch.eye(len(flat))).abs().max()) < 0.02


def test_later_sites_have_a_spread_of_their_own_before_and_after_renewal() -> None:
    locked = padded(lock_head_input=True, spread=5.0, inner_spread=0.25)
    for epoch in (0, 1):
        if epoch:
            renew(locked, KEY, epoch)
        shifts = [beta for _, beta in affines(locked).values()]
        assert [round(float(s.std()), 2) for s in shifts] == [
            pytest.approx(5.0, rel=0.25),
            pytest.approx(0.25, rel=0.25),
        ]
    assert Pad(spread=2.0, inner_spread=None).spread_of(first=False) == 2.0


def test_later_sites_have_a_law_of_their_own_before_and_after_renewal() -> None:
    locked = padded(lock_head_input=True, scale_law="wide", inner_scale_law="sign")
    for epoch in (0, 1):
        if epoch:
            renew(locked, KEY, epoch)
        first, later = (gamma.abs() for gamma, _ in affines(locked).values())
        assert float(first.std()) > 1
        assert torch.equal(later, torch.ones_like(later))
    assert Pad(scale_law="normal", inner_scale_law=None).law_of(first=False) == "normal"


def test_pads_differ_by_site_epoch_and_key_and_nothing_else() -> None:
    scheme, shape = Pad(), (4, 3, 3)
    draws = {
        (site, epoch, key.fingerprint): scheme.draw(site, shape, key, epoch, spread=3.0)
        for site in ("a", "b")
        for epoch in (0, 1)
        for key in (KEY, OTHER)
    }
    values = list(draws.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    for (site, epoch, owner), pad in draws.items():
        key = KEY if owner == KEY.fingerprint else OTHER
        assert torch.equal(pad, scheme.draw(site, shape, key, epoch, spread=3.0))


def test_big_pads_take_no_matrix() -> None:
    """The first block of a ResNet-18 at 224 pixels has 802,816 positions."""
    pad = Pad().draw("bn1", (64, 112, 112), KEY, 0, spread=3.0)
    assert pad.shape == (2, 64, 112, 112)


@pytest.mark.parametrize("learned", LEARNED)
def test_pad_is_neither_parameter_nor_buffer(learned: str) -> None:
    locked = padded(learned=learned)
    gamma, beta = affines(locked)["1"]
    for tensor in [*locked.parameters(), *locked.buffers(), *locked.state_dict().values()]:
        assert not any(t.shape == tensor.shape and torch.equal(t, tensor) for t in (gamma, beta))
    numbers = [f"{float(v):.4f}" for v in gamma.flatten()[:3]]
    assert not any(", ".join(numbers) in repr(m.__dict__) for m in locked.modules())
    counts = {"position": 2 * 144, "channel": 2 * 4, "none": 0}
    assert sum(p.numel() for p in sources_of(locked)["1"].parameters()) == counts[learned]


def test_shared_state_has_neither_lock_nor_stem_nor_head() -> None:
    model = net(nn.BatchNorm2d(4))
    assert set(shared_state(padded())) == {"4.weight", "4.bias"}
    closed = lock(deep(), KEY, scheme="pad", head=True, example=IMAGE)
    assert set(shared_state(closed)) == {"4.weight", "4.bias"}
    with pytest.raises(LockError, match=r"every parameter is private.*set head=False"):
        padded(head=True)
    assert {"0.weight", "0.bias"} <= set(shared_state(padded(stem=False)))
    assert set(model.state_dict()) >= set(shared_state(padded(stem=False)))
    both = padded(lock_head_input=True)
    assert set(shared_state(both)) == {"4.weight", "4.bias"}
    assert [s.name for s in lock_spec(both).sites] == ["1", "4.input_norm"]
    assert lock_spec(both).sites[1].shape == (144,)


def test_a_head_is_private_by_default_where_something_is_left_to_share() -> None:
    middle = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2))
    locked = lock(middle, KEY, scheme="pad", example=images(4, 6))
    assert set(shared_state(locked)) == {"2.weight", "2.bias"}
    small = lock(net(nn.BatchNorm2d(4)), KEY, scheme="pad", example=IMAGE)
    assert set(shared_state(small)) == {"4.weight", "4.bias"}
    # Nothing that could be a head: the last layer is in the stem already.
    alone = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6))
    locked = lock(alone, KEY, scheme="pad", stem=False, example=torch.tensor([[1, 2, 3]]))
    assert lock_spec(locked).private == ()
    with pytest.raises(LockError, match="no linear layer"):
        lock(alone, KEY, scheme="pad", head=True, example=torch.tensor([[1, 2, 3]]))


class Heads(nn.Module):
    """Two output layers; the one that runs last is not the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.mid = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 8)
        self.classes, self.box = nn.Linear(8, 5), nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.mid(self.bn(self.conv(x)).relu().flatten(1)).relu()
        return {"classes": self.classes(h), "box": self.box(h)}


def test_every_output_layer_is_a_head() -> None:
    model = lock(Heads(), KEY, scheme="pad", example=torch.rand(4, 1, 8, 8))
    assert set(shared_state(model)) == {"mid.weight", "mid.bias"}
    model = lock(Heads(), KEY, scheme="pad", head=False, example=torch.rand(4, 1, 8, 8))
    assert {"classes.weight", "box.0.weight"} <= set(shared_state(model))


def test_stem_and_head_come_from_the_key_alone() -> None:
    """Whatever weights a model brings, and whoever knows them."""
    states = []
    for seed in (0, 1):
        model = deep()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=derive(seed, "given")))
        locked = lock(model, KEY, scheme="pad", head=True, example=IMAGE)
        states.append(private_state(locked))
        for name in ("0.weight", "0.bias", "6.weight", "6.bias"):
            assert not torch.equal(states[-1][name], model.state_dict()[name])
            assert not states[-1][name].eq(0).any()
    for name in ("0.weight", "0.bias", "6.weight", "6.bias"):
        assert torch.equal(states[0][name], states[1][name])
    other = lock(deep(), OTHER, scheme="pad", head=True, example=IMAGE)
    assert not torch.equal(private_state(other)["0.weight"], states[0]["0.weight"])
    bound = 27**-0.5
    assert float(states[0]["0.weight"].abs().max()) < bound
    assert float(states[0]["0.weight"].std()) == pytest.approx(bound / 3**0.5, rel=0.2)


def test_stem_is_everything_up_to_the_first_lock() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)),
        *(nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3)),
    )
    locked = lock(model, KEY, scheme="pad", layers="4", example=IMAGE)
    stem = {f"0.{n}" for n in ("weight", "bias")} | {f"3.{n}" for n in ("weight", "bias")}
    statistics = {f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(lock_spec(locked).private) == stem | statistics | {"1.weight", "1.bias"}
    assert set(shared_state(locked)) == {"5.weight", "5.bias"}
    assert torch.equal(locked[1].weight, torch.ones(4))  # type: ignore[index, arg-type]


def test_stem_of_a_model_that_adds_parameters_of_its_own() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 3, 8, 8))
            self.rest = net(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.rest(x + self.shift)
            return out

    locked = lock(Shifted(), KEY, scheme="pad", example=IMAGE)
    assert "shift" in lock_spec(locked).private
    assert "shift" not in shared_state(locked)


def test_tied_stem_is_private_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    locked = lock(model, KEY, scheme="pad", example=images(4, 6))
    assert set(shared_state(locked)) == {"2.bias"}
    locked = lock(model, KEY, scheme="pad", head=False, example=images(4, 6))
    assert set(shared_state(locked)) == {"2.bias", "3.weight", "3.bias"}
    assert locked[2].weight is locked[0].weight  # type: ignore[index]


def test_frozen_stem_is_found_and_thawed_until_it_is_unlocked() -> None:
    """What a frozen stem had learned is gone: frozen, it would stay noise for good."""
    model = net(nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    locked = lock(model, KEY, scheme="pad", example=IMAGE)
    assert set(lock_spec(locked).private) == {"0.weight", "0.bias"}
    assert locked[0].weight.requires_grad  # type: ignore[index, union-attr]
    assert not model[0].weight.requires_grad
    assert not unlock(locked)[0].weight.requires_grad  # type: ignore[index, union-attr]
    with pytest.raises(LockError, match=r"0\.weight"):
        check_optimizer(locked, torch.optim.SGD([*locked[1].parameters()], lr=0.1))  # type: ignore[index]


@pytest.mark.parametrize("scheme", ["channel", "paper", "fedbn", "pad"])
def test_what_a_frozen_norm_learns_stays_frozen(scheme: str) -> None:
    model = net(nn.BatchNorm2d(4))
    model[1].weight.requires_grad_(False)
    locked = lock(model, KEY, scheme=scheme, example=IMAGE)
    trained = {n: p.requires_grad for n, p in sources_of(locked)["1"].named_parameters()}
    assert trained == {n: n.startswith(("shift", "beta")) for n in trained}
    assert [p.requires_grad for p in unlock(locked)[1].parameters()] == [False, True]  # type: ignore[index]


def test_one_norm_in_two_places_is_one_lock_and_comes_off_again() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), norm),
        *(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    locked = lock(model, KEY, scheme="pad", example=IMAGE, share_statistics=True)
    # The output of the norm's second call depends on the layers in between.
    names = {n for n in shared_state(locked) if not n.endswith(("mean", "var", "tracked"))}
    assert names == {"6.weight", "6.bias"}
    opened = unlock(locked).state_dict()
    assert list(opened) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in opened.items())


@pytest.mark.parametrize("fault", ["install", "verify", "share"])
def test_a_model_whose_lock_fails_in_place_is_as_before(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    before = {n: (t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    kinds = [type(m) for m in model.modules()]

    def fail(*_: object, **__: object) -> None:
        raise LockError("on purpose")

    if fault == "install":
        monkeypatch.setattr("fedkl.locking.install.draw_private", fail)
    if fault == "verify":
        monkeypatch.setattr("fedkl.locking.api.verify", fail)
    with pytest.raises(LockError):
        lock(model, KEY, scheme="pad", head=True, example=IMAGE, inplace=True)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (value, trained) in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad is trained
    assert [type(m) for m in model.modules()] == kinds
    assert not any("_fedkl" in n for m in model.modules() for n in m.__dict__)


def test_private_layers_are_not_pickled_but_their_states_are(tmp_path: Path) -> None:
    locked = lock(deep(), KEY, scheme="pad", example=IMAGE)
    for layer in (locked[0], locked[6], locked):  # type: ignore[index]
        with pytest.raises(SecretError, match="not pickled"):
            pickle.dumps(layer)
        torch.save(layer.state_dict(), tmp_path / "state")
        assert list(torch.load(tmp_path / "state")) == list(layer.state_dict())
    pickle.dumps(locked[4])  # type: ignore[index]
    twin = copy.deepcopy(locked)
    assert isinstance(twin[0], nn.Conv2d)  # type: ignore[index]
    assert torch.equal(twin.eval()(IMAGE), locked.eval()(IMAGE))
    assert type(unlock(twin)[0]) is nn.Conv2d  # type: ignore[index]
    with pytest.raises(SecretError, match="not pickled"):
        pickle.dumps(twin[6])  # type: ignore[index]


def test_unlocked_stem_is_the_original_after_training() -> None:
    model = deep()
    locked = lock(model, KEY, scheme="pad", head=True, example=IMAGE)
    optimizer = torch.optim.SGD(locked.parameters(), lr=0.1)
    check_optimizer(locked, optimizer)
    locked(IMAGE).square().mean().backward()
    optimizer.step()
    opened = unlock(locked).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, opened[name]) is not name.startswith("4")  # 4 is shared


def test_optimizer_without_stem_is_noticed() -> None:
    locked = padded(learned="none")
    with pytest.raises(LockError, match=r"0\.weight"):
        check_optimizer(locked, torch.optim.SGD(locked[4].parameters(), lr=0.1))  # type: ignore[index, union-attr]


def test_renewed_pad_is_another_and_learned_terms_restart_or_stay() -> None:
    locked = padded()
    before = affines(locked)["1"][0]
    source = sources_of(locked)["1"]
    stem = private_state(locked)["0.weight"].clone()
    with torch.no_grad():
        for p in source.parameters():
            p.fill_(0.5)
    kept = copy.deepcopy(locked)
    renew(locked, KEY, 3)
    renew(kept, KEY, 3, keep_learned=True)
    assert epoch_of(locked) == epoch_of(kept) == 3
    fresh = Pad().draw("1", (4, 6, 6), KEY, 3, spread=3.0)[0]
    assert torch.equal(affines(locked)["1"][0], fresh)
    assert torch.equal(affines(kept)["1"][0], fresh + 0.5 * 6)  # √36 positions a channel
    assert abs(float(torch.corrcoef(torch.stack([before.flatten(), fresh.flatten()]))[0, 1])) < 0.3
    assert torch.equal(private_state(locked)["0.weight"], stem)
    restart_lock(locked, KEY)
    assert epoch_of(locked) == 0
    assert torch.equal(affines(locked)["1"][0], before)


def test_states_on_disk_and_key_make_the_renewed_model_again() -> None:
    locked = padded()
    renew(locked, KEY, 2)
    with torch.no_grad():
        sources_of(locked)["1"].scale_learned.normal_(generator=derive(0, "x"))
    shared, private = (load(save(s(locked))) for s in (shared_state, private_state))
    fresh = lock_like(net(nn.BatchNorm2d(4)), KEY, lock_spec(locked))
    load_shared_state(fresh, shared)
    load_private_state(fresh, private)
    with pytest.raises(LockError, match="set_key"):  # the pad in it is still the one of epoch 0
        fresh.eval()(IMAGE)
    set_key(fresh, KEY)
    assert torch.equal(fresh.eval()(IMAGE), locked.eval()(IMAGE))
    whole = lock_like(net(nn.BatchNorm2d(4)), KEY, lock_spec(locked))
    whole.load_state_dict(load(save(locked.state_dict())))
    with pytest.raises(LockError, match="set_key"):
        whole.eval()(IMAGE)
    assert unlock(whole) is not None  # a lock can be taken off whatever pad it has
    set_key(whole, KEY)
    assert torch.equal(whole.eval()(IMAGE), locked.eval()(IMAGE))


def test_another_key_gives_another_pad_and_the_own_key_the_old_one() -> None:
    locked = padded().eval()
    renew(locked, KEY, 4)
    own = locked(IMAGE)
    set_key(locked, OTHER)
    assert not torch.allclose(locked(IMAGE), own)
    assert epoch_of(locked) == 4
    set_key(locked, KEY)
    assert torch.equal(locked(IMAGE), own)


def test_shorter_token_sequences_use_the_first_rows_and_longer_ones_fail() -> None:
    tokens = torch.arange(20).reshape(4, 5) % 11
    locked = lock(Tokens(), KEY, scheme="pad", example=tokens, max_length=7).eval()
    assert {s.shape for s in lock_spec(locked).sites} == {(7, 8)}
    x = images(2, 3, 8)
    norm = locked.layer.norm1  # type: ignore[union-attr]
    gamma, beta = affines(locked)["layer.norm1"]
    want = gamma[:3] * nn.functional.layer_norm(x, (8,)) + beta[:3]
    torch.testing.assert_close(norm(x), want)
    assert locked(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 3)
    with pytest.raises(LockError, match=r"\(7, 8\).*\(8, 8\).*max_length"):
        locked(torch.zeros(2, 8, dtype=torch.long))


def test_pad_behind_a_linear_layer_of_tokens_is_per_token() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = images(4, 3, 6)
    locked = lock(model, KEY, scheme="pad", layers="0", example=x)
    gamma, beta = affines(locked)["0.inserted_norm"]
    assert gamma.shape == (3, 5)
    out = nn.functional.linear(x, locked[0].weight, locked[0].bias)  # type: ignore[index, arg-type]
    rows = out.reshape(-1, 5)
    plain = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    want = gamma * plain.reshape(out.shape) + beta
    torch.testing.assert_close(locked.train()[0](x), want, rtol=1e-4, atol=1e-4)  # type: ignore[index]


def test_rms_norm_adds_the_shift_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 2))
    x = images(4, 6)
    locked = lock(model, KEY, scheme="pad", example=x)
    gamma, beta = affines(locked)["1"]
    out = nn.functional.linear(x, locked[0].weight, locked[0].bias)  # type: ignore[index, arg-type]
    want = gamma * nn.functional.rms_norm(out, (5,)) + beta
    torch.testing.assert_close(locked[1](out), want)  # type: ignore[index]


def test_one_norm_at_two_sizes_is_an_error() -> None:
    with pytest.raises(LockError, match=r"two sizes.*\(4, 4, 4\), \(4, 6, 6\)"):
        lock(TwoParents(), KEY, scheme="pad", example=IMAGE)


def test_another_input_size_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    locked = lock(model, KEY, scheme="pad", layers="0", example=IMAGE)
    with pytest.raises(LockError, match=r"\(4, 6, 6\).*\(4, 7, 7\)"):
        locked(images(2, 3, 9, 9))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"scale_law": "near"}, "near-one"),
        ({"gain": 0.0}, "gain must be a positive number"),
        ({"learned": "positions"}, "position"),
        ({"spread": 0.0}, "positive"),
        ({"spread": math.inf}, "positive"),
        ({"spread": 1e40}, "spread must be a number of at most"),
        ({"max_length": 0}, "at least 1"),
        ({"spred": 1.0}, "spread"),
    ],
)
def test_settings_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        padded(**bad)


def test_what_a_pad_needs() -> None:
    model = net(nn.BatchNorm2d(4))
    with pytest.raises(LockError, match="example"):
        lock(model, KEY, scheme="pad")
    with pytest.raises(LockError, match="needs a"):
        lock(model, None, scheme="pad", example=IMAGE)
    vector = Key.from_vector(torch.ones(1024))
    with pytest.raises(LockError, match=r"imported.*Key\.generate"):
        lock(model, vector, scheme="pad", example=IMAGE)
    with pytest.raises(LockError, match=r"imported.*Key\.generate"):
        restart_lock(padded(), vector)
    with pytest.raises(LockError, match="group"):
        lock(model, KEY, scheme="pad", example=IMAGE, group=OTHER)
    with pytest.raises(LockError, match="no pad to renew"):
        renew(lock(model, KEY, example=IMAGE), KEY, 1)
    with pytest.raises(LockError, match=r"fedkl\.Key"):
        renew(padded(), "key", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [-1, 0, 3, 2**63, 2**70, 4.0, "4", True, None])
def test_a_pad_is_renewed_forward_only_or_not_at_all(epoch: Any) -> None:
    locked = padded()
    renew(locked, KEY, 3)
    with torch.no_grad():
        sources_of(locked)["1"].scale_learned.fill_(0.5)
    before = {n: t.clone() for n, t in locked.state_dict().items()}
    gamma = affines(locked)["1"][0]
    with pytest.raises(ConfigError, match=r"above the present one, 3, and below 2\*\*63, got"):
        renew(locked, KEY, epoch)
    assert all(torch.equal(t, before[n]) for n, t in locked.state_dict().items())
    assert torch.equal(affines(locked)["1"][0], gamma)


def test_a_pad_takes_its_own_key_and_no_imported_vector() -> None:
    locked = padded()
    gamma = affines(locked)["1"][0]
    with pytest.raises(LockError, match=f"{KEY.fingerprint}, got {OTHER.fingerprint}"):
        renew(locked, OTHER, 1)
    for put in (set_key, lambda model, key: renew(model, key, 1)):
        with pytest.raises(LockError, match=r"imported.*Key\.generate"):
            put(locked, Key.from_vector(torch.ones(1024)))
    assert torch.equal(affines(locked)["1"][0], gamma)
    set_key(locked, OTHER)
    renew(locked, OTHER, 1)
    restart_lock(locked, KEY)
    renew(copy.deepcopy(locked), KEY, 1)


def test_spec_of_another_architecture_is_refused() -> None:
    spec = lock_spec(padded())
    with pytest.raises(LockError, match="lock spec"):
        lock_like(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), KEY, spec)


@pytest.mark.parametrize("name", ["batch", "no norm", "mlp", "tokens", "1d", "3d"])
def test_gradients_reach_stem_and_learned_terms(name: str) -> None:
    factory, example = SMALL[name]
    locked = lock(factory(), KEY, scheme="pad", example=example).train()
    locked(example).square().sum().backward()
    for parameter in locked.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
