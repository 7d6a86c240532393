"""The run directory: what a run leaves behind, and all that judging needs.

While a run goes on it holds the profile, the environment, first facts (state ``running``) and
the workers' mapped columns. `RunDirectory.finish` turns the columns into one Parquet file, a
row a planned query, and only then removes them; so a run that was killed, or whose disk
filled up, can be read as far as it came. Files appear whole: written beside, then renamed.
The directory is locked while its run is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from servebench.errors import ProfileError, RunError
from servebench.record.columns import COLUMNS, Columns, HeaderSlot
from servebench.record.files import replacing, write_json
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData

FACTS = "facts.json"
ENVIRONMENT = "environment.json"
PROFILE = "profile.yaml"
QUERIES = "queries.parquet"
RUN = "run.json"
SERVER = "server"
_TIMES = ("scheduled_ns", "issued_ns", "first_byte_ns", "completed_ns")
_ROWS_A_GROUP = 1 << 20


class RunDirectory:
    """A run directory that is being written, by the one process that holds its lock."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make the directory. `ProfileError` when it exists with something in it, or cannot be made: nothing is overwritten."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ProfileError(f"{path}: is not empty; choose another directory, nothing was overwritten")
            (path / SERVER).mkdir()
        except OSError as error:
            raise ProfileError(f"{path}: cannot be used for the run directory: {error.strerror}") from None
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def columns_path(self, worker: int, phase: str = "columns") -> Path:
        """Where a worker's records of a phase are."""
        return self.path / f"{phase}-{worker}.bin"

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        write_json(self.path / name, document)

    def write_profile(self, settings: dict[str, Any]) -> None:
        """Write the effective profile."""
        with replacing(self.path / PROFILE) as file:
            yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)

    def finish(self, facts: dict[str, Any]) -> None:
        """Close the books: columns to Parquet, then the final facts, then the columns may go.

        `RunError` when the disk does not take it; what was measured is then still in the columns.
        """
        files = sorted(self.path.glob("columns-*.bin"))
        try:
            if files:
                _write_queries([Columns.open(file) for file in files], self.path / QUERIES)
            self.write_json(FACTS, facts)
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror or error}; the records so far are kept beside it") from None
        for file in files:
            file.unlink()

    def unlock(self) -> None:
        """Let others finish what this process did not."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def read_run(path: Path) -> RunData:
    """Read a run directory, finished or not. `ProfileError` names what is missing or broken."""
    facts = _read_json(path / FACTS)
    if facts.get("schema") != "servebench.facts/1":
        raise ProfileError(f"{path / FACTS}: schema is {facts.get('schema')!r}, expected 'servebench.facts/1'")
    files = sorted(path.glob("columns-*.bin"))
    with contextlib.suppress(FileNotFoundError):
        return RunData(facts, _read_json(path / ENVIRONMENT, optional=True), **_read_queries(path / QUERIES))
    if not files:
        raise ProfileError(f"{path}: holds no records: neither {QUERIES} nor columns-*.bin")
    try:
        columns = [Columns.open(file) for file in files]
    except (OSError, ValueError) as error:
        raise ProfileError(f"{error}") from None
    _check_complete(path, columns)
    arrays = {name: np.concatenate(parts) for name, parts in _collect(_row_groups(columns)).items()}
    return RunData(facts, _read_json(path / ENVIRONMENT, optional=True), **arrays)


def is_running(path: Path) -> bool:
    """Whether a live process still writes this run directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ProfileError(f"{path.parent}: not a run directory: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ProfileError(f"{path}: expected a JSON object")
    return document


def _check_complete(path: Path, columns: list[Columns]) -> None:
    """Without one worker's rows, the others' would be taken for the whole run. `ProfileError` names the missing worker."""
    there = {one.header[HeaderSlot.WORKER] for one in columns}
    missing = sorted(set(range(columns[0].header[HeaderSlot.WORKERS])) - there)
    if missing:
        raise ProfileError(f"{path}: the records of worker {missing[0]} are missing: columns-{missing[0]}.bin")


def _row_groups(columns: list[Columns]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Query-order slices of all workers' columns: query q is row q // workers of worker q % workers.

    Times become relative to t=0, -1 where the event never happened.
    """
    columns = sorted(columns, key=lambda one: one.header[HeaderSlot.WORKER])
    workers = len(columns)
    rows = max(one.rows for one in columns)
    step = max(1, _ROWS_A_GROUP // workers)
    for start in range(0, rows, step):
        parts = [{name: one.array(name)[start : start + step] for name in COLUMNS} for one in columns]
        group: dict[str, npt.NDArray[Any]] = {}
        size = sum(len(part["outcome"]) for part in parts)
        for name in COLUMNS:
            group[name] = np.empty(size, dtype=parts[0][name].dtype)
            for worker, part in enumerate(parts):
                values = part[name]
                if name in _TIMES:
                    start_ns = columns[worker].header[HeaderSlot.START_NS]
                    never = values == 0 if name != "scheduled_ns" else None
                    values = values - start_ns
                    if never is not None:
                        values[never] = -1
                group[name][worker::workers] = values
        outcome = group["outcome"]
        outcome[(outcome == Outcome.NOT_ISSUED) & (group["issued_ns"] >= 0)] = Outcome.OUTSTANDING
        group["worker"] = np.resize(np.arange(workers, dtype=np.uint16), size)
        yield group


def _collect(groups: Iterator[dict[str, npt.NDArray[Any]]]) -> dict[str, list[npt.NDArray[Any]]]:
    collected: dict[str, list[npt.NDArray[Any]]] = {}
    for group in groups:
        for name, values in group.items():
            collected.setdefault(name, []).append(values)
    return collected


def _arrow_table(group: dict[str, npt.NDArray[Any]]) -> pa.Table:
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


def _write_queries(columns: list[Columns], path: Path) -> None:
    writer: pq.ParquetWriter | None = None
    with replacing(path, binary=True) as file:
        try:
            for group in _row_groups(columns):
                table = _arrow_table(group)
                if writer is None:
                    writer = pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
            if writer is not None:
                writer.close()
        except OSError:
            if writer is not None:
                writer.is_open = False  # or its finalizer fails once more, with a traceback that nobody can catch
            raise


def _read_queries(path: Path) -> dict[str, npt.NDArray[Any]]:
    if not path.exists():
        raise FileNotFoundError(path)
    codes = {outcome.kind: int(outcome) for outcome in Outcome}
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        file = pq.ParquetFile(path)
        for name in (*COLUMNS, "worker"):
            column = file.read(columns=[name]).column(name)
            if name == "outcome":
                parts = []
                for chunk in column.chunks:
                    lookup = np.array([codes[kind] for kind in chunk.dictionary.to_pylist()] or [0], dtype=np.uint8)
                    parts.append(lookup[chunk.indices.to_numpy()])
                arrays[name] = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
            elif name in _TIMES:
                arrays[name] = column.fill_null(-1).to_numpy()
            else:
                arrays[name] = column.to_numpy()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ProfileError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return arrays
