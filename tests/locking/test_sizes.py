"""What a run on the example shows: the stem with all that it computes, output layers, the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from fedkl.errors import LockError
from fedkl.key import Key
from fedkl.locking import affines, lock, lock_like, lock_spec, private_state, shared_state, unlock
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 3, 8, 8, generator=derive(0, "x"))


class Standardized(nn.Module):
    """Keeps a running mean of what it sees, and has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return x - self.mean


class Spectral(nn.Module):
    """A linear layer between frequencies, with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bchf,co->bohf", torch.fft.rfft(x), self.weight)
        return torch.fft.irfft(mixed, n=8)


class Noisy(nn.Module):
    """A layer that runs in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.mix(x)) if self.training else x
        return out


class Whole(nn.Sequential):
    """The model itself keeps the running mean."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("mean", torch.zeros(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        out: Tensor = super().forward(x - self.mean)
        return out


def behind(*stem: nn.Module, channels: int = 4, side: int = 6) -> nn.Sequential:
    return nn.Sequential(
        *stem,
        *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3)),
        *(nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, 5)),
    )


STEMS: dict[str, tuple[Callable[[], nn.Sequential], set[str], str]] = {
    "running mean of the input": (
        lambda: behind(Standardized(), nn.Conv2d(3, 4, 3)),
        {"0.mean", "1.weight", "1.bias"},
        "4",
    ),
    "running mean in the container": (
        lambda: Whole(*behind(nn.Conv2d(3, 4, 3))),
        {"mean", "0.weight", "0.bias"},
        "3",
    ),
    "in train mode alone": (
        lambda: behind(Noisy(), nn.Conv2d(3, 4, 3)),
        {"0.mix.weight", "0.mix.bias", "0.norm.running_mean", "1.weight", "1.bias"},
        "4",
    ),
    "power iteration": (
        lambda: behind(spectral_norm(nn.Conv2d(3, 4, 3))),
        {f"0.parametrizations.weight.{n}" for n in ("original", "0._u", "0._v")} | {"0.bias"},
        "3",
    ),
    "complex weights": (lambda: behind(Spectral(), side=8), {"0.weight"}, "3"),
}


@pytest.mark.parametrize("name", STEMS)
def test_all_that_a_stem_computes_is_private(name: str) -> None:
    make, names, shared = STEMS[name]
    net = make()
    model = lock(net, KEY, scheme="pad", example=X)
    assert names <= set(private_state(model))
    assert set(shared_state(model)) == {f"{shared}.weight", f"{shared}.bias"}
    twin = lock_like(net, KEY, lock_spec(model))
    assert all(torch.equal(t, private_state(twin)[n]) for n, t in private_state(model).items())
    before, after = net.state_dict(), unlock(model).state_dict()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())


def test_complex_weights_are_drawn_from_the_key() -> None:
    first, second = (
        private_state(lock(behind(Spectral(), side=8), key, scheme="pad", example=X))["0.weight"]
        for key in (KEY, Key.generate())
    )
    assert not torch.equal(first, second)
    parts = torch.view_as_real(first)
    assert parts.abs().max() <= 0.5  # 1 / sqrt(4 inputs)
    assert (parts.std(dim=(0, 1)) > 0.1).all()


class Cosine(nn.Module):
    """A classifier that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Body(nn.Module):
    """Two convolutions, a linear gate inside, and a head of some kind behind functional pooling."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.conv, self.norm, self.more = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.gate, self.kind = nn.Linear(4, 4), head
        self.first: nn.Module = {"convolution": nn.Conv2d(4, 5, 1), "custom": Cosine()}.get(
            head, nn.Linear(4, 5)
        )
        if head == "two":
            self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.more(self.norm(self.conv(x)).relu())
        y = y * self.gate(y.mean(dim=(2, 3))).sigmoid()[:, :, None, None]
        if self.kind == "convolution":
            return (F.adaptive_avg_pool2d(self.first(y), 1).flatten(1),)
        z = y.mean(dim=(2, 3))
        out = self.first(z).log_softmax(dim=1)
        return (out, self.second(z)) if self.kind == "two" else (out,)


@pytest.mark.parametrize("head", ["linear", "convolution", "custom", "two"])
def test_the_head_is_what_the_output_follows_from(head: str) -> None:
    sent = set(shared_state(lock(Body(head), KEY, scheme="pad", example=X)))
    assert sent == {f"{layer}.{n}" for layer in ("more", "gate") for n in ("weight", "bias")}


def test_behind_a_last_norm_the_head_is_the_last_linear_layer() -> None:
    net = nn.Sequential(*behind(nn.Conv2d(3, 4, 3)), nn.LayerNorm(5))
    assert set(shared_state(lock(net, KEY, scheme="pad", example=X))) == {"3.weight", "3.bias"}


class Turned(nn.Module):
    """Tokens in axis 0 inside, and perhaps outside."""

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.mix, self.fc, self.outside = nn.Linear(8, 8), nn.Linear(8, 3), outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x if self.outside else x.transpose(0, 1))
        out: Tensor = self.fc(self.mix(self.norm(x)).relu().mean(dim=0))
        return out


@pytest.mark.parametrize("outside", [False, True])
def test_tokens_before_the_batch_are_refused(outside: bool) -> None:
    net, x = Turned(outside=outside), torch.rand(4, 7, 5)
    with pytest.raises(LockError, match=r"not the first axis.*batch_first=True.*channel"):
        lock(net, KEY, scheme="pad", example=x)
    lock(net, KEY, scheme="channel", example=x)


def encoder(**how: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **how)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class PerToken(nn.Module):
    """An output for every token; in axis 0, as torch's layers are unless told otherwise."""

    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.emb, self.enc, self.out = nn.Embedding(50, 16), encoder(**how), nn.Linear(16, 50)

    def forward(self, src: Tensor) -> Tensor:
        out: Tensor = self.out(self.enc(self.emb(src)))
        return out


