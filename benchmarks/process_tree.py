"""Memory and disk of a run while it goes on, looked at from outside: all its processes together, and its directory."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own is
_KB = 1024


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a process and all its descendants, and at a directory.

    ``resident_bytes`` is the sum of the proportional set sizes (PSS): what the processes map, with pages that several
    of them map counted once, pages of files included. ``anonymous_bytes`` is the part that is no file's: it exists in
    memory only. ``disk_bytes`` are the blocks allocated to the directory's files.
    """

    at_ns: int
    resident_bytes: int
    anonymous_bytes: int
    disk_bytes: int


def look(pid: int, directory: Path, at_ns: int) -> Look:
    """Look once. Processes that end meanwhile count as far as they were read."""
    resident = anonymous = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            sizes = _rollup(process.pid)
            resident += sizes.get("Pss", 0)
            anonymous += sizes.get("Pss_Anon", 0)
    return Look(at_ns, resident, anonymous, disk_bytes(directory))


def disk_bytes(directory: Path) -> int:
    """Blocks allocated to the files below a directory, in bytes; 0 where there is none."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
                total += (Path(folder) / name).stat().st_blocks * _BLOCK_BYTES
    return total


class Watch:
    """Looks every ``period_s`` from a thread, between entering and leaving; ``looks`` is what it saw."""

    def __init__(self, pid: int, directory: Path, period_s: float) -> None:
        self.looks: list[Look] = []
        self._pid, self._directory, self._period_s = pid, directory, period_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s):
            self.looks.append(look(self._pid, self._directory, time.monotonic_ns()))


def _rollup(pid: int) -> dict[str, int]:
    """The sizes in ``/proc/PID/smaps_rollup`` in bytes; empty for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except (OSError, ValueError):
        return {}
    return {name: int(value.split()[0]) * _KB for name, value in (line.split(":", 1) for line in lines)}
