"""The claims of docs/theory.md, each with numbers. The page names the test of every claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, one_hot, unfold

from fedkl.certificate import cancellation, prior_of
from fedkl.errors import ShortcutWarning
from fedkl.key import Key
from fedkl.locking import lock, lock_spec, shared_state
from fedkl.locking.rebuild import held_secrets
from fedkl.models import build
from fedkl.rng import derive
from test_certificate_cancellation import CLASSES, KEY, OTHER, Shortcut, X, Y, plain, seen

IMAGE, LABEL = X[0].double(), Y[0]


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------ why gradients leak


def test_linear_layer_hands_its_input_over() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).double()
    found = gradients(model, IMAGE, LABEL)
    weight, bias = found["1.weight"], found["1.bias"]
    torch.testing.assert_close(weight, torch.outer(bias, IMAGE.flatten()))
    for row, delta in zip(weight, bias, strict=True):
        torch.testing.assert_close(row / delta, IMAGE.flatten())


def test_convolution_is_a_linear_layer_per_patch() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1).double()
    out = conv(IMAGE)
    out.retain_grad()
    out.square().sum().backward()
    delta, patches = out.grad.flatten(2)[0], unfold(IMAGE, 3, padding=1)[0]
    torch.testing.assert_close(conv.weight.grad.flatten(1), delta @ patches.T)
    torch.testing.assert_close(conv.bias.grad, delta.sum(1))


def test_convolution_alone_has_fewer_equations_than_pixels_and_layers_add_up() -> None:
    """LeNet's first layer: 300 numbers about 1,024 pixels; the layers behind make up for it."""
    model = build("lenet", num_classes=10, channels=1, image_size=32, generator=derive(0, "m"))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sizes["conv1.weight"] == 300
    assert sum(sizes.values()) > 10 * 32 * 32
    # With δ known the gradient is linear in x: its rank is the number of equations it has.
    delta = torch.rand(12, 256, dtype=torch.float64, generator=derive(0, "delta"))
    basis = torch.eye(1024, dtype=torch.float64).view(1024, 1, 32, 32)
    rows = (unfold(basis, 5, padding=2, stride=2) @ delta.T).flatten(1)
    assert int(torch.linalg.matrix_rank(rows)) == 300


def test_batch_norm_takes_brightness_and_contrast_and_nothing_else() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, eps=1e-14), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(32, CLASSES)),
    ).double()
    true = gradients(model, IMAGE, LABEL)
    brighter = gradients(model, 0.5 * IMAGE + 0.2, LABEL)
    another = gradients(model, IMAGE.roll(1, -1), LABEL)
    for name, value in true.items():
        torch.testing.assert_close(brighter[name], value, atol=1e-12, rtol=1e-7)
    assert float((another["4.weight"] - true["4.weight"]).norm()) > 1e-2


# ------------------------------------------------------------------------ the channel lock


def test_gradients_of_scale_and_shift_are_sums_of_the_normalized_features() -> None:
    norm = nn.BatchNorm2d(2).double()
    features = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    out = norm(features)
    out.retain_grad()
    (out**3).sum().backward()
    hat = (out - norm.bias[:, None, None]) / norm.weight[:, None, None]
    torch.testing.assert_close(norm.weight.grad, (out.grad * hat).sum((0, 2, 3)))
    torch.testing.assert_close(norm.bias.grad, out.grad.sum((0, 2, 3)))


def test_lock_gradients_hand_the_key_over() -> None:
    model = lock(plain(), KEY, example=torch.rand(4, 1, 6, 6), length=64)
    found = gradients(model, X[0], LABEL)
    weight = found["1.keylock.scale_weight"]
    column = weight[int(weight.norm(dim=1).argmax())]
    key = KEY.vector(64, "sign")
    assert abs(float(torch.cosine_similarity(column, key, dim=0))) == pytest.approx(1, abs=1e-5)
    assert torch.equal(column.sign() * column.sign()[0], key * key[0])


def test_unknown_scales_are_few_and_equations_many() -> None:
    net = build("lenet", num_classes=10, channels=1, image_size=32, generator=derive(0, "m"))
    for layers, unknowns in (("first", 24), ("all", 72)):
        locked = lock(net, KEY, layers=layers, example=torch.rand(4, 1, 32, 32))
        held = held_secrets(locked)
        assert sum(value.numel() for value in held.values()) == unknowns
        names = set(shared_state(locked))
        equations = sum(p.numel() for n, p in locked.named_parameters() if n in names)
        assert equations - unknowns > 14 * 32 * 32


def test_a_zeroed_lock_says_nothing_whatever_the_key() -> None:
    """What the released code does to test wrong keys: γ = β = 0 leaves a constant."""
    model = build("lenet", num_classes=10, channels=1, image_size=16, generator=derive(0, "m"))
    locked = lock(model, KEY, example=torch.rand(4, 1, 16, 16)).eval()
    with torch.no_grad():
        for name, parameter in locked.named_parameters():
            if "keylock" in name:
                parameter.zero_()
        out = locked(torch.rand(50, 1, 16, 16))
    assert float(out.std(dim=0).max()) < 1e-6


