"""The wait. Servers import a copy of this file."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

_PR_SET_TIMERSLACK = 29
_NS_PER_MS = 1_000_000


def build(a_ms: float, b_ms: float) -> Callable[[Sequence[Any]], Any]:
    """A function that gives back its only input, ``[n, ...]``, ``a_ms + b_ms * n`` after it was called."""

    def answer(inputs: Sequence[Any]) -> Any:
        started_ns = time.monotonic_ns()
        # The kernel may wake a thread 50 us late to save power, unless it is told not to (prctl(2)). Told on
        # every call: it holds for the calling thread alone, and a server may choose another one.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        due_ns = started_ns + round((a_ms + b_ms * len(inputs[0])) * _NS_PER_MS)
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
        return inputs[0]

    return answer
