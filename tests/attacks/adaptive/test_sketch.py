"""Gradients made short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkl.attacks.adaptive.relations import SizedSketch
from fedkl.attacks.adaptive.sketch import LinearSketch, Sketch
from fedkl.errors import AttackError
from fedkl.rng import derive


def test_sketch_keeps_inner_products_and_is_linear_in_memory() -> None:
    generator = derive(0)
    shared = {"a": torch.zeros(100, 30), "b": torch.zeros(40)}
    sketch = Sketch(shared, 1024, generator)
    base = torch.randn(2, 100, 30, generator=generator)
    made = sketch({"a": base, "b": torch.randn(2, 40, generator=generator)})
    assert sketch({"a": 7 * base, "b": torch.zeros(2, 40)}).isfinite().all()
    assert made.shape == (2, 1024)
    assert abs(float(made[0].norm()) - 2**0.5) < 0.15  # two tensors of norm 1
    short = Sketch({"b": torch.zeros(40)}, 1024, generator)
    b = torch.randn(3, 40, generator=generator)
    torch.testing.assert_close(short({"b": b}), b / b.norm(dim=1, keepdim=True))


def test_sketch_takes_the_input_out_of_a_linear_layer_and_leaves_noise_small() -> None:
    generator = derive(0)
    x, delta = torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)
    noise = 1e-7 * torch.randn(2, 4, generator=generator)
    gradients_ = {"f.weight": delta[:, :, None] * x[:, None], "f.bias": delta, "c.bias": noise}
    shared = {name: value[0] for name, value in gradients_.items()}
    made = Sketch(shared, 100, generator)(gradients_)
    torch.testing.assert_close(made[:, :5], x / x.norm(dim=1, keepdim=True))
    assert float(made[:, 8:].abs().max()) < 1e-3


def layers(missed: float) -> dict[str, Tensor]:
    """Gradients of a convolution, its bias before a norm, and a linear layer."""
    generator = derive(0, "layers")
    x, delta = torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)
    found = {
        "c.weight": 0.1 * torch.randn(2, 4, 2, 2, generator=generator),
        "c.bias": 1e-7 * torch.randn(2, 4, generator=generator),
        "f.weight": delta[:, :, None] * x[:, None],
        "f.bias": delta,
    }
    return {name: missed * value for name, value in found.items()}


def test_how_much_an_example_was_missed_makes_no_difference() -> None:
    """Nor does an unknown learning rate."""
    sketch = Sketch({n: v[0] for n, v in layers(1.0).items()}, 100, derive(0))
    for missed in (1e-2, 1e-4, 1e-8):
        torch.testing.assert_close(sketch(layers(missed)), sketch(layers(1.0)))


@pytest.mark.parametrize("make", [Sketch, SizedSketch])
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_what_no_square_can_hold_is_sketched_as_well(make: type[Sketch], scale: float) -> None:
    sketch = make({n: v[0] for n, v in layers(1.0).items()}, 100, derive(0))
    found, wanted = sketch(layers(scale)), sketch(layers(1.0))
    if make is SizedSketch:
        apart = torch.full((2,), scale, dtype=torch.float64).log().float()
        torch.testing.assert_close(found[:, 0] - wanted[:, 0], apart)
        found, wanted = found[:, 1:], wanted[:, 1:]
    torch.testing.assert_close(found, wanted)


def test_sketches_of_ordinary_updates_are_what_they_were() -> None:
    """The studies rest on them: written out as they were, before updates had length 1 first."""
    generator = derive(0, "ordinary")
    shared = {"c.weight": torch.zeros(4, 2, 3, 3), "f.weight": torch.zeros(3, 5)}
    shared["f.bias"] = torch.zeros(3)
    given = {n: torch.randn(6, *v.shape, generator=generator) for n, v in shared.items()}
    given = {
        n: v * 10 ** torch.linspace(-3, 2, 6).view(-1, *[1] * (v.ndim - 1))
        for n, v in given.items()
    }
    sketch = Sketch(shared, 40, derive(0))
    missed = given["f.bias"] / given["f.bias"].norm(dim=1, keepdim=True)
    flat = [
        given["c.weight"].flatten(1),
        torch.einsum("nij,ni->nj", given["f.weight"], missed),
        given["f.bias"],
    ]
    ones = torch.cat([row / row.norm(dim=1, keepdim=True) for row in flat], dim=1)
    wanted = ones.new_zeros(6, 40).index_add_(1, sketch.places, ones * sketch.signs)
    torch.testing.assert_close(sketch(given), wanted, atol=2e-6, rtol=1e-5)
    sized = SizedSketch(shared, 40, derive(0))(given)
    size = torch.stack([v.flatten(1).double().norm(dim=1) for v in given.values()]).norm(dim=0)
    torch.testing.assert_close(sized[:, 0], size.log().float())
    unit = wanted / wanted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sized[:, 1:], unit, atol=2e-6, rtol=1e-5)


def test_what_is_noise_is_none_when_entries_are_standardized_later() -> None:
    given = layers(1.0)
    made = Sketch({n: v[0] for n, v in given.items()}, 100, derive(0))(given)
    assert not made[:, 16:20].any()
    assert bool(made[:, :16].any(dim=1).all())


def test_a_linear_layer_whose_bias_is_noise_does_not_drown_the_others() -> None:
    """Keys of attention: a bias of theirs moves nothing."""
    given = layers(1.0)
    given["f.bias"] = 1e-9 * given["f.bias"].roll(1, dims=1)
    made = Sketch({n: v[0] for n, v in given.items()}, 100, derive(0))(given)
    torch.testing.assert_close(made[:, :16].norm(dim=1), torch.ones(2))


def test_a_linear_sketch_of_a_sum_is_the_sum_of_the_sketches() -> None:
    generator = derive(0)
    shared = {"f.weight": torch.zeros(30, 40), "f.bias": torch.zeros(30), "c.bias": torch.zeros(8)}

    def drawn(count: int) -> dict[str, Tensor]:
        size = {"f.weight": 5.0, "f.bias": 0.2, "c.bias": 1e-9}
        return {
            n: size[n] * torch.randn(count, *v.shape, generator=generator)
            for n, v in shared.items()
        }

    seen = [drawn(20), drawn(30)]
    sketch = LinearSketch(shared, 512, generator, seen)
    a, b = drawn(3), drawn(3)
    both = sketch({n: 2 * a[n] + b[n] for n in shared})
    torch.testing.assert_close(both, 2 * sketch(a) + sketch(b))
    # The weight and its bias count alike, rounding noise not at all.
    only = {n: {m: v if m == n else 0 * v for m, v in seen[0].items()} for n in shared}
    norms = {n: float(sketch(one).square().sum(dim=1).mean()) for n, one in only.items()}
    assert norms["f.weight"] == pytest.approx(1, abs=0.2)
    assert norms["f.bias"] == pytest.approx(1, abs=0.3)
    assert norms["c.bias"] == 0


def test_one_update_beyond_all_measure_does_not_drown_the_others() -> None:
    given = layers(1.0)
    shared = {n: v[0] for n, v in given.items()}
    huge = {n: 1e25 * (v if n == "f.bias" else 0 * v) for n, v in given.items()}
    alone = LinearSketch(shared, 512, derive(0), [given])(given)
    beside = LinearSketch(shared, 512, derive(0), iter([given, given, huge]))(given)
    assert 0.1 < float(beside.norm() / alone.norm()) < 10
    assert float(torch.cosine_similarity(beside, alone).min()) > 0.9


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"b": torch.zeros(2, 3)}, "zero"),
        ({"b": torch.full((2, 3), torch.inf)}, "learning rate"),
        ({}, "no parameter"),
    ],
)
def test_updates_that_tell_nothing_are_refused(seen: dict[str, Tensor], message: str) -> None:
    shared = {n: v[0] for n, v in seen.items()}
    with pytest.raises(AttackError, match=message):
        LinearSketch(shared, 512, derive(0), [seen])
