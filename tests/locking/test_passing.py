"""What goes around the first lock of a pad, and secrets that a move of the model loses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkl.errors import LockError, ShortcutWarning
from fedkl.key import Key
from fedkl.locking import epoch_of, lock, lock_spec, renew, set_key, shared_state
from fedkl.models import build
from fedkl.rng import derive

KEY = Key.generate()
X = torch.rand(4, 1, 8, 8, generator=derive(0, "x"))
TOKENS = torch.randint(5, (4, 6), generator=derive(0, "tokens"))


class Ways(nn.Module):
    """A stem with a norm, and perhaps a way around it."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.side, self.fc = nn.Linear(64, 128), nn.Linear(128, 3)
        self.gate, self.way = nn.Parameter(torch.zeros(1)), way

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stem = self.conv(x)
        y = self.bn(stem).relu().flatten(1)
        if self.way == "branch":
            y = y + self.side(x.flatten(1))
        if self.way == "shortcut":
            y = y + stem.flatten(1)
        if self.way == "behind":
            y = y + self.side(y[:, :64])
        if self.way == "gate":
            y = y + self.gate * self.side(x.flatten(1))
        if self.way == "frozen":
            y = y + self.side(x.flatten(1)).detach()
        if self.way == "rounded":
            y = y + self.side((x > 0.5).float().flatten(1))
        out: Tensor = self.fc(y)
        if self.way == "auxiliary" and self.training:
            return out, self.side(stem.flatten(1)[:, :64])
        return out


class Remembering(Ways):
    """A layer that runs last keeps a mean of the input, of which the output hears nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()
        self.last.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out: Tensor = self.last(super().forward(x))
        if self.training:
            self.last.seen.copy_(x.mean())
        return out


class Encoder(nn.Module):
    """Token ids have no derivative; the embedding in the stem has."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.fc(self.block(self.embed(ids)).mean(dim=1))
        return out


class Functional(nn.Module):
    """Looks indices up without an embedding, and once more beside the lock."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(nn.functional.one_hot(ids, 5).float())
        out: Tensor = self.fc((self.mix(self.norm(x)) + x).mean(dim=1))
        return out


class Loss(nn.Module):
    """In train mode takes targets, which are no input of the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Ways()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return (out - target).square().mean() if self.training else out


class Bytes(nn.Module):
    """Takes images as bytes, and labels beside them."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.net = Ways(way)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x.float() / 255), labels)


BYTES = ((255 * X).byte(), torch.arange(4) % 3)


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (lambda: Ways("branch"), X),
        (lambda: Ways("shortcut"), X),
        (lambda: Ways("gate"), X),  # closed at the start only
        (lambda: Ways("frozen"), X),  # no gradient, but the next layer's gets to see it
        (lambda: Ways("rounded"), X),
        (lambda: Ways("auxiliary"), X),  # in train mode alone
        (Remembering, X),
        (lambda: Functional(), TOKENS),
        (lambda: Bytes("branch"), BYTES),
        (lambda: Encoder(norm_first=True), TOKENS),
    ],
)
def test_a_way_around_the_first_lock_is_told(make: Callable[[], nn.Module], example: Any) -> None:
    with pytest.warns(ShortcutWarning, match="passes the first lock") as seen:
        model = lock(make(), KEY, scheme="pad", example=example)
    assert seen[0].filename == __file__  # the caller's line, not one of ours
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (Ways, X),
        (lambda: Ways("behind"), X),
        (Bytes, BYTES),
        (Loss, (X, torch.rand(4, 3))),
        (lambda: Encoder(norm_first=False), TOKENS),
        (lambda: resnet20(), X),
    ],
)
def test_nothing_is_told_where_there_is_none(make: Callable[[], nn.Module], example: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock(make(), KEY, scheme="pad", example=example)
        lock(Ways("branch"), KEY, scheme="channel", example=X)  # which hides nothing anyway


def resnet20() -> nn.Module:
    return build("resnet20", num_classes=3, channels=1, image_size=8, generator=derive(0, "net"))


def locked(scheme: str) -> nn.Module:
    return lock(Ways(), KEY, scheme=scheme, example=X).eval()


@pytest.mark.parametrize("scheme", ["pad", "channel"])
def test_half_precision_and_back_costs_the_secret_nothing(scheme: str) -> None:
    model = locked(scheme)
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, model(X)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)(X.to(dtype))
        model.float().load_state_dict(state)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    double = model.double()(X.double())
    torch.testing.assert_close(double.float(), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scheme", ["pad", "channel"])
@pytest.mark.parametrize("empty", [lambda m: m.to_empty(device="cpu"), lambda m: m.to("meta")])
def test_a_secret_that_was_emptied_is_missed(scheme: str, empty: Callable[[Any], Any]) -> None:
    model = locked(scheme)
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, model(X)
    empty(model)
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state)
    with pytest.raises(LockError, match=r"emptied.*set_key"):
        model(X)
    set_key(model, KEY)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)


def test_renewal_drops_momentum_of_what_starts_again() -> None:
    model = lock(Ways(), KEY, scheme="pad", example=X).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    renew(model, KEY, 1, optimizer=optimizer)
    for parameter in model.parameters():  # momentum alone moves them
        parameter.grad = torch.zeros_like(parameter)
    kept = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = {
        n: bool((p != k).any()) for (n, p), k in zip(model.named_parameters(), kept, strict=True)
    }
    assert not any(m for n, m in moved.items() if "learned" in n)
    assert moved["fc.weight"]  # others go on


def step_of_lbfgs(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(X).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def test_renewal_drops_the_one_history_that_lbfgs_keeps_of_all_parameters() -> None:
    model = lock(Ways(), KEY, scheme="pad", example=X).eval()
    assert "learned" not in next(iter(model.named_parameters()))[0]  # which has the history
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    step_of_lbfgs(model, optimizer)
    renew(model, KEY, 1, keep_learned=True, optimizer=optimizer)
    assert optimizer.state
    renew(model, KEY, 2, optimizer=optimizer)
    twin = copy.deepcopy(model)
    step_of_lbfgs(model, optimizer)
    step_of_lbfgs(twin, torch.optim.LBFGS(twin.parameters(), lr=0.01, max_iter=3))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("keep", [False, True])
def test_renewal_drops_accumulated_gradients_of_what_starts_again(keep: bool) -> None:
    model = lock(Ways(), KEY, scheme="pad", example=X).train()
    model(X).square().sum().backward()
    renew(model, KEY, 1, keep_learned=keep)
    left = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("learned" in n for n in left) is keep
    assert "fc.weight" in left  # others go on


class Beside(nn.Module):
    """Indices that are looked up once more beside the lock, or whose positions are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 8), nn.LayerNorm(8)
        self.mix, self.beside = nn.Linear(8, 8), nn.Embedding(6, 8)
        self.fc = nn.Linear(8, 5, bias=False)
        self.way = way
        if way == "tied residual":
            self.fc.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.mix(self.norm(x).relu())
        if self.way == "indices":
            y = y + torch.relu_(self.beside(input=ids))
        if self.way == "positions":
            y = y + self.beside(torch.arange(ids.shape[1]))
        if self.way == "tied residual":
            y = y + x
        out: Tensor = self.fc(y.mean(dim=1))
        return out