class Recurrent(nn.Module):
    """``turned``: it looks at what comes later, instead of at what came before."""

    def __init__(self, *, turned: bool = False, **how: bool) -> None:
        super().__init__()
        self.rnn, self.norm, self.turned = nn.LSTM(5, 8, **how), nn.LayerNorm(8), turned
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(0) if self.turned else x
        x = self.rnn(x)[0]
        x = x.flip(0) if self.turned else x
        out: Tensor = self.out(self.mix(self.norm(x)).relu())
        return out


TOKENS = torch.arange(60) % 50
FIRST: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "attention": (PerToken, TOKENS[:48].reshape(12, 4), {"behind": "emb"}),
    "as many tokens as examples": (PerToken, TOKENS[:36].reshape(6, 6), {"behind": "emb"}),
    "one example": (PerToken, TOKENS[:12].reshape(12, 1), {"behind": "emb"}),
    "a recurrent layer": (Recurrent, torch.rand(9, 4, 5), {}),
    "one that looks ahead": (lambda: Recurrent(turned=True), torch.rand(9, 4, 5), {}),
}


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
@pytest.mark.parametrize("kind", FIRST)
def test_tokens_before_the_batch_are_refused_also_with_an_output_per_token(kind: str) -> None:
    make, x, where = FIRST[kind]
    with pytest.raises(LockError, match=r"not the first axis.*batch_first=True.*channel"):
        lock(make(), KEY, scheme="pad", example=x, **where)
    lock(make(), KEY, scheme="channel", example=x, **where)


@pytest.mark.filterwarnings("ignore::fedkl.errors.ShortcutWarning")
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_tokens_behind_the_batch_are_not(batch: int) -> None:
    model = PerToken(batch_first=True)
    locked = lock(
        model, KEY, scheme="pad", example=TOKENS[: batch * 5].view(batch, 5), behind="emb"
    )
    assert lock_spec(locked).sites[0].shape == (5, 16)
    lock(Recurrent(batch_first=True), KEY, scheme="pad", example=torch.rand(batch, 9, 5))


@pytest.mark.parametrize("groups", [1, 3])
def test_norms_over_the_batch_are_no_tokens(groups: int) -> None:
    """In eval mode too its examples hear of each other, and channels perhaps do not."""
    net = behind(nn.Conv2d(3, 3, 3, groups=groups), channels=3)
    net[1] = nn.BatchNorm2d(3, track_running_stats=False)
    assert lock_spec(lock(net, KEY, scheme="pad", example=X)).sites[0].shape == (3, 6, 6)


def test_max_length_makes_room_for_tokens_alone() -> None:
    series = nn.Sequential(
        *(nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
        *(nn.LayerNorm(4), nn.Flatten(), nn.Linear(24, 3)),
    )
    model = lock(series, KEY, scheme="pad", example=torch.rand(4, 2, 6), max_length=9)
    assert {name: tuple(scale.shape) for name, (scale, _) in affines(model).items()} == {
        "1": (6, 6),
        "4": (9, 4),
    }
    with pytest.raises(LockError, match=r"max_length=9 is for tokens.*leave it out"):
        lock(behind(nn.Conv2d(3, 4, 3)), KEY, scheme="pad", example=X, max_length=9)


@pytest.mark.parametrize("head", [None, False])
def test_private_layers_are_found_where_gradients_are_off(head: bool | None) -> None:
    net = nn.Sequential(*behind(nn.Conv2d(3, 4, 3)), nn.Linear(5, 2))
    usual = lock(net, KEY, scheme="pad", head=head, example=X)
    with torch.no_grad():
        model = lock(net, KEY, scheme="pad", head=head, example=X)
    assert lock_spec(model) == lock_spec(usual)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Conv2d(3, 3, 1), r"0\.0\.weight"),
        (
            nn.BatchNorm2d(3, affine=False),
            r"0\.0\.running_mean",
        ),  # told by nothing but their moving
    ],
)
def test_what_is_scripted_cannot_be_private(layer: nn.Module, name: str) -> None:
    net = behind(torch.jit.script(nn.Sequential(layer)), nn.Conv2d(3, 4, 3))
    with pytest.raises(LockError, match=f"{name} would be private.*scripted"):
        lock(net, KEY, scheme="pad", example=X, inplace=True)
    assert net(X).shape == (4, 5)
    assert lock(net, KEY, layers="2", example=X, length=8)(X).shape == (4, 5)
