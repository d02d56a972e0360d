"""The attacks by name."""

from __future__ import annotations

from fedkl.attacks import ATTACKS, NEED_PUBLIC, make_attack
from fedkl.errors import AttackError


def test_who_needs_public_images_is_who_fails_without_them() -> None:
    for name in ATTACKS:
        try:
            make_attack(name)
        except AttackError:
            assert name in NEED_PUBLIC
        else:
            assert name not in NEED_PUBLIC
