"""One seed, many independent streams: changing what one draws never disturbs another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream with these names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream with these names: the same numbers on every device."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """For functions of torch that take no generator; what others draw stays as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
