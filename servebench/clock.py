"""The one clock, and a timer that is exact to microseconds on a busy event loop.

CLOCK_MONOTONIC is comparable between processes of one host, so every time stamp in
servebench is ``now_ns()``. Event-loop timers are not good enough for pacing: epoll's and
uvloop's round to whole milliseconds. `DeadlineTimer` waits on a kernel timerfd instead,
which wakes the loop some tens of microseconds after its time, and in *precise* mode wakes a
little early and then spins through loop iterations, so sockets are served while it waits.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

now_ns = time.monotonic_ns

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1


class _Itimerspec(ctypes.Structure):
    _fields_ = [
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    ]


class DeadlineTimer:
    """Calls ``callback()`` once, at or as soon as possible after an absolute monotonic time.

    ``spin_ns`` is how long before the deadline the loop is woken to spin (0: rely on the
    kernel timer alone, cheapest; 100-200 us hides the wake-up delay of most machines).
    One deadline is pending at a time: `arm` replaces it. The callback may arm again.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None], *, spin_ns: int = 0) -> None:
        self._loop = loop
        self._callback = callback
        self._spin_ns = spin_ns
        self._deadline_ns: int | None = None
        self._spinning = False
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._fd: int = libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._fd < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"timerfd_create: {os.strerror(errno)}")
        self._spec = _Itimerspec()
        self._spec_address = ctypes.addressof(self._spec)
        loop.add_reader(self._fd, self._expired)

    def arm(self, deadline_ns: int) -> None:
        """Set the pending deadline (monotonic ns); one already past fires on the next loop iteration."""
        self._deadline_ns = deadline_ns
        if self._spinning:
            return
        wake_ns = deadline_ns - self._spin_ns
        if wake_ns - now_ns() < 5_000:  # arming the kernel timer costs more than this
            self._spinning = True
            self._loop.call_soon(self._spin)
            return
        self._spec.value_s, self._spec.value_ns = divmod(wake_ns, 1_000_000_000)
        self._settime(self._fd, _TFD_TIMER_ABSTIME, self._spec_address, None)

    def disarm(self) -> None:
        """Forget the pending deadline."""
        self._deadline_ns = None

    def close(self) -> None:
        """Release the kernel timer; no callback follows."""
        if self._fd >= 0:
            self._deadline_ns = None
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # re-armed between the wake-up and this read
            return
        if not self._spinning:
            self._spinning = True
            self._spin()

    def _spin(self) -> None:
        deadline_ns = self._deadline_ns
        if deadline_ns is None:
            self._spinning = False
            return
        now = now_ns()
        if now >= deadline_ns:
            self._spinning = False
            self._deadline_ns = None
            self._callback()
        elif deadline_ns - now > self._spin_ns + 5_000:  # the deadline moved away while we spun
            self._spinning = False
            self.arm(deadline_ns)
        else:
            self._loop.call_soon(self._spin)
