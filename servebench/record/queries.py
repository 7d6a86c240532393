"""The queries of a run on disk: workers' mapped columns, the Parquet file they become, and reading either piece by piece.

Query q is row q // workers of worker q % workers. In what is read and in the Parquet file,
times are relative to t=0; -1 here, null there, where the event never happened.

pyarrow is imported by those who need it: a run begins without it, and its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from servebench.errors import ProfileError
from servebench.record.columns import COLUMNS, Columns, HeaderSlot
from servebench.record.files import replacing
from servebench.record.outcome import Outcome
from servebench.record.rundata import Array, Run

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

#: Name -> dtype of what a query's row holds.
QUERY_COLUMNS = {name: np.dtype(dtype) for name, (dtype, _) in COLUMNS.items()} | {"worker": np.dtype(np.uint16)}
_TIMES = ("scheduled_ns", "issued_ns", "first_byte_ns", "completed_ns")


class Queries(Protocol):
    """Rows that can be read again and again."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def read(self, names: Sequence[str]) -> Iterator[tuple[Array, ...]]:
        """The named columns, some rows at a time, in query order."""


class StoredRun(Run):
    """A run whose rows stay on disk and are read whenever they are asked for."""

    __slots__ = ("_queries", "environment", "facts")

    def __init__(self, facts: dict[str, Any], environment: dict[str, Any], queries: Queries) -> None:
        self.facts = facts
        self.environment = environment
        self._queries = queries

    @property
    def planned(self) -> int:
        return self._queries.rows

    def chunks(self, *names: str) -> Iterator[tuple[Array, ...]]:
        return self._queries.read(names)

    def column(self, name: str) -> Array:
        values = np.empty(self.planned, dtype=QUERY_COLUMNS[name])
        at = 0
        for (chunk,) in self._queries.read((name,)):
            values[at : at + len(chunk)] = chunk
            at += len(chunk)
        return values


class MappedQueries:
    """The columns of all workers, of a run that has not closed its books; read about ``at_once`` rows at a time."""

    def __init__(self, columns: Sequence[Columns], *, at_once: int) -> None:
        self._at_once = at_once
        self._columns = sorted(columns, key=lambda one: one.header[HeaderSlot.WORKER])

    @property
    def rows(self) -> int:
        return sum(columns.rows for columns in self._columns)

    def read(self, names: Sequence[str]) -> Iterator[tuple[Array, ...]]:
        workers = len(self._columns)
        step = max(1, self._at_once // workers)
        for start in range(0, max(one.rows for one in self._columns), step):
            stretch = slice(start, start + step)
            yield tuple(self._gather(name, stretch) for name in names)
            for columns in self._columns:
                columns.release(start, start + step)

    def _gather(self, name: str, stretch: slice) -> Array:
        """Rows of all workers, in query order."""
        workers = len(self._columns)
        if name == "worker":
            size = sum(len(one.array("outcome")[stretch]) for one in self._columns)
            return np.resize(np.arange(workers, dtype=np.uint16), size)
        parts = [self._part(columns, name, stretch) for columns in self._columns]
        values = np.empty(sum(map(len, parts)), dtype=QUERY_COLUMNS[name])
        for worker, part in enumerate(parts):
            values[worker::workers] = part
        return values

    def _part(self, columns: Columns, name: str, stretch: slice) -> Array:
        """Rows of one worker, as they are read by others."""
        values = columns.array(name)[stretch]
        if name in _TIMES:
            relative = values - columns.header[HeaderSlot.START_NS]
            if name != "scheduled_ns":
                relative[values == 0] = -1
            return relative
        if name == "outcome":
            issued = self._part(columns, "issued_ns", stretch) >= 0
            return np.where((values == Outcome.NOT_ISSUED) & issued, np.uint8(Outcome.OUTSTANDING), values)
        return values


class ParquetQueries:
    """The Parquet file of a run. `ProfileError` when it is broken, or not one of ours."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        self._codes = {outcome.kind: int(outcome) for outcome in Outcome}
        try:
            self._file = pq.ParquetFile(path)
            self.rows: int = self._file.metadata.num_rows
            missing = sorted(QUERY_COLUMNS.keys() - set(self._file.schema_arrow.names))
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from None
        if missing:
            raise self._broken(f"it has no column {missing[0]}")

    def read(self, names: Sequence[str]) -> Iterator[tuple[Array, ...]]:
        import pyarrow as pa

        try:
            for group in range(self._file.num_row_groups):
                # One group by one thread: reading ahead would hold several times the columns asked for.
                table = self._file.read_row_group(group, columns=list(names), use_threads=False)
                yield tuple(self._values(name, table.column(name).combine_chunks()) for name in names)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise self._broken(error) from None

    def _values(self, name: str, column: pa.Array) -> Array:
        if name == "outcome":
            lookup = np.array([self._codes[kind] for kind in column.dictionary.to_pylist()] or [0], dtype=np.uint8)
            codes: Array = lookup[column.indices.to_numpy()]
            return codes
        values: Array = (column.fill_null(-1) if name in _TIMES else column).to_numpy()
        return values

    def _broken(self, why: object) -> ProfileError:
        return ProfileError(f"{self._path}: cannot be read: {' '.join(str(why).split())}")


def write_queries(columns: Sequence[Columns], path: Path, *, rows_a_group: int) -> None:
    """Turn the columns of all workers into one Parquet file, whole or not at all. `OSError` when the disk does not take it."""
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    repeating = [name for name in QUERY_COLUMNS if name not in _TIMES]
    with replacing(path, binary=True) as file:
        try:
            for group in MappedQueries(columns, at_once=rows_a_group).read(tuple(QUERY_COLUMNS)):
                table = _arrow_table(dict(zip(QUERY_COLUMNS, group, strict=True)))
                if writer is None:
                    # Times hardly repeat: trying a dictionary for them costs half the time and a quarter of the size.
                    writer = pq.ParquetWriter(file, table.schema, compression="zstd", use_dictionary=repeating)
                writer.write_table(table)
            if writer is not None:
                writer.close()
        except OSError:
            if writer is not None:
                writer.is_open = False  # or its finalizer fails once more, with a traceback that nobody can catch
            raise


def _arrow_table(group: dict[str, Array]) -> pa.Table:
    import pyarrow as pa

    codes = np.zeros(max(Outcome) + 1, dtype=np.int8)
    codes[[int(outcome) for outcome in Outcome]] = np.arange(len(Outcome))
    fields = {}
    for name, values in group.items():
        if name == "outcome":
            words = pa.array([outcome.kind for outcome in Outcome])
            fields[name] = pa.DictionaryArray.from_arrays(pa.array(codes[values]), words)
        elif name in _TIMES:
            fields[name] = pa.array(values, mask=values < 0)
        else:
            fields[name] = pa.array(values)
    return pa.table(fields)
