"""Private layers: that they still play their part once locked, and the laws they are drawn by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import is_locked, lock, lock_spec, private_state
from fedkl.locking.stem import draw_private, make_private
from fedkl.rng import derive

KEY = Key._of("seed", bytes(range(32)))  # the same in every run: figures below depend on it
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))


class Choosy(nn.Module):
    """Calls some of its layers only if they are of the very class that torch has."""

    def __init__(self, *skips: str, always: bool = False) -> None:
        super().__init__()
        self.skips, self.always = skips, always
        self.early, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.mid = nn.BatchNorm2d(3), nn.Linear(192, 192)
        self.out, self.second = nn.Linear(192, 192), nn.Linear(192, 192)

    def call(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self, name)
        known = type(module) in (nn.Conv2d, nn.Linear)
        return module(x) if known or name not in self.skips else x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.call("conv", self.call("early", x))).relu()
        z = self.mid(y.flatten(1)).relu()
        # What the stem computes may still be heard, past the lock.
        more = self.early(x).mean() if self.always else 0
        return self.call("out", z) + more, self.call("second", z)


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
@pytest.mark.parametrize("scheme", ["pad", "open-pad"])
@pytest.mark.parametrize("skips", [("conv", "early"), ("early",), ("out",), ("second", "conv")])
def test_a_private_layer_that_is_skipped_once_locked_is_an_error(
    skips: tuple[str, ...], scheme: str
) -> None:
    model = Choosy(*skips)
    how = {"scheme": scheme, "example": X, "head": True, "layers": "norm"}
    with pytest.raises(LockError, match=rf"play no part.*{skips[0]}.*isinstance"):
        lock(model, KEY, **how, inplace=True)  # type: ignore[arg-type]
    assert not is_locked(model)
    lock(Choosy(), KEY, **how)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
def test_a_stem_that_is_heard_past_the_lock_alone_is_skipped_too() -> None:
    with pytest.raises(LockError, match=r"play no part.*early"):
        lock(Choosy("early", always=True), KEY, scheme="pad", example=X, layers="norm")


def test_a_parameter_that_no_run_reads_is_no_layer_that_is_skipped() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.spare = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.ReLU(), Spare())
    locked = lock(net, KEY, scheme="pad", example=torch.rand(4, 4))
    assert {"4.weight", "4.spare"} <= {*lock_spec(locked).private}


def drawn(net: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``net`` as a stem starts."""
    make_private(net, [name for name, _ in net.named_parameters()])
    draw_private(net, KEY)
    return {name: p.detach() for name, p in net.named_parameters()}


def test_convolutions_linear_layers_and_norms_are_drawn_as_ever() -> None:
    """Others than these numbers, and all that was trained with a pad starts anew."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)),
        *(nn.ConvTranspose1d(2, 3, 2), nn.GroupNorm(2, 4)),
    )
    first = {
        "0.weight": (0.0259686019, 0.0500804037, 0.0434273183),
        "0.bias": (0.119963147, -0.0436956212, -0.0133881234),
        "3.weight": (-0.0618892312, -0.233836532, 0.19605279),
        "3.bias": (-0.108708352, 0.102310181, 0.000852704048),
        "4.weight": (0.241520554, -0.182227805, -0.312494457),
        "4.bias": (0.0077220886, -0.397624195, -0.206638783),
        **dict.fromkeys(["1.weight", "5.weight"], (1.0, 1.0, 1.0)),
        **dict.fromkeys(["1.bias", "5.bias"], (0.0, 0.0, 0.0)),
    }
    found = {name: tuple(value.flatten()[:3]) for name, value in drawn(net).items()}
    assert found == {name: tuple(torch.tensor(v)) for name, v in first.items()}


def close_to_torch(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The stem's start, once its entries were seen to be spread as those of torch's own start."""
    torch.manual_seed(0)
    own, net = make(), make()
    for name, value in drawn(net).items():
        start = own.get_parameter(name).detach()
        assert bool(value.any()) is bool(start.any()), name
        assert float(value.std()) == pytest.approx(float(start.std()), rel=0.2), name
        assert float(value.abs().max()) == pytest.approx(float(start.abs().max()), rel=0.35), name
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("kdim", [None, 24])
def test_attention_is_drawn_by_the_law_of_torch(kdim: int | None) -> None:
    close_to_torch(lambda: nn.MultiheadAttention(256, 4, kdim=kdim, vdim=kdim, add_bias_kv=True))


def test_attention_without_a_bias_has_none() -> None:
    close_to_torch(lambda: nn.MultiheadAttention(256, 4, bias=False))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_layers_are_drawn_by_the_law_of_torch(layer: type[nn.Module]) -> None:
    for value in close_to_torch(lambda: layer(10, 256)).values():
        assert float(value.abs().max()) <= 256**-0.5


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_are_drawn_by_the_law_of_torch(layer: type[nn.Module]) -> None:
    weight = close_to_torch(lambda: layer(100, 64, padding_idx=3))["weight"]
    assert [i for i, row in enumerate(weight) if not row.any()] == [3]
    assert not (drawn(layer(4, 8))["weight"] == 0).any()


def test_a_bias_beside_a_matrix_of_any_name_has_its_bound() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.b = nn.Parameter(torch.ones(50, 100)), nn.Parameter(torch.ones(50))
            self.alone = nn.Parameter(torch.ones(7))

    values = drawn(Named())
    assert 0.05 < float(values["b"].abs().max()) <= 0.1
    assert float(values["alone"].abs().max()) > 0.5


def test_a_stem_of_tokens_starts_as_that_of_torch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(30, 16, padding_idx=0)
            self.one, self.two = (
                nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2)
            )
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.two(self.one(self.emb(x))).mean(1))
            return out

    tokens = torch.arange(24).view(4, 6)
    private = private_state(lock(Model(), KEY, scheme="pad", example=tokens, behind="one"))
    assert not private["emb.weight"][0].any()
    assert float(private["emb.weight"][1:].std()) == pytest.approx(1, rel=0.1)
    assert not private["one.self_attn.in_proj_bias"].any()
    assert not private["one.self_attn.out_proj.bias"].any()
    assert float(private["one.linear1.bias"].abs().max()) <= 0.25
