"""The run directory: what a run leaves behind, and all that judging needs.

While a run goes on it holds the profile, the environment, first facts (state ``running``) and
the workers' mapped columns. `RunDirectory.finish` turns the columns into one Parquet file, a
row a planned query, and only then removes them; so a run that was killed can be read as far
as it came, and one whose disk is full is judged from its columns. Files appear whole: written
beside, then renamed. The directory is locked while its run is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
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
#: Of use to a run that goes on only; they make room for what it leaves.
_PASSING = ("warmup-*.bin", "replies-*.npz")
_ROWS_A_GROUP = 1 << 18


class RunDirectory:
    """A run directory that is being written, by the one process that holds its lock."""

    def __init__(self, path: Path, lock: int, *, made: bool) -> None:
        self.path = path
        self._lock = lock
        self._made = made  #: rather than found empty

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make the directory, or take an empty one, or one with nothing but the log that `discard` left.

        `ProfileError` when it holds anything else, or cannot be made: nothing but that log is overwritten.
        """
        with contextlib.ExitStack() as stack:
            try:
                made = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
                lock = os.open(path, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before the look: another run may just have made it
                logs = _logs_alone(path)
                if logs is None:
                    raise ProfileError(f"{path}: is not empty; choose another directory, nothing was overwritten")
                for log in logs:
                    log.unlink()
                (path / SERVER).mkdir(exist_ok=True)
            except BlockingIOError:
                raise ProfileError(f"{path}: another run is going on there; choose another directory") from None
            except OSError as error:
                raise ProfileError(f"{path}: cannot be used for the run directory: {error.strerror}") from None
            stack.pop_all()
        return cls(path, lock, made=made)

    def columns_path(self, worker: int, phase: str = "columns") -> Path:
        """Where a worker's records of a phase are."""
        return self.path / f"{phase}-{worker}.bin"

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write one JSON file, whole or not at all. `RunError` when the disk does not take it."""
        with _writing(self.path / name):
            write_json(self.path / name, document)

    def write_profile(self, settings: dict[str, Any]) -> None:
        """Write the effective profile. `RunError` when the disk does not take it."""
        with _writing(self.path / PROFILE), replacing(self.path / PROFILE) as file:
            yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)

    def finish(self, facts: dict[str, Any]) -> None:
        """Close the books: the final facts, then columns to Parquet, and only then the columns may go.

        `RunError` when the disk does not take it. What was measured is then still in the columns, and if the
        facts at least fit, the run is judged from them as it would be from the Parquet file: so they come first.
        """
        for pattern in _PASSING:
            for file in self.path.glob(pattern):
                file.unlink()
        self.write_json(FACTS, facts)
        files = sorted(self.path.glob("columns-*.bin"))
        if files:
            with _writing(self.path / QUERIES, remedy=f"; judge what is in the columns with: servebench report {self.path}"):
                write_queries([Columns.open(file) for file in files], self.path / QUERIES, rows_a_group=_ROWS_A_GROUP)
        for file in files:
            file.unlink()

    def discard(self) -> None:
        """Nothing was measured: remove the directory, or empty one that was there. A server's logs stay, they may say why."""
        for file in self.path.iterdir():
            if file.is_file():
                file.unlink()
        for file in (self.path / SERVER).iterdir():
            if file.is_file() and (file.suffix != ".log" or not file.stat().st_size):
                file.unlink()
        if not any((self.path / SERVER).iterdir()):
            shutil.rmtree(self.path if self._made else self.path / SERVER, ignore_errors=True)

    def unlock(self) -> None:
        """Let others finish what this process did not."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@contextlib.contextmanager
def _writing(path: Path, *, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}{remedy}") from None


def _logs_alone(path: Path) -> list[Path] | None:
    """The server's logs in a directory that holds nothing else; None when it does."""
    found = list(path.iterdir())
    if not found:
        return []
    if found != [path / SERVER] or not found[0].is_dir():
        return None
    logs = list(found[0].iterdir())
    return logs if all(log.suffix == ".log" and log.is_file() for log in logs) else None


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
