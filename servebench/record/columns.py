"""Per-query records while a run goes on: fixed-width columns in a memory-mapped file.

One file a worker, sized from the plan. The worker stores machine integers straight into the
map (no messages, no objects kept), the main process reads progress from the same pages, and
what a killed process had measured is still there. Times are absolute CLOCK_MONOTONIC ns;
0 means "not yet".

File: a 4096-byte header of little-endian int64 slots (`HeaderSlot`), then each column of
`COLUMNS` in order, contiguous, 8-byte aligned. `ROW_BYTES` is what a query costs on disk.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 4096
MAGIC = 0x31_4C_4F_43_42_53  # "SBCOL1", little-endian

#: name -> (numpy dtype, memoryview format). Order is the file's order.
COLUMNS: dict[str, tuple[str, Literal["q", "i", "I", "H", "B"]]] = {
    "scheduled_ns": ("<i8", "q"),
    "issued_ns": ("<i8", "q"),
    "first_byte_ns": ("<i8", "q"),
    "completed_ns": ("<i8", "q"),
    "sample": ("<i4", "i"),
    "response_bytes": ("<u4", "I"),
    "connection": ("<u4", "I"),
    "status": ("<u2", "H"),
    "outcome": ("|u1", "B"),
}
_ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, (dtype, _) in COLUMNS.items()}
ROW_BYTES = sum(_ITEM_BYTES.values())


class HeaderSlot(IntEnum):
    """int64 slots of the header, in order."""

    MAGIC = 0
    ROWS = 1
    WORKER = 2
    WORKERS = 3
    START_NS = 4  #: t=0 of the schedule, 0 until the run starts
    CURSOR = 5  #: rows issued or shed so far
    ENDED = 6  #: rows that have ended (with any outcome, SHED included)
    OK = 7
    FINAL = 8  #: 1 once the worker has closed its books


class Columns:
    """One worker's mapped columns.

    ``view(name)`` is for the hot path: a typed memoryview, item assignment costs ~40 ns.
    ``array(name)`` is the same memory as a numpy array, for vector work. ``header`` is a
    memoryview of int64 slots.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, rows: int) -> None:
        self.path = path
        self.rows = rows
        self._map = buffer
        self._bytes = memoryview(buffer)
        self.header = self._bytes[:HEADER_BYTES].cast("q")
        self._offsets: dict[str, int] = {}
        offset = HEADER_BYTES
        for name, size in _ITEM_BYTES.items():
            self._offsets[name] = offset
            offset += _padded(rows * size)

    @classmethod
    def create(cls, path: Path, *, rows: int, worker: int, workers: int) -> Columns:
        """A new file, every row NOT_ISSUED. Its blocks are reserved: a full disk is an `OSError` here and no crash mid-run."""
        size = file_bytes(rows)
        with path.open("x+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            buffer = mmap.mmap(file.fileno(), size)
        columns = cls(path, buffer, rows)
        columns.header[HeaderSlot.ROWS] = rows
        columns.header[HeaderSlot.WORKER] = worker
        columns.header[HeaderSlot.WORKERS] = workers
        columns.header[HeaderSlot.MAGIC] = MAGIC
        return columns

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Columns:
        """Map an existing file. `ValueError` when it is not one of ours or is cut short."""
        with path.open("r+b" if writable else "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER_BYTES:
                raise ValueError(f"{path}: not a column file (only {size} bytes)")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        header = memoryview(buffer)[:HEADER_BYTES].cast("q")
        magic, rows = header[HeaderSlot.MAGIC], header[HeaderSlot.ROWS]
        header.release()
        if magic != MAGIC or rows < 0 or size < file_bytes(rows):
            raise ValueError(f"{path}: not a column file, or cut short")
        return cls(path, buffer, rows)

    def view(self, name: str) -> memoryview[int]:
        """The column as a typed memoryview of ``rows`` items."""
        start = self._offsets[name]
        return self._bytes[start : start + self.rows * _ITEM_BYTES[name]].cast(COLUMNS[name][1])

    def array(self, name: str) -> npt.NDArray[Any]:
        """The column as a numpy array over the same memory."""
        return np.frombuffer(self._bytes, dtype=COLUMNS[name][0], count=self.rows, offset=self._offsets[name])

    def release(self, start: int, stop: int) -> None:
        """Unmap the memory of the rows from ``start`` to ``stop`` from this process until they are used again.

        They stay in the file. The page in which ``stop`` lies is kept: its other rows are about to be used.
        """
        stop = min(stop, self.rows)
        for name, size in _ITEM_BYTES.items():
            first, last = self._offsets[name] + start * size, self._offsets[name] + stop * size
            first, last = first - first % mmap.PAGESIZE, last - last % mmap.PAGESIZE
            if first < last:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def file_bytes(rows: int) -> int:
    """Size of a column file with ``rows`` queries."""
    return HEADER_BYTES + sum(_padded(rows * size) for size in _ITEM_BYTES.values())


def _padded(size: int) -> int:
    return (size + 7) & ~7