def test_uniform_keys_are_alike_and_signs_are_not() -> None:
    cosine = {
        law: torch.cosine_similarity(
            Key.generate().vector(1024, law), Key.generate().vector(1024, law), dim=0
        ).item()
        for law in ("uniform", "sign")
    }
    assert cosine["uniform"] == pytest.approx(0.75, abs=0.05)
    assert abs(cosine["sign"]) < 0.2


def test_a_path_from_one_sign_to_the_other_passes_where_the_channel_is_silent() -> None:
    """A descent in γ meets γ = 0, where the gradient of the image through that channel is zero."""
    head = nn.Linear(2 * 36, CLASSES).double()
    stem = nn.Conv2d(1, 2, 3, padding=1, bias=False).double()

    def pull(scale: float) -> float:
        x = IMAGE.clone().requires_grad_()
        hat = nn.functional.batch_norm(stem(x), None, None, training=True)
        gamma = torch.tensor([scale, 0.0], dtype=torch.float64)[:, None, None]
        cross_entropy(head(torch.sigmoid(gamma * hat).flatten(1)), LABEL).backward()
        return float(x.grad.norm())

    assert pull(0.0) == 0
    assert min(pull(-1.0), pull(1.0)) > 1e-3


def test_locks_have_mirror_images_that_compute_the_same() -> None:
    """σ(−z) = 1 − σ(z): all signs of a lock turned over, the next norm takes the constant away."""
    inside, scale = torch.randn(1, 2, 6, 6, dtype=torch.float64), torch.tensor([0.7, -1.3])
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)

    def behind(gamma: Tensor, again: float) -> Tensor:
        hidden = torch.sigmoid(gamma.double()[:, None, None] * inside)
        hat = nn.functional.batch_norm(conv2d(hidden, weight), None, None, training=True)
        return torch.sigmoid(again * hat)

    torch.testing.assert_close(behind(-scale, -1.0), behind(scale, 1.0))
    assert float((behind(-scale, 1.0) - behind(scale, 1.0)).norm()) > 0.1


# ------------------------------------------------------------------------ the pad


