"""The channel scheme against a reference written from the formulas, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedkl.errors import ConfigError, LockError
from fedkl.key import Key
from fedkl.locking import (
    Channel,
    affines,
    lock,
    lock_spec,
    private_state,
    restart_lock,
    set_key,
    sources,
    sources_of,
)

from .zoo import IMAGE, SMALL, images

KEY, OTHER = Key.generate(), Key.generate()
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": lambda v: v.clamp(min=0),
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
    "tanh": lambda v: (torch.exp(2 * v) - 1) / (torch.exp(2 * v) + 1),
}


def centered(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(axes, keepdim=True) + eps)


def per_channel(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1)


def grouped(x: Tensor, groups: int, eps: float) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    return centered(parts, (2,), eps).reshape(x.shape)


# name -> (module for C channels and 4 x 4 positions, its formula without affine, shape of γ and β)
NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[Tensor], Tensor], Any]] = {
    "batch": (nn.BatchNorm2d, lambda x: centered(x, (0, 2, 3), 1e-5), per_channel),
    "group": (lambda c: nn.GroupNorm(c // 2, c), lambda x: grouped(x, x.shape[1] // 2, 1e-5),
              per_channel),
    "instance": (nn.InstanceNorm2d, lambda x: centered(x, (2, 3), 1e-5), per_channel),
    "layer": (lambda c: nn.LayerNorm([c, 4, 4]), lambda x: centered(x, (1, 2, 3), 1e-5),
              lambda v: v.reshape(1, -1, 4, 4)),
    "rms": (lambda c: nn.RMSNorm(4, eps=1e-3),
            lambda x: x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3), lambda v: v),
    "inserted": (nn.Identity, lambda x: centered(x, (0, 2, 3), 1e-5), per_channel),
}  # fmt: skip


def network(kind: str, channels: int) -> nn.Module:
    make = NORMS[kind][0]
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), make(channels) if kind != "inserted" else nn.Identity(),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 1), make(channels) if kind != "inserted" else nn.Identity(),
    )  # fmt: skip


def formula(
    locked: nn.Module, key: Key, x: Tensor, kind: str, *, locks: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """z = γ ⊙ norm(conv(x)) + β, γ = act(W u + b): straight from the paper, float64 throughout."""
    settings = lock_spec(locked).settings
    _, norm, shaped = NORMS[kind]
    state = {n: t.detach().double() for n, t in locked.state_dict().items()}
    vector = key.vector(settings["length"], settings["law"]).double()
    inputs, found = [vector, vector], []
    out = x.double()
    for index, (conv, site) in enumerate((("0", "1"), ("3", "4"))):
        out = nn.functional.conv2d(out, state[f"{conv}.weight"], state[f"{conv}.bias"])
        out = norm(out) if kind != "inserted" or index < locks else out
        if index < locks:
            lock_name = f"{conv}.inserted_norm" if kind == "inserted" else site
            values = []
            for name, u in zip(("scale", "shift"), inputs, strict=True):
                factor = 1.0 if settings["spread"] is None else settings["gain"] * len(u) ** -0.5
                value = state[f"{lock_name}.keylock.{name}_weight"] @ (u * factor)
                if settings["bias"]:
                    value = value + state[f"{lock_name}.keylock.{name}_bias"]
                values.append(ACTIVATIONS[settings["activation"]](value))
            found.append((values[0], values[1]))
            out = shaped(values[0]) * out + shaped(values[1])
            inputs = values if settings["chain"] else inputs
        out = torch.tanh(out) if index == 0 else out
    return out, found


CHOICES: list[dict[str, Any]] = [
    {},
    {"scheme": "paper"},
    {"scheme": "paper-sigmoid"},
    {"chain": True},
    {"gain": 8.0},
    {"gain": 0.5, "chain": True},
    {"activation": "tanh", "bias": True, "law": "normal", "spread": 0.5},
]


@given(
    kind=st.sampled_from(sorted(NORMS)),
    half=st.integers(1, 4),
    batch=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layers=st.sampled_from(["first", "all"]),
    settings=st.sampled_from(CHOICES),
    length=st.integers(1, 40),
)
def test_outputs_and_affines_are_the_formulas(
    kind: str, half: int, batch: int, dtype: torch.dtype, layers: str, settings: Any, length: int
) -> None:
    torch.manual_seed(0)
    x = images(batch, 3, 6, 6).to(dtype)
    model = network(kind, 2 * half).to(dtype)
    locked = lock(model, KEY, layers=layers, length=length, example=x, **settings)
    locks = 2 if layers == "all" else 1
    expected, values = formula(locked, KEY, x, kind, locks=locks)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.25}[dtype]
    got = affines(locked)
    assert len(got) == len(lock_spec(locked).sites) == locks
    for (scale, shift), (want_scale, want_shift) in zip(got.values(), values, strict=True):
        assert scale.dtype == shift.dtype == dtype
        limit = {"rtol": tolerance, "atol": tolerance / 5}
        torch.testing.assert_close(scale.double().reshape(-1), want_scale, **limit)
        torch.testing.assert_close(shift.double().reshape(-1), want_shift, **limit)
    if dtype != torch.bfloat16:  # there the convolutions' own rounding decides
        out = locked.train()(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gain", [1.0, 16.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("law", ["sign", "normal"])
def test_affines_start_with_the_spread(spread: float, law: str, gain: float) -> None:
    # uniform keys are not centered and have a mean square of 1/3, hence another spread
    net = nn.Sequential(nn.LayerNorm(4096), nn.Linear(4096, 2))
    locked = lock(
        net, KEY, layers="0", spread=spread, shift_spread=None, law=law, gain=gain, length=256
    )
    for value in affines(locked)["0"]:
        assert float(value.mean()) == pytest.approx(0, abs=0.1 * spread)
        assert float(value.std()) == pytest.approx(spread, rel=0.1 if law == "sign" else 0.3)


@pytest.mark.parametrize("shift", [0.0, 0.5, 6.0])
def test_the_shift_may_have_a_spread_of_its_own(shift: float) -> None:
    net = nn.Sequential(nn.LayerNorm(4096), nn.Linear(4096, 2))
    locked = lock(net, KEY, layers="0", spread=2.0, shift_spread=shift, length=256)
    scale, beta = affines(locked)["0"]
    assert float(scale.std()) == pytest.approx(2.0, rel=0.1)
    assert float(beta.std()) == pytest.approx(shift, rel=0.1)


def test_a_chain_hands_the_spread_on() -> None:
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.LayerNorm(1000), nn.Linear(1000, 1000))))
    locked = lock(
        net, KEY, chain=True, spread=2.0, shift_spread=2.0, length=64, example=images(2, 1000)
    )
    values = affines(locked)
    assert len(values) == 4
    for scale, shift in values.values():
        assert 1.6 < float(scale.std()) < 2.5
        assert 1.6 < float(shift.std()) < 2.5


def test_scale_and_shift_chains_are_separate() -> None:
    factory, example = SMALL["late"]
    locked = lock(factory(), KEY, scheme="paper-sigmoid", length=16, example=example)
    before = affines(locked)
    with torch.no_grad():
        sources_of(locked)["norm1"].scale_bias.add_(1.0)  # type: ignore[operator]
    after = affines(locked)
    assert [s.name for s in lock_spec(locked).sites] == ["norm1", "norm2"]
    for site in ("norm1", "norm2"):
        assert not torch.equal(before[site][0], after[site][0])
        assert torch.equal(before[site][1], after[site][1])


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_key_matters_and_comes_back(chain: bool, dtype: torch.dtype) -> None:
    factory, example = SMALL["batch"]
    x = example.to(dtype)
    locked = lock(factory().to(dtype), KEY, chain=chain, example=x).eval()
    right = locked(x)
    set_key(locked, OTHER)
    wrong = locked(x)
    assert float((right - wrong).detach().abs().max()) > 0.01
    set_key(locked, KEY)
    assert torch.equal(locked(x), right)
    restart_lock(locked, KEY)
    assert torch.equal(locked(x), right)


def test_two_clients_differ_in_key_and_lock_weights() -> None:
    factory, example = SMALL["batch"]
    mine, its = (private_state(lock(factory(), k, example=example)) for k in (KEY, OTHER))
    again = private_state(lock(factory(), KEY, example=example))
    assert mine.keys() == its.keys() == again.keys()
    weights = [n for n in mine if n.endswith("_weight")]
    assert weights
    assert all(torch.equal(mine[n], again[n]) for n in weights)
    assert not any(torch.equal(mine[n], its[n]) for n in weights)


def test_training_moves_the_lock_and_not_the_key() -> None:
    factory, x = SMALL["batch"]
    locked = lock(factory(), KEY, example=x)
    before, start = affines(locked), {n: t.clone() for n, t in locked.state_dict().items()}
    sealed = [s._sealed.tensor.clone() for s in sources_of(locked).values()]  # type: ignore
    optimizer = torch.optim.SGD(locked.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(locked(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(affines(locked)["1"][0], before["1"][0])
    assert not torch.equal(locked.state_dict()["1.keylock.scale_weight"],
                           start["1.keylock.scale_weight"])  # fmt: skip
    for source, tensor in zip(sources_of(locked).values(), sealed, strict=True):
        assert torch.equal(source._sealed.tensor, tensor)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["batch", "group", "instance", "layer", "no norm", "mlp"])
@pytest.mark.parametrize("chain", [False, True])
def test_affines_stay_float32_under_autocast(kind: str, chain: bool) -> None:
    factory, x = SMALL[kind]
    locked = lock(factory(), KEY, example=x, chain=chain, law="normal")
    exact = affines(locked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = locked(x)
        inside = affines(locked)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for site, (scale, shift) in inside.items():
        assert scale.dtype == shift.dtype == torch.float32
        assert torch.equal(scale, exact[site][0])
        assert torch.equal(shift, exact[site][1])
    assert all(p.grad is not None for s in sources_of(locked).values() for p in s.parameters())


def test_the_lock_is_computed_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU ``mv`` happens to stay in float32; on a GPU it would not."""
    factory, x = SMALL["late"]
    locked = lock(factory(), KEY, example=x, chain=True)
    states: list[bool] = []

    def watched(value: Tensor) -> Tensor:
        states.append(torch.is_autocast_enabled("cpu"))
        return value

    monkeypatch.setitem(sources.ACTIVATIONS, "identity", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        locked(x)
        assert torch.is_autocast_enabled("cpu")
    assert states
    assert not any(states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_moves_the_key_along(dtype: torch.dtype) -> None:
    factory, x = SMALL["group"]
    locked = lock(factory(), KEY, example=x).to(dtype)
    out = locked.eval()(x.to(dtype))
    assert out.dtype == dtype
    reference = lock(factory(), KEY, example=x)
    reference.load_state_dict({n: t.float() for n, t in locked.state_dict().items()})
    torch.testing.assert_close(out.float(), reference.eval()(x), rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation": "rellu"}, "Did you mean 'relu'"),
        ({"law": "signs"}, "Did you mean 'sign'"),
        ({"length": 0}, "at least 1, got 0"),
        ({"spread": -1.0}, "positive number, got -1.0"),
        ({"gain": 0.0}, "gain must be a positive number, got 0.0"),
        ({"shift_spread": -0.1}, "shift_spread must be a number from 0, got -0.1"),
        ({"spread": float("nan")}, "positive number"),
        ({"gain": 1e40}, "gain must be a number of at most"),
        ({"shift_spread": 1e40}, "shift_spread must be a number of at most"),
        ({"sprad": 1.0}, "Did you mean 'spread'"),
        ({"scheme": "chanel"}, "Did you mean 'channel'"),
        ({"norm": "bach", "layers": "0"}, "Did you mean 'batch'"),
    ],
)
def test_settings_that_are_no_use(settings: dict[str, Any], message: str) -> None:
    model = SMALL["no norm"][0]()
    with pytest.raises(ConfigError, match=message):
        lock(model, KEY, example=IMAGE, **settings)


def test_a_key_is_needed_and_an_example_for_a_chain() -> None:
    model = SMALL["batch"][0]()
    for wrong in (None, "secret", torch.ones(1024)):
        with pytest.raises(LockError, match=r"needs a fedkl\.Key, got"):
            lock(model, wrong)  # type: ignore[arg-type]
        locked = lock(model, KEY)
        with pytest.raises(LockError, match=r"expected a fedkl\.Key"):
            set_key(locked, wrong)  # type: ignore[arg-type]
    with pytest.raises(LockError, match="order of execution"):
        lock(model, KEY, scheme="paper")
    with pytest.raises(LockError, match="takes no key"):
        set_key(lock(model, None, scheme="fedbn"), KEY)
    with pytest.raises(LockError, match=r"expected a torch\.nn\.Module"):
        lock(IMAGE, KEY)  # type: ignore[arg-type]


def test_an_imported_vector_is_used_as_it_is() -> None:
    vector = torch.rand(12)
    locked = lock(
        network("batch", 4), Key.from_vector(vector), length=12, example=images(2, 3, 6, 6)
    )
    weight = locked.state_dict()["1.keylock.scale_weight"]
    torch.testing.assert_close(affines(locked)["1"][0], weight @ vector * Channel().gain * 12**-0.5)
    assert Channel(length=12).settings()["length"] == 12
