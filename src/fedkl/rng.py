"""Randomness as an argument: named generators, and torch's global state borrowed for a while.

Nothing here makes secrets; key material comes from :mod:`fedkl.key` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and on every label, and on nothing else.

    ``derive(0, "client", 3, "round", 7)`` is independent of ``derive(0, "client", 3, "round", 8)``
    and the same in every process.
    """
    text = "/".join([str(seed), *(f"{type(label).__name__}:{label}" for label in labels)])
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


@contextmanager
def borrowed(generator: torch.Generator) -> Iterator[None]:
    """Within the block torch's global randomness (dropout, ``nn.init``) comes from ``generator``.

    The state outside is restored afterwards, and ``generator`` moves on, so two blocks in a row
    differ. CUDA devices, where there are any, are seeded from ``generator`` as well.
    """
    start = int(torch.randint(2**62, (1,), generator=generator).item())
    cpu = torch.Generator()
    cpu.manual_seed(start)
    with torch.random.fork_rng():
        torch.set_rng_state(cpu.get_state())
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                cuda = torch.Generator(f"cuda:{index}")
                cuda.manual_seed(start)
                torch.cuda.set_rng_state(cuda.get_state(), index)
        yield