def test_under_a_pad_any_picture_explains_the_gradient() -> None:
    observation, held = seen(plain(), X, Y, scheme="pad")
    locked = lock(plain(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad")
    prior = prior_of(lock_spec(locked), held)
    found = cancellation(observation, X, Y, held, OTHER, prior=prior, generator=derive(0))
    assert found.swapped < 1e-12


def test_a_shortcut_around_the_first_lock_voids_the_argument() -> None:
    with pytest.warns(ShortcutWarning):
        locked = lock(Shortcut(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad")
    with pytest.warns(ShortcutWarning):
        observation, held = seen(Shortcut(), X, Y, scheme="pad")
    prior = prior_of(lock_spec(locked), held)
    found = cancellation(observation, X, Y, held, OTHER, prior=prior, generator=derive(0))
    assert found.swapped > 1e-3


def test_pre_norm_transformers_carry_the_image_past_the_first_lock() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    x = torch.rand(1, 5, 8)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.zero_()
            norm.bias.copy_(torch.randn(8))
        other = torch.rand(1, 5, 8)
        apart = block(x) - block(other)
    # Whatever the locks put out, the difference of two images arrives behind them unchanged.
    torch.testing.assert_close(apart, x - other)


class Residual(nn.Module):
    """A block around whose norm a shortcut leads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.conv(x))
        return out


def test_behind_a_whole_block_the_argument_holds() -> None:
    def model() -> nn.Module:
        return nn.Sequential(Residual(), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, CLASSES))

    with pytest.warns(ShortcutWarning, match="behind='0'"):
        lock(model(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad", head=False)
    settings = {"scheme": "pad", "behind": "0", "head": False}
    observation, held = seen(model(), X, Y, **settings)
    locked = lock(model(), KEY, example=torch.rand(4, 1, 6, 6), **settings)
    prior = prior_of(lock_spec(locked), held)
    found = cancellation(observation, X, Y, held, OTHER, prior=prior, generator=derive(0))
    assert found.cut
    assert found.swapped < 1e-12


def test_differences_under_one_pad_are_free_of_it() -> None:
    generator = derive(0, "differences")
    gamma, beta = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    u = torch.randn(3, 100, generator=generator, dtype=torch.float64)
    z = gamma * u + 30 * beta
    torch.testing.assert_close((z[0] - z[1]) / gamma, u[0] - u[1], rtol=1e-6, atol=1e-9)
    ratio = (z[0] - z[1]) / (z[0] - z[2])
    torch.testing.assert_close(ratio, (u[0] - u[1]) / (u[0] - u[2]), rtol=1e-5, atol=1e-9)


def likelihood(spread: float, *, trials: int = 300) -> float:
    """Share of true images found among 100 when features, z and the law of γ and β are known."""
    generator = derive(0, "likelihood", round(spread))
    # Features of images of one class: a common part and their own, smooth over 3,072 positions.
    own = torch.randn(100, 64, generator=generator) @ torch.randn(64, 3072, generator=generator)
    u = own / own.std(dim=1, keepdim=True)
    found = 0
    for trial in range(trials):
        true = trial % 100
        signs = torch.randint(2, (3072,), generator=generator) * 2 - 1
        gamma = signs * (1 + 0.3 * torch.randn(3072, generator=generator)).abs()
        z = gamma * u[true] + spread * torch.randn(3072, generator=generator)
        # The sign is unknown: z is N(0, 1.09 u² + spread²) up to the shape of γ's law.
        width = 1.09 * u.square() + spread**2
        found += int((-(z.square() / width + width.log()).sum(1)).argmax()) == true
    return found / trials


def test_a_finite_spread_and_a_known_stem_identify() -> None:
    assert likelihood(1.0) > 0.9
    assert likelihood(100.0) < 0.1


def test_without_signs_smooth_features_are_denoised() -> None:
    """3,072 noisy numbers about a few: averaging finds them unless every sign is a guess."""
    generator = derive(0, "smooth")
    basis = torch.randn(3072, 5, generator=generator)
    truth = torch.randn(5, generator=generator)
    u = basis @ truth
    beta = 3 * torch.randn(3072, generator=generator)
    signs = torch.randint(2, (3072,), generator=generator) * 2 - 1

    def agreement(z: Tensor) -> float:
        found = torch.linalg.lstsq(basis, z[:, None]).solution.flatten()
        return float(torch.cosine_similarity(found, truth, dim=0))

    assert agreement(u + beta) > 0.99
    # The signs leave something of the size of u / sqrt(3072) in every coefficient, and no more.
    scattered = torch.linalg.lstsq(basis, (signs * u + beta)[:, None]).solution
    assert float(scattered.norm()) < 0.1 * float(truth.norm())


def padded() -> nn.Module:
    return lock(plain(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad", head=False).train()


def test_a_pad_hides_neither_label_nor_confidence() -> None:
    """The classifier's bias gradient is p − y whatever stands in front of it."""
    model = padded()
    logits = model(X[0]).detach()
    found = gradients(model, X[0], LABEL)["7.bias"]
    expected = logits.softmax(-1)[0] - one_hot(LABEL, CLASSES)[0]
    torch.testing.assert_close(found, expected)
    assert int(found.argmin()) == int(LABEL)
    # So -log p(y), on which membership inference rests, is there to be read.
    loss = -math.log1p(float(found[LABEL]))
    assert loss == pytest.approx(float(cross_entropy(logits, LABEL)), rel=1e-4)


def test_classifier_hands_the_last_features_over_unless_it_is_private() -> None:
    model = padded()
    caught: list[Tensor] = []
    model[7].register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    found = gradients(model, X[0], LABEL)
    delta = found["7.bias"]
    read = (
        found["7.weight"][int(delta.abs().argmax())]
        / delta.abs().max()
        * delta[int(delta.abs().argmax())].sign()
    )
    torch.testing.assert_close(read, caught[0][0], rtol=1e-4, atol=1e-6)
    closed = lock(plain(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad", head=True)
    assert "7.weight" in shared_state(model)
    assert "7.weight" not in shared_state(closed)


def test_shared_statistics_tell_what_the_pad_hides() -> None:
    """Two pictures under shifts that make their gradients equal differ in what their norms saw."""
    model, other = padded(), OTHER[None]
    norm = model[1]
    assert not any(n.startswith("1.running") for n in shared_state(model))
    start = {n: b.clone() for n, b in norm.named_buffers()}
    found = []
    for x in (X[0], other):
        norm.load_state_dict({**norm.state_dict(), **start})
        model(x)
        found.append((norm.running_mean - 0.9 * start["running_mean"]) / 0.1)
    features = model[0](X[0])
    torch.testing.assert_close(found[0], features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-4
    shared = lock(plain(), KEY, example=torch.rand(4, 1, 6, 6), scheme="pad", share_statistics=True)
    assert "1.running_mean" in shared_state(shared)


def seen_through(spread: float, *, signs: bool) -> float:
    """Cosine of labels and what a linear layer, trained under many pads, says under a new one."""
    generator = derive(0, "invariance")
    basis = torch.randn(5, 500, generator=generator)

    def presented(count: int, pads: int) -> tuple[Tensor, Tensor]:
        labels = torch.randn(count, 5, generator=generator)
        which = torch.randint(pads, (count,), generator=generator)
        beta = spread * torch.randn(pads, 500, generator=generator)
        gamma = torch.randn(pads, 500, generator=generator).sign() if signs else torch.ones(1)
        return (gamma.expand(pads, -1)[which] * (labels @ basis) + beta[which]), labels

    z, labels = presented(4_000, 40)
    ridge = 4_000 * torch.eye(500)
    layer = torch.linalg.solve(z.T @ z + ridge, z.T @ labels)
    z, labels = presented(200, 1)
    return float(torch.cosine_similarity((z @ layer).flatten(), labels.flatten(), dim=0))


def test_layers_trained_under_many_pads_see_through_a_new_one() -> None:
    assert seen_through(0.3, signs=False) > 0.95
    assert seen_through(3.0, signs=False) > 0.8
    assert seen_through(100.0, signs=False) < 0.5
    assert abs(seen_through(3.0, signs=True)) < 0.3
