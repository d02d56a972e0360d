"""Noised gradients: candidates are weighed by the likelihood, as a naive one has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shadowhelp import digits, open_victims, public

from fedkl.attacks.adaptive import Replay
from fedkl.attacks.adaptive.noisy import NOTE, Likelihood
from fedkl.attacks.adaptive.shadow_client import ShadowClient
from fedkl.attacks.network import Network
from fedkl.defenses import Noise, Sending
from fedkl.observation import Observation
from fedkl.rng import derive

COUNT = 12


def noised(multiplier: float, clip: float = 1.0) -> list[Observation]:
    value = Noise(clip=clip, noise_multiplier=multiplier)
    found = []
    for i, one in enumerate(open_victims(COUNT)):
        (change,) = one.changes
        sent = value.share(change, Sending(None, [*change], derive(i, "noise")))
        training = replace(one.training, **value.known)
        labels = digits()[1][i : i + 1][None]
        found.append(replace(one, changes=(sent,), training=training, labels=labels))
    return found


def test_scores_are_likelihoods_up_to_what_all_candidates_share() -> None:
    victims = noised(0.05)
    network = Network.of(victims)
    likelihood = Likelihood(victims, ShadowClient(network, {}, 10))
    x, y = digits()
    candidates = [x[i : i + 5] for i in range(COUNT)]
    found = likelihood.together(candidates, y[:COUNT])
    for i, scores in enumerate(found):
        label = torch.nn.functional.one_hot(y[i : i + 1], 10).float()
        for k, score in enumerate(scores.tolist()):
            made = network.change({}, candidates[i][k : k + 1], label)
            cross = sum(float((made[n] * victims[i].changes[0][n]).sum()) for n in made)
            own = sum(float(made[n].square().sum()) for n in made)
            assert score == pytest.approx(cross - own / 2, rel=1e-3, abs=1e-5)
        alone = likelihood.score(i, int(y[i]), candidates[i])
        torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-6)


def test_the_same_image_has_the_same_score_wherever_it_stands() -> None:
    victims = noised(0.05)
    likelihood = Likelihood(victims, ShadowClient(Network.of(victims), {}, 10))
    x, y = digits()
    (scores,) = [likelihood.score(0, int(y[0]), torch.cat([x[:3], x[:3]]))]
    assert torch.equal(scores[:3], scores[3:])


def test_replay_finds_under_noise_what_cosines_of_sketches_do_not() -> None:
    attack = Replay(*public(), secret_epochs=1, sketch=256)
    x, y = digits()
    alike = [(y == label).nonzero().flatten() for label in y[:COUNT].tolist()]
    pools = [torch.cat([torch.tensor([i]), p[p != i][:20]]) for i, p in enumerate(alike)]
    victims = noised(0.005)
    found = attack.reconstruct(victims, generator=derive(0, "attack"))
    assert all(NOTE in one.notes for one in found)
    together = found[0].together
    assert together is not None
    scores = together([x[pool] for pool in pools], y[:COUNT])
    hits = sum(int(one.argmax()) == 0 for one in scores)
    # What the attack would be without being told of the noise.
    deaf = [replace(v, training=replace(v.training, noise=0.0)) for v in victims]
    plain = attack.reconstruct(deaf, generator=derive(0, "attack"))
    scored = [one.score for one in plain]
    before = sum(
        int(score(0, x[pool]).argmax()) == 0
        for score, pool in zip(scored, pools, strict=True)
        if score is not None
    )
    assert hits == COUNT
    assert before < hits
