"""The encoded requests, made once and shared by all workers through an anonymous memory file.

Requests may carry a bearer token, so they live in memory that has no name on any disk and
vanishes with the last process that holds it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np

_NUMBER_BYTES = 8


def share_requests(requests: Iterable[bytes]) -> int:
    """Write the requests to a new memory file; returns its descriptor (inheritable), for `open_requests` and `os.close`."""
    ends: list[int] = [0]
    with os.fdopen(os.memfd_create("requests"), "wb") as file:
        for request in requests:
            file.write(request)
            ends.append(ends[-1] + len(request))
        file.write(bytes(-ends[-1] % _NUMBER_BYTES))
        file.write(np.asarray([*ends, len(ends)], dtype="<i8").tobytes())
        file.flush()
        descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return descriptor


def open_requests(descriptor: int) -> Sequence[memoryview]:
    """The requests as read-only views of the shared memory, without copying."""
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    numbers = view.cast("q")
    count = numbers[-1]
    ends = numbers[-1 - count : -1]
    return [view[ends[i] : ends[i + 1]] for i in range(count - 1)]
