"""The attacker's twin of a model with pads: same function, every secret an ordinary parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkl.key import Key
from fedkl.locking import (
    lock,
    lock_spec,
    private_state,
    renew,
    shared_state,
    sources_of,
)
from fedkl.locking.rebuild import held_secrets, rebuild, secret_names
from fedkl.locking.survey import call
from fedkl.rng import borrowed, derive

from .zoo import SMALL

KEY = Key.generate()
OPTIONS = [
    {},
    {"head": True, "lock_head_input": True, "learned": "channel"},
    {"stem": False, "learned": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "head", "known stem"])
@pytest.mark.parametrize("kind", ["batch", "layer", "no norm", "mlp", "tokens", "rms", "3d"])
def test_twin_with_the_true_secrets_computes_the_same(
    kind: str, options: dict[str, object]
) -> None:
    factory, example = SMALL[kind]
    if kind in ("mlp", "3d") and options.get("head"):
        pytest.skip("nothing would be left to share")
    locked = lock(factory(), KEY, scheme="pad", example=example, **options)
    renew(locked, KEY, 5)
    with torch.no_grad():
        for p in locked.parameters():
            p.add_(0.1)
    with borrowed(derive(0, "outsider")):
        plain = factory()
    twin = rebuild(plain, lock_spec(locked))
    held = held_secrets(locked)
    assert set(secret_names(twin)) == set(held)
    assert set(shared_state(twin)) == set(shared_state(locked))
    parameters = dict(twin.named_parameters())
    for name, value in held.items():
        assert parameters[name].shape == value.shape
        assert parameters[name].requires_grad
        assert not torch.equal(parameters[name], value)  # none came along by itself
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            tensor.copy_(held.get(name, locked.state_dict().get(name, tensor)))
    # In train mode: running statistics are private, but a function of the batch there.
    torch.testing.assert_close(call(twin.train(), example), call(locked.train(), example))


def test_twin_starts_neutral_with_the_outsiders_own_stem() -> None:
    factory, example = SMALL["no norm"]
    locked = lock(factory(), KEY, scheme="pad", example=example)
    plain = factory()
    twin = rebuild(plain, lock_spec(locked))
    sources = sources_of(twin)
    assert {s.shape for s in sources.values()} == {s.shape for s in sources_of(locked).values()}
    for source in sources.values():
        assert torch.equal(source.scale(), torch.ones(source.shape))
        assert torch.equal(source.shift(), torch.zeros(source.shape))
    assert torch.equal(twin.get_parameter("0.weight"), plain[0].weight)
    assert not torch.equal(twin.get_parameter("0.weight"), private_state(locked)["0.weight"])


def test_gradients_of_the_shared_layers_agree_given_the_secrets() -> None:
    factory, example = SMALL["no norm"]
    locked = lock(factory(), KEY, scheme="pad", example=example).train()
    twin = rebuild(factory(), lock_spec(locked)).train()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in {**held_secrets(locked), **shared_state(locked)}.items():
            if name in parameters:
                parameters[name].copy_(value)
    for model in (locked, twin):
        nn.functional.cross_entropy(model(example), torch.arange(4)).backward()
    mine = dict(locked.named_parameters())
    for name in shared_state(locked):
        if name in mine:
            torch.testing.assert_close(parameters[name].grad, mine[name].grad)
