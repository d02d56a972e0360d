"""What may leave the client is told by the tensors: wrappers and changed models send no secret."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm

from fedkl.errors import ExtraStateWarning, LockError, StateError
from fedkl.key import Key
from fedkl.locking import (
    check_optimizer,
    load_private_state,
    load_shared_state,
    lock,
    lock_spec,
    private_state,
    renew,
    shared_state,
    shared_views,
    unlock,
)

KEY = Key.generate()
X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    )


def locked(scheme: str = "pad") -> Any:
    return lock(cnn(), KEY, scheme=scheme, example=X)


def checkpointed(model: Any) -> nn.Module:
    apply_activation_checkpointing(model)
    return model  # type: ignore[no-any-return]


class Counting(nn.Sequential):
    """Has something of its own in its state dict."""

    def __init__(self) -> None:
        super().__init__(*cnn())
        self.extra: Any = {"images": 7}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def replacing(index: int, make: Callable[[nn.Module], Any]) -> Callable[[Any], nn.Module]:
    def change(model: Any) -> nn.Module:
        model[index] = make(model[index])
        return model  # type: ignore[no-any-return]

    return change


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


KEEPING: dict[str, Callable[[Any], nn.Module]] = {
    "activation checkpointing": checkpointed,
    "compiled stem": replacing(0, compiled),
    "compiled norm": replacing(1, compiled),
    "compiled shared layer": replacing(3, compiled),
    "compiled model": compiled,
    "data parallel head": replacing(8, nn.DataParallel),
    "compiled, then parallel": replacing(0, lambda m: nn.DataParallel(compiled(m))),
    "copy": copy.deepcopy,
    "copy after checkpointing": lambda m: copy.deepcopy(checkpointed(m)),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("scheme", ["channel", "pad"])
@pytest.mark.parametrize("how", KEEPING)
def test_wrappers_that_keep_the_tensors_change_nothing(how: str, scheme: str) -> None:
    plain = locked(scheme)
    model = KEEPING[how](copy.deepcopy(plain))
    for part in (shared_state, private_state):
        assert list(part(model)) == list(part(plain))
    state = {n: t + 1 for n, t in shared_state(model).items()}
    load_shared_state(model, state)
    assert all(torch.equal(t, state[n]) for n, t in shared_state(model).items())
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def old_weight_norm(layer: nn.Module) -> Any:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> Any:
    return prune.l1_unstructured(layer, "weight", 0.5)


def parts(model: Any) -> nn.Module:
    return nn.Sequential(*model.children())


def spoiled_norm(model: Any) -> nn.Module:
    """Neither a locked norm any more, nor without what the lock computed from private features."""
    class_ = type(model[1])
    model[1].__class__ = class_._fedkl_base
    return model  # type: ignore[no-any-return]


LOSING: dict[str, Callable[[Any], nn.Module]] = {
    "weight norm": replacing(0, weight_norm),
    "old weight norm": replacing(0, old_weight_norm),
    "pruning": replacing(8, pruned),
    "parts": parts,
    "a part": lambda m: m[:2],
    "the stem": lambda m: m[0],
    "the head": lambda m: m[8],
    "a locked norm": lambda m: m[1],
    "another stem": replacing(0, lambda m: nn.Conv2d(3, 8, 3)),
    "another norm": replacing(1, lambda m: nn.BatchNorm2d(8)),
    "a norm without its class": spoiled_norm,
    "another parameter": replacing(0, lambda m: setattr(m, "weight", None) or m),  # type: ignore[func-returns-value]
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("how", LOSING)
def test_a_changed_model_sends_nothing(how: str) -> None:
    model = LOSING[how](locked())
    with pytest.raises(StateError, match=r"(since lock\(\)|parts of a locked model).*undo"):
        shared_state(model)


def test_sequences_around_layers_send_nothing_private() -> None:
    model = locked()
    before = {t.data_ptr() for t in private_state(model).values()}
    model[0] = nn.Sequential(model[0])
    model[8] = nn.Sequential(nn.Dropout(), model[8])
    assert set(shared_state(model)) == {"3.weight", "3.bias"}
    assert not before & {t.data_ptr() for t in shared_state(model).values()}
    renew(model, KEY, 1)
    assert lock_spec(nn.Sequential(model)) == lock_spec(model)
    assert set(shared_state(nn.Sequential(model))) == {"0.3.weight", "0.3.bias"}


def test_a_secret_is_private_under_every_name() -> None:
    model = locked()
    model.register_parameter("alias", model[0].weight)
    model.register_module("again", model[1])
    assert set(shared_state(model)) == {"3.weight", "3.bias"}


def test_two_locked_models_in_one() -> None:
    both = nn.ModuleDict({"a": locked(), "b": locked("channel")})
    names = set(shared_state(both))
    assert {"a.3.weight", "b.0.weight", "b.8.weight"} <= names
    assert not {"a.0.weight", "a.8.weight"} & names


def test_unlock_and_locks_drawn_again_find_wrapped_layers() -> None:
    plain = cnn()
    model = checkpointed(lock(plain, KEY, scheme="pad", example=X))
    opened = unlock(model).state_dict()
    assert all(torch.equal(t, opened[n]) for n, t in plain.state_dict().items())


def test_tensors_of_a_tied_head_stay_private() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
            self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.middle(self.norm(self.embed(x))))
            return out

    model = lock(Tied(), KEY, scheme="pad", example=torch.arange(8).reshape(2, 4))
    assert set(shared_state(checkpointed(model))) == {"middle.weight", "middle.bias"}


@pytest.mark.parametrize("use", [shared_state, lambda m: check_optimizer(m, SGD(m))])
def test_without_a_lock_there_is_nothing_to_tell_apart(use: Callable[[nn.Module], object]) -> None:
    with pytest.raises(LockError, match="not locked"):
        use(cnn())
    with pytest.raises(LockError, match="not locked"):
        use(unlock(locked()))
    use(lock(cnn(), None, scheme="norm", example=X))
    assert list(shared_views(cnn())) == list(cnn().state_dict())


def SGD(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_what_lies_in_the_memory_of_a_private_layer_is_not_sent() -> None:
    model = locked()
    model[3].bias.data = model[0].bias.data
    with pytest.raises(StateError, match=r"3\.bias lies in the same memory"):
        shared_state(model)
    plain = cnn()
    plain[0].weight.data = plain[3].weight.data[:, :3]
    with pytest.raises(StateError, match=r"3\.weight lies in the same memory"):
        lock(plain, KEY, scheme="pad", example=X, inplace=True)
    shared_state(lock(plain, KEY, scheme="pad", example=X))  # a copy has memory of its own


def test_views_of_one_vector_are_sent_without_the_rest_of_it(tmp_path: Path) -> None:
    model = locked()
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    torch.save(shared_state(model), tmp_path / "update")
    sent = (tmp_path / "update").read_bytes()
    for name in ("0.weight", "8.weight"):
        secret = private_state(model)[name].numpy().tobytes()
        assert secret not in sent
    for tensor in shared_state(model).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert shared_state(model)["3.weight"].data_ptr() != model[3].weight.data_ptr()
    load_shared_state(model, {n: t + 1 for n, t in shared_state(model).items()})
    assert torch.equal(shared_state(model)["3.weight"], model[3].weight)
    fresh = locked()
    assert shared_state(fresh)["3.weight"].data_ptr() == fresh[3].weight.data_ptr()


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, as PEFT makes them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.ModuleDict({"default": nn.LazyConv2d(2, 3)}), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down["default"](x))
        return out


def grown(layer: nn.Module) -> nn.Module:
    layer.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    return layer


STRANGERS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "adapter of the stem": (replacing(0, Adapted), r"0\.down\.default\.weight"),
    "layers around the head": (replacing(8, lambda m: nn.Sequential(nn.Linear(32, 32), m)), "8.0"),
    "parameter of a private layer": (replacing(0, grown), r"0\.extra"),
    "layer in front": (lambda m: m.insert(0, nn.BatchNorm2d(3)), r"0\.weight, 0\.bias"),
}


@pytest.mark.parametrize("how", STRANGERS)
def test_what_came_in_around_the_pad_is_not_sent(how: str) -> None:
    change, names = STRANGERS[how]
    model = change(locked())
    with pytest.raises(StateError, match=rf"since lock\(\): .*{names}.* came in.*undo"):
        shared_state(model)
    with pytest.raises(StateError, match="came in"):
        shared_state(copy.deepcopy(model))


def test_adapters_of_shared_layers_are_sent() -> None:
    model = replacing(3, Adapted)(locked())
    model(X)
    sent = set(shared_state(model))
    assert {"3.base_layer.weight", "3.down.default.weight", "3.up.weight"} <= sent
    assert not any(name.startswith(("0.", "8.")) for name in sent)
    assert set(unlock(replacing(0, grown)(locked())).state_dict()) >= {"0.extra", "3.weight"}


@pytest.mark.parametrize("extra", [{"images": 7}, torch.ones(3)])
def test_extra_state_is_in_neither_part_and_stays_in_the_model(extra: Any) -> None:
    plain = Counting()
    plain.extra = extra
    with pytest.warns(ExtraStateWarning, match="_extra_state, which is neither shared nor private"):
        model = lock(plain, KEY, scheme="pad", example=X)
    shared, private = shared_state(model), private_state(model)
    assert "_extra_state" in model.state_dict()
    assert set(model.state_dict()) - {"_extra_state"} == {*shared, *private}
    load_shared_state(model, {n: t + 1 for n, t in shared.items()})
    load_private_state(model, private)
    assert str(model.extra) == str(extra)
    assert "_extra_state" not in shared_views(plain)


def test_a_copy_that_a_hook_puts_into_the_state_dict_is_not_sent() -> None:
    def add(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state[prefix + "ema"] = state[prefix + "0.weight"].detach().clone()

    plain = cnn()
    plain._register_state_dict_hook(add)
    with pytest.warns(ExtraStateWarning, match="ema, which is neither shared nor private"):
        model = lock(plain, KEY, scheme="pad", example=X)
    assert "ema" in model.state_dict()
    assert not any("ema" in part(model) for part in (shared_state, private_state))
    late = locked()
    late._register_state_dict_hook(add)
    assert "ema" not in shared_state(late)
