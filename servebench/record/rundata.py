"""A run as one value: its facts, and one row per planned query.

This is what crosses the waist between the half that measures and the half that judges: every
number of ``run.json`` is recomputed from it. A run of millions of queries is judged without
holding them all: `Run` is read some columns and some rows at a time. `RunData` is a run in
memory; `servebench.record.rundir.open_run` gives one that stays on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Rows that are looked at together, so that what is made of them stays within a few MB.
CHUNK_ROWS = 1 << 18


class Run(ABC):
    """Facts and columns of one run. The columns are named as `RunData`'s fields, equally long, in query order."""

    __slots__ = ()

    facts: dict[str, Any]  #: ``servebench.facts/1``: settings, schedule, workers, errors, clocks
    environment: dict[str, Any]  #: the host and the software, as collected before the run

    @property
    @abstractmethod
    def planned(self) -> int:
        """How many queries were planned: rows."""

    @abstractmethod
    def chunks(self, *names: str) -> Iterator[tuple[Array, ...]]:
        """The named columns, some rows at a time, in order: one array a name, equally long and not to be changed."""

    @abstractmethod
    def column(self, name: str) -> Array:
        """One whole column, in an array that is the caller's own."""

    def section(self, name: str) -> dict[str, Any]:
        """A mapping among the facts, empty where the run did not get as far as knowing it."""
        return self.facts.get(name) or {}

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The facts of the worker processes, empty where they are not known."""
        return self.facts.get("workers") or []


@dataclass(frozen=True, slots=True, eq=False)
class RunData(Run):
    """A run in memory.

    Times are ns relative to the run's t=0, -1 where the event never happened. A failed
    query's ``completed_ns`` is when the failure was known, an unfinished one's is when the
    drain ended: a lower bound. `ValueError` when the columns differ in length.
    """

    facts: dict[str, Any]
    environment: dict[str, Any]
    scheduled_ns: npt.NDArray[np.int64]
    issued_ns: npt.NDArray[np.int64]
    first_byte_ns: npt.NDArray[np.int64]
    completed_ns: npt.NDArray[np.int64]
    outcome: npt.NDArray[np.uint8]  #: `servebench.record.outcome.Outcome`
    sample: npt.NDArray[np.int32]
    status: npt.NDArray[np.uint16]  #: HTTP status, 0 where none came
    response_bytes: npt.NDArray[np.uint32]
    worker: npt.NDArray[np.uint16]
    connection: npt.NDArray[np.uint32]  #: number of the connection within its worker

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)[2:]}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")

    @property
    def planned(self) -> int:
        return len(self.scheduled_ns)

    def chunks(self, *names: str) -> Iterator[tuple[Array, ...]]:
        for start in range(0, self.planned, CHUNK_ROWS):
            yield tuple(getattr(self, name)[start : start + CHUNK_ROWS] for name in names)

    def column(self, name: str) -> Array:
        values: Array = getattr(self, name)
        return values.copy()
