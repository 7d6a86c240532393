"""The run directory: what a run leaves behind, and all that judging needs.

While a run goes on it holds the profile, the environment, first facts (state ``running``) and
the workers' mapped columns. `RunDirectory.finish` turns the columns into one Parquet file, a
row a planned query, and only then removes them; so a run that was killed, or whose disk
filled up, can be read as far as it came. Files appear whole: written beside, then renamed.
The directory is locked while its run is alive.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import yaml

from servebench.errors import ProfileError, RunError
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.files import replacing, write_json
from servebench.record.queries import QUERY_COLUMNS, MappedQueries, ParquetQueries, StoredRun, write_queries
from servebench.record.rundata import Run, RunData

FACTS = "facts.json"
ENVIRONMENT = "environment.json"
PROFILE = "profile.yaml"
QUERIES = "queries.parquet"
RUN = "run.json"
SERVER = "server"
_ROWS_A_GROUP = 1 << 18


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
                write_queries([Columns.open(file) for file in files], self.path / QUERIES, rows_a_group=_ROWS_A_GROUP)
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


def open_run(path: Path) -> Run:
    """Open a run directory, finished or not, without reading its rows. `ProfileError`, then too, names what is broken."""
    facts = _read_json(path / FACTS)
    if facts.get("schema") != "servebench.facts/1":
        raise ProfileError(f"{path / FACTS}: schema is {facts.get('schema')!r}, expected 'servebench.facts/1'")
    environment = _read_json(path / ENVIRONMENT, optional=True)
    files = sorted(path.glob("columns-*.bin"))
    if (path / QUERIES).exists():
        return StoredRun(facts, environment, ParquetQueries(path / QUERIES))
    if not files:
        raise ProfileError(f"{path}: holds no records: neither {QUERIES} nor columns-*.bin")
    try:
        columns = [Columns.open(file) for file in files]
    except (OSError, ValueError) as error:
        raise ProfileError(f"{error}") from None
    _check_complete(path, columns)
    return StoredRun(facts, environment, MappedQueries(columns, at_once=_ROWS_A_GROUP))


def read_run(path: Path) -> RunData:
    """Read a whole run directory, finished or not, into memory. `ProfileError` names what is missing or broken."""
    run = open_run(path)
    return RunData(run.facts, run.environment, **{name: run.column(name) for name in QUERY_COLUMNS})


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
