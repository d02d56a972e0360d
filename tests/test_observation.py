"""What an observation refuses to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedkl.errors import ConfigError
from fedkl.observation import Observation, Training, threat_of

UPDATES = ({"weight": torch.zeros(2, 3)},) * 3


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"kind": "weights"}, "'weights'"),
        ({"changes": ()}, "without any update; expected one or more"),
        ({"statistics": ({},)}, "got 1 statistics for 3 updates; expected one for each, or none"),
        ({"lock_gradients": ({},) * 4}, "got 4 lock_gradients for 3 updates"),
    ],
)
def test_what_does_not_fit_together_is_refused(over: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "model": nn.Linear(3, 2),
        "kind": "gradient",
        "changes": UPDATES,
        "image_shape": (1, 1, 3),
        "num_classes": 2,
        "training": Training(),
        "threat": threat_of("adaptive"),
    }
    assert Observation(**fitting, statistics=({},) * 3).count == 3
    with pytest.raises(ConfigError, match=message):
        Observation(**{**fitting, **over})
