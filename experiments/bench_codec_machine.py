"""What a machine's cores are worth together: the most that threads can gain there, whatever the code.

Cores of a rented machine are often the two halves of one core (SMT): what waits for results gains from the second
half, what keeps the arithmetic units busy hardly does, and memory is shared in any case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

CACHED = 1 << 11  # fp32 that a first-level cache holds with ease
ARITHMETIC_PASSES, MEMORY_ELEMENTS = 60_000, 1 << 23
REPETITIONS = 7


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _pass(values: Any, source: Any, times: int) -> None:
    for _ in range(times):
        for i in range(len(values)):
            values[i] = values[i] * np.float32(0.95) + source[i]


def gains(threads: int) -> dict[str, float]:
    """How many times as much work per second `threads` threads do as one: vector arithmetic within the first-level
    cache, and passes m = d * m + g over memory that no cache holds. Medians, one and many by turns.
    """
    return {
        "arithmetic": _gain(threads, CACHED, ARITHMETIC_PASSES),
        "memory": _gain(threads, MEMORY_ELEMENTS, 2),
    }


def _gain(threads: int, elements: int, times: int) -> float:
    arrays = [(np.zeros(elements, np.float32), np.ones(elements, np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def seconds(count: int) -> float:
            start = time.perf_counter()
            list(pool.map(lambda pair: _pass(*pair, times), arrays[:count]))
            return time.perf_counter() - start

        return _median_ratio(lambda: seconds(1), lambda: seconds(threads), threads)


def _median_ratio(one: Callable[[], float], many: Callable[[], float], threads: int) -> float:
    one(), many()  # compile, and touch the memory
    return statistics.median(threads * one() / many() for _ in range(REPETITIONS))