@pytest.mark.parametrize("way", ["indices", "tied residual"])
@pytest.mark.parametrize("ids", [TOKENS, torch.zeros(4, 6, dtype=torch.long)])
def test_indices_that_go_around_are_told(way: str, ids: Tensor) -> None:
    with pytest.warns(ShortcutWarning, match="passes the first lock"):
        lock(Beside(way), KEY, scheme="pad", example=ids)


def test_positions_beside_the_lock_tell_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lock(Beside("positions"), KEY, scheme="pad", example=TOKENS)


def test_what_the_warning_names_has_no_way_around_without_a_graph_either() -> None:
    with pytest.warns(ShortcutWarning, match="passes the first lock") as seen:
        lock(Ways("frozen"), KEY, scheme="pad", example=X)
    assert "behind='conv'" not in str(seen[0].message)


def test_a_head_that_starts_at_zero_hides_no_way_around() -> None:
    net = Ways("branch")
    nn.init.zeros_(net.fc.weight)
    with pytest.warns(ShortcutWarning, match="passes the first lock"):
        lock(net, KEY, scheme="pad", head=False, example=X)


def starts_with_norm() -> nn.Sequential:
    return nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)),
    )


def test_a_norm_of_the_input_itself_lies_in_the_stem() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lock(starts_with_norm(), KEY, scheme="pad", example=X)
        lock(starts_with_norm(), KEY, example=X)
    assert [site.name for site in lock_spec(model).sites] == ["2"]
    assert set(shared_state(model)) == {"4.weight", "4.bias"}


def test_norms_of_norms_of_the_input_lie_in_the_stem() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), *starts_with_norm())
    model = lock(net, KEY, scheme="pad", example=X)
    assert [site.name for site in lock_spec(model).sites] == ["3"]
    with pytest.warns(ShortcutWarning, match=r"nothing secret but the pad.* on 1: "):
        lock(net, KEY, scheme="pad", layers=["1", "3"], example=X)


@pytest.mark.parametrize("layers", ["first", ["0", "2"]])
def test_a_lock_on_the_input_itself_is_told(layers: Any) -> None:
    with pytest.warns(ShortcutWarning, match=r"nothing secret but the pad.* on 0: .*layers="):
        lock(starts_with_norm(), KEY, scheme="pad", layers=layers, example=X)


def test_renewal_is_given_an_optimizer_of_the_lock_or_changes_nothing() -> None:
    model = lock(Ways(), KEY, scheme="pad", example=X)
    sgd = partial(torch.optim.SGD, lr=0.1)
    others: dict[str, Any] = {
        "got str": "sgd",
        "none of this model's learned maps": sgd(Ways().parameters()),
        "built, after lock": sgd(model.fc.parameters()),
    }
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for message, other in others.items():
        with pytest.raises(LockError, match=message):
            renew(model, KEY, 1, optimizer=other)
    assert epoch_of(model) == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    renew(model, KEY, 1, optimizer=sgd([p for n, p in model.named_parameters() if "shift" in n]))
    frozen = lock(Ways(), KEY, scheme="pad", learned="none", example=X)
    renew(frozen, KEY, 1, optimizer=sgd(frozen.fc.parameters()))  # nothing of the lock is learned
