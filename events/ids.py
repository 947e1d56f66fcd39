"""The only place that draws random ids. Everything else is handed an `Ids`."""

import os
import random
import time
from typing import Protocol
from uuid import UUID

_VERSION_7 = 0x7 << 76
_VARIANT = 0x2 << 62
_RANDOM_BITS = (1 << 74) - 1
_STEP = (1 << 32) - 1
_RAND_A = 0xFFF << 64
_RAND_B = (1 << 62) - 1


class Ids(Protocol):
    """Fresh ids as a port."""

    def new(self) -> UUID:
        """Return an id that was never used before."""


class TimeOrderedIds:
    """UUID version 7 (RFC 9562, section 5.7): milliseconds first, so that indexes grow at one end.

    Each is larger than the one before (section 6.2, method 2): what is written at one go keeps its order, and a clock
    that is set back changes nothing.
    """

    def __init__(self) -> None:
        self._last = 0

    def new(self) -> UUID:
        noise = int.from_bytes(os.urandom(10)) & _RANDOM_BITS
        number = time.time_ns() // 1_000_000 << 74 | noise
        if number <= self._last:
            number = self._last + 1 + (noise & _STEP)
        self._last = number
        return UUID(int=number >> 74 << 80 | _VERSION_7 | (number << 2 & _RAND_A) | _VARIANT | (number & _RAND_B))


class Random(Protocol):
    """Randomness as a port; used for jitter only."""

    def uniform(self, low: float, high: float) -> float:
        """Return a number between `low` and `high`."""


def system_random() -> Random:
    """Return the process's own source of randomness."""
    return random.SystemRandom()
