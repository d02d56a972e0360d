"""The arms of `studies/pad.py`: settings of every run."""

from __future__ import annotations

from typing import Any

PAD = {"name": "pad"}
WIDE = {"inner_scale_law": "wide", "inner_spread": 1.0}
ONE_KEY = {**PAD, "one_key": True, "learned": "channel"}  # all clients hold the same
ONE_SEALED = {**ONE_KEY, "seal_private": True}  # of the federation: see settings_of
SEALED_SIGNS = {  # of ResNet-20, on validation: 88.5 %, as above 88.3; LeNet 86.3 and 86.9
    **ONE_SEALED,
    "scale_law": "sign",
    "spread": 1.0,
    "inner_scale_law": "sign",
    "inner_spread": 0.1,
    "lr": 0.07,
}
MILD = {"spread": 0.1, "scale_law": "near-one", "inner_spread": 0.1}  # signs at random all the same
ARMS: dict[str, dict[str, Any]] = {
    "alone": {"name": "norm"},  # every client for itself: what is a federation worth?
    "norm": {"name": "norm"},
    "fedbn": {"name": "fedbn"},
    "channel": {"name": "channel"},
    "channel of own starts": {"name": "channel", "group_key": False},
    "pad": PAD,
    "pad-open-head": {**PAD, "head": False},
    "pad-wide": {**PAD, **WIDE},
    "no key": {"name": "open-pad", "head": True},  # private stem, head and maps, from equal starts
    "hardly any pad": {**PAD, **MILD},
    "pad of one key": ONE_KEY,
    "one key and head": {**ONE_KEY, "head": False},
    "one key sealed": ONE_SEALED,
    "sealed signs": SEALED_SIGNS,
    "norm at one length": {"name": "norm"},
    "pad at one length": PAD,
}
LENGTHS = {"lenet": 2.5, "resnet20": 2.0}  # about as long as updates are in the middle of a run
SEALED = "one key sealed"  # private layers go from client to client, unread by the server
TUNED: dict[str, tuple[float, ...]] = {  # after all 10 rounds; the first is of the blocks before
    "norm": (0.05, 0.1, 0.2),
    "pad": (0.05, 0.1),
    SEALED: (0.03, 0.05, 0.1),
    "sealed signs": (0.07,),
}
BEST = {"norm": 0.1, "sealed signs": 0.07, "fedbn": 0.1, "pad": 0.05}  # fedbn takes norm's
MANY_SEEDS = ("norm", "sealed signs")  # the comparison that is about one point
MANY_CLIENTS = {  # images over all clients, seconds of a cell, arms
    "clients": (18_000, 40.0, ("alone", "norm", "pad", "pad-open-head", "pad of one key", SEALED)),
    "resnet20-clients": (12_000, 250.0, ("norm", "sealed signs", "pad", "alone")),
}
SAME_LENGTH = ("norm at one length", "pad at one length")
CAUSES = ("no key", "hardly any pad", "channel", "channel of own starts")
# Rates of norm and fedbn were chosen on validation by studies/accuracy.py, the pad's here.
LENET: dict[str, Any] = {
    "model": {"name": "lenet"},
    "data": {"dataset": "fashion-mnist", "samples": 6_000, "channels": 1},
    "training": {"schedule": "cosine", "lr": 0.05},
    "federation": {"rounds": 10},
    "evaluation": {"every": 0, "wrong_keys": 5, "wrong_key_images": 1_000},
}
RESNET: dict[str, Any] = {
    "model": {"name": "resnet20"},
    "data": {"samples": 4_000, "image_size": 16},
    "training": {"lr": 0.03},
}
VIT: dict[str, Any] = {
    "model": {"name": "vit:tiny"},
    "data": {"samples": 4_000, "image_size": 16},
    "training": {"lr": 0.05},
}
BLOCK = {"behind": "encoder.layers.encoder_layer_0"}
SHARED = {"head": False}
SIGNS = {"inner_scale_law": "sign", "inner_spread": 0.1}
FRONTIER: dict[str, tuple[dict[str, Any], float]] = {
    "norm": ({"name": "norm"}, 0.03),
    "pad": (PAD, 0.03),
    "pad, lr 0.05": (PAD, 0.05),
    "shared head": ({**PAD, **SHARED}, 0.03),
    "shared head, lr 0.1": ({**PAD, **SHARED}, 0.1),
    "wide throughout, shared head": ({**PAD, **WIDE, **SHARED}, 0.03),
    "wide throughout, shared head, lr 0.1": ({**PAD, **WIDE, **SHARED}, 0.1),
    "first block only, shared head": ({**PAD, **SHARED, "layers": "first"}, 0.03),
    "inner signs, shared head": ({**PAD, **SIGNS, **SHARED}, 0.03),
    "inner signs, lr 0.05": ({**PAD, **SIGNS}, 0.05),
    "inner signs, spread 1, lr 0.05": ({**PAD, **SIGNS, "spread": 1.0}, 0.05),
    "spread 1": ({**PAD, "spread": 1.0}, 0.03),
    "hardly any pad": ({**PAD, **MILD}, 0.03),
    "no key: private stem, head and maps": ({"name": "open-pad", "head": True}, 0.03),
    "near-one throughout": ({**PAD, "scale_law": "near-one"}, 0.03),
    "gain 3": ({**PAD, "gain": 3.0}, 0.03),
    "gain 0.3, lr 0.05": ({**PAD, "gain": 0.3}, 0.05),
    "learned per channel, lr 0.05": ({**PAD, "learned": "channel"}, 0.05),
}
DEPTHS: dict[str, tuple[int, dict[str, Any], int]] = {  # behind stage, lock, seeds at most
    "norm": (2, {"name": "norm"}, 99),
    "fedbn": (2, {"name": "fedbn"}, 99),
    "alone": (2, {"name": "norm"}, 99),
    "pad, behind stage 2": (2, PAD, 99),
    "pad, behind stage 2, spread 5": (2, {**PAD, "spread": 5.0}, 99),
    "pad, behind stage 2, spread 10": (2, {**PAD, "spread": 10.0}, 1),
    "pad, behind stage 1": (1, PAD, 1),
    "no key, behind stage 2": (2, ARMS["no key"], 1),
    "no key, behind stage 1": (1, ARMS["no key"], 1),
}
LONG = {"federation": {"rounds": 20}}
DIRICHLET = {"data": {"partition": "dirichlet"}}
RENEWALS: dict[str, dict[str, Any]] = {
    "never": {},
    "all at once": {"every": 3},
    "staggered": {"every": 3, "stagger": True},
    "all at once, 100 steps": {"every": 3, "steps": 100},
}


def settings_of(lock: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run under a lock; ``seal_private`` and ``lr`` are not of the defense."""
    defense = {name: value for name, value in lock.items() if name not in ("seal_private", "lr")}
    sealed = {"federation": {"seal_private": True}} if "seal_private" in lock else {}
    return {
        "defense": defense,
        **sealed,
        **({"training": {"lr": lock["lr"]}} if "lr" in lock else {}),
    }
