"""When a CPU stood still: what a measurement on a shared machine cannot be blamed for.

A watcher on each CPU that sleeps for a quarter of a millisecond at a time and notes when it woke late. It asks
for a real-time priority, so that what delays it is the machine (a hypervisor that gave the CPU to
others, the kernel), not the process that is measured. Where it may not have one, it cannot tell them apart, and saw nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from servebench.clock import now_ns

Times = npt.NDArray[np.int64]

_WATCHER = """
import gc, json, os, signal, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except PermissionError:
    print("blind", flush=True)
    sys.exit()
gc.disable()
ended, parent = [], os.getppid()
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
NAP_NS, LATE_NS = 250_000, 150_000
pauses, now = [], time.monotonic_ns()
print("watching", flush=True)
while not ended and os.getppid() == parent:
    slept, now = now, time.sleep(NAP_NS / 1e9) or time.monotonic_ns()
    if now - slept > NAP_NS + LATE_NS:
        pauses.append((slept, now))
print(json.dumps(pauses), flush=True)
"""


class Witness:
    """Watches CPUs as a context manager; afterwards ``pauses_ns`` has begin and end of each pause, on CLOCK_MONOTONIC."""

    def __init__(self, cpus: Sequence[int]) -> None:
        self._cpus = cpus
        self._watchers: list[subprocess.Popen[str]] = []
        #: Whether there was the permission to watch.
        self.sees = False
        self.pauses_ns: Times = np.empty((0, 2), dtype=np.int64)

    def __enter__(self) -> Witness:
        for cpu in self._cpus:
            command = [sys.executable, "-c", _WATCHER, str(cpu)]
            self._watchers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        self._began_ns = now_ns()
        said = {watcher.stdout.readline() for watcher in self._watchers if watcher.stdout is not None}
        self.sees = said == {"watching\n"}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched_ns = (now_ns() - self._began_ns) * len(self._cpus)
        pauses = []
        for watcher in self._watchers:
            watcher.terminate()
            pauses += json.loads(watcher.communicate()[0] or "[]")
        self.pauses_ns = np.array(sorted(pauses), dtype=np.int64).reshape(-1, 2)

    def paused_share(self) -> float:
        """How much of the time a CPU stood still, on average."""
        return float(np.diff(self.pauses_ns).sum()) / self._watched_ns

    def touched(self, begin_ns: Times, end_ns: Times) -> npt.NDArray[np.bool_]:
        """Which of these spans (CLOCK_MONOTONIC) a pause overlaps."""
        # Of the pauses that begin before the span's end, the one that ends last: in the order of begins, a running maximum.
        latest_ns = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(self.pauses_ns[:, 1])])
        overlapping: npt.NDArray[np.bool_] = latest_ns[np.searchsorted(self.pauses_ns[:, 0], end_ns)] > begin_ns
        return overlapping
