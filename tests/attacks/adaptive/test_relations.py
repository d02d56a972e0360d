"""Sizes of gradients and cosines among them: laws, sketches, and the joint choice by hand."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkl.attacks.adaptive.relations import Agreement, Relations, SizedSketch
from fedkl.errors import AttackError
from fedkl.rng import derive

D = torch.float64


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(*shape, generator=derive(0, name), dtype=D)


def test_a_sized_sketch_has_the_size_in_front_and_is_of_unit_length() -> None:
    gradients = {"a": normal(5, 4, 3), "b": normal(5, 40, name="b")}
    shared = {"a": torch.zeros(4, 3), "b": torch.zeros(40)}
    for length in (16, 100):
        sketch = SizedSketch(shared, length, derive(0, "sketch"))
        found = sketch(gradients)
        flat = torch.cat([gradients["a"].flatten(1), gradients["b"]], dim=1)
        torch.testing.assert_close(found[:, 0], flat.norm(dim=1).log())
        torch.testing.assert_close(found[:, 1:].norm(dim=1), torch.ones(5, dtype=D))
        larger = sketch({name: 7 * value for name, value in gradients.items()})
        torch.testing.assert_close(larger[:, 0] - found[:, 0], torch.full((5,), math.log(7)).to(D))
        torch.testing.assert_close(larger[:, 1:], found[:, 1:])
    assert bool(sketch({name: 0 * value for name, value in gradients.items()}).isfinite().all())


@pytest.mark.parametrize("shadows", [2, 5])
def test_how_far_a_victim_follows_the_shadows_is_told_by_these(shadows: int) -> None:
    truth = normal(40_000, name="truth")
    clients = 3 + 2 * (truth + 0.7 * normal(shadows + 1, 40_000, name="own"))
    victim, known = clients[0], clients[1:]
    law = Agreement.of(known)
    follows = float(torch.corrcoef(torch.stack([victim, known.mean(dim=0)]))[0, 1])
    assert float(law.follows) == pytest.approx(follows, abs=0.02)
    assert float(law.mean) == pytest.approx(3, abs=0.05)
    assert float(law.deviation) == pytest.approx(float(victim.std()), rel=0.02)
    assert float(law.spread) == pytest.approx(float(known.mean(dim=0).std()), rel=1e-6)


def test_clients_that_agree_in_nothing_tell_nothing_and_constants_no_nan() -> None:
    law = Agreement.of(normal(4, 1_000))
    assert float(law.follows) < 0.1
    flat = Agreement.of(torch.ones(3, 50, dtype=D))
    assert bool(flat.likelihood(torch.ones(2, dtype=D), torch.ones(2, dtype=D)).isfinite().all())


def test_likelihood_is_that_of_a_normal_given_the_other() -> None:
    law = Agreement(*(torch.tensor(v, dtype=D) for v in (1.0, 2.0, 1.5, 0.6)))
    seen, expected = 1 + 2 * normal(20), 1 + 1.5 * normal(20, name="expected")
    z, w = (seen - 1) / 2, (expected - 1) / 1.5
    want = scipy.stats.norm.logpdf(z.numpy(), 0.6 * w.numpy(), math.sqrt(1 - 0.36))
    found = law.likelihood(seen, expected)
    torch.testing.assert_close(found - found[0], torch.tensor(want - want[0]))
    far = law.likelihood(torch.tensor(1e6, dtype=D), torch.tensor(0.0, dtype=D))
    assert float(far) > -40  # one outlier does not outweigh everything


def sides(labels: Tensor, count: int, noise: float, name: str) -> list[Tensor]:
    """Clients that see the same sizes and relations in coordinates of their own."""
    x, size = normal(len(labels), 12, name=name), normal(len(labels), 1, name=f"size {name}")
    x = normalize(x + 2 * normal(3, 12, name="classes")[labels], dim=1)
    found = []
    for i in range(count):
        turn = torch.linalg.qr(normal(12, 12, name=f"turn {i}"))[0]
        own = normalize(x @ turn + noise * normal(*x.shape, name=f"noise {name} {i}"), dim=1)
        found.append(torch.cat([size + noise * normal(*size.shape, name=f"s {i}"), own], dim=1))
    return found


def by_hand(relations: Relations, seen: Tensor, labels: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """The joint choice, one pair of candidates at a time."""
    alone = [
        relations.by_size(seen[i : i + 1], labels[i : i + 1], r[None])[0]
        for i, r in enumerate(rows)
    ]
    belief = [torch.full((len(r),), 1 / len(r), dtype=D) for r in rows]
    scores = alone
    for _ in range(30):
        scores = [one.clone() for one in alone]
        for i in range(len(rows)):
            for j in range(len(rows)):
                if i == j:
                    continue
                law = relations.pairs[labels[i], labels[j]]
                for a in range(len(rows[i])):
                    for b in range(len(rows[j])):
                        expected = (rows[i][a, :, 1:] * rows[j][b, :, 1:]).sum(dim=1).mean()
                        tells = law.likelihood(seen[i, 1:] @ seen[j, 1:], expected)
                        scores[i][a] += 0.3 * belief[j][b] * tells
        belief = [0.5 * b + 0.5 * s.softmax(dim=0) for b, s in zip(belief, scores, strict=True)]
    return scores


def test_the_joint_choice_is_that_by_hand_with_candidates_of_any_number() -> None:
    labels = torch.arange(90) % 3
    everyone = sides(labels, 4, 0.3, "few")
    public = [side[30:] for side in everyone[1:]]
    relations = Relations(public, labels[30:], 3)
    seen = everyone[0][:4]
    rows = [
        torch.stack([s[[i, 12 + i, 15 + i][: 3 - i % 2]] for s in everyone[1:]], 1)
        for i in range(4)
    ]
    found = relations.together(seen, labels[:4], rows)
    assert [len(one) for one in found] == [3, 2, 3, 2]
    for one, want in zip(found, by_hand(relations, seen, labels[:4], rows), strict=True):
        torch.testing.assert_close(one, want)
    alone = relations.together(seen[:1], labels[:1], rows[:1])[0]
    torch.testing.assert_close(alone, relations.by_size(seen[:1], labels[:1], rows[0][None])[0])


def test_relations_find_what_turned_coordinates_hide() -> None:
    labels = torch.arange(660) % 3
    everyone = sides(labels, 4, 0.1, "many")
    relations = Relations([s[60:] for s in everyone[1:]], labels[60:], 3)
    seen, decoys = everyone[0][:60], 60 + torch.arange(60)[:, None] + 60 * torch.arange(9)
    rows = [torch.stack([s[[i, *decoys[i].tolist()]] for s in everyone[1:]], 1) for i in range(60)]
    sized = [
        relations.by_size(seen[i : i + 1], labels[i : i + 1], rows[i][None])[0] for i in range(60)
    ]
    both = relations.together(seen, labels[:60], rows)

    def rate(scores: list[Tensor]) -> float:
        return sum(bool(s[0] > s[1:].max()) for s in scores) / len(scores)

    assert 0.2 < rate(sized) < 0.8  # chance is 0.1
    assert rate(both) > 0.85
    strangers = [r[1:] for r in rows]  # without the truth nobody is the first by more than luck
    assert rate(relations.together(seen, labels[:60], strangers)) < 0.3


def test_clients_that_overflow_are_refused() -> None:
    labels = torch.arange(30) % 3
    some = sides(labels, 2, 0.2, "over")
    some[1][4, 0] = float("inf")  # the size alone
    with pytest.raises(AttackError, match="NaN or Inf"):
        Relations(some, labels, 3)


def test_classes_of_few_images_or_none_are_taken_with_the_others() -> None:
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 2)
    relations = Relations(sides(labels, 2, 0.2, "rare"), labels, 5)
    assert len(relations.sizes.mean) == 5
    pairs = relations.pairs.mean
    assert pairs.shape == (5, 5)
    assert pairs.equal(pairs.T)
    assert len({float(pairs[a, b]) for a, b in ((0, 0), (0, 1), (1, 1))}) == 3  # of their own
    assert pairs[2, 4] == pairs[3, 4] == pairs[0, 2]  # those of two classes
    assert pairs[4, 4] == pairs[2, 2] != pairs[2, 4]  # those of one
    torch.testing.assert_close(relations.sizes.mean[2], relations.sizes.mean[4])
    seen = sides(labels, 1, 0.2, "rare")[0]
    rows = [torch.stack([s[:3] for s in sides(labels, 2, 0.2, "rare")], 1)] * 2
    found = relations.together(seen[80:], torch.tensor([2, 4]), rows)
    assert all(bool(one.isfinite().all()) for one in found)
