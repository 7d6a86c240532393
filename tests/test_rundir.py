"""The run directory: columns become Parquet and say the same, whatever happens on the way; locks and whole files."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from servebench.errors import ProfileError, RunError
from servebench.record import rundir
from servebench.record.columns import COLUMNS, Columns, HeaderSlot
from servebench.record.files import replacing, write_json
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData
from servebench.record.rundir import FACTS, QUERIES, RunDirectory, is_running, read_run

FACTS_RUNNING = {"schema": "servebench.facts/1", "state": "running"}
FACTS_COMPLETE = {"schema": "servebench.facts/1", "state": "complete"}
START_NS = 5_000_000_000_000
TIMES = ("scheduled_ns", "issued_ns", "first_byte_ns", "completed_ns")

Table = dict[str, npt.NDArray[Any]]


def truth(queries: int, workers: int) -> Table:
    """What a run's queries did, in query order, times relative to t=0 and -1 where the event never happened."""
    random = np.random.default_rng(queries)
    scheduled_ns = np.cumsum(random.integers(0, 2_000_000, queries))
    scheduled_ns[0] = 0
    outcome = random.choice([int(outcome) for outcome in Outcome], queries).astype(np.uint8)
    outcome[: len(Outcome)] = list(Outcome)[:queries]
    never_issued = np.isin(outcome, (Outcome.NOT_ISSUED, Outcome.SHED))
    issued_ns = np.where(never_issued, -1, scheduled_ns + random.integers(0, 90_000, queries))
    completed_ns = np.where(never_issued | (outcome == Outcome.OUTSTANDING), -1, issued_ns + random.integers(1, 9**9, queries))
    replied = np.isin(outcome, (Outcome.OK, Outcome.STATUS, Outcome.OUTPUT))
    return {
        "scheduled_ns": scheduled_ns,
        "issued_ns": issued_ns,
        "first_byte_ns": np.where(replied, completed_ns - 1, -1),
        "completed_ns": completed_ns,
        "outcome": outcome,
        "sample": random.integers(0, 64, queries, dtype=np.int32),
        "status": np.where(replied, 200, 0).astype(np.uint16),
        "response_bytes": random.integers(0, 2**32, queries, dtype=np.uint32),
        "worker": (np.arange(queries) % workers).astype(np.uint16),
        "connection": random.integers(0, 2**32, queries, dtype=np.uint32),
    }


def record(path: Path, table: Table, workers: int) -> RunDirectory:
    """The directory of a run that has recorded ``table`` and has not closed its books."""
    directory = RunDirectory.create(path)
    for worker in range(workers):
        share = slice(worker, None, workers)
        rows = len(table["outcome"][share])
        columns = Columns.create(directory.columns_path(worker), rows=rows, worker=worker, workers=workers)
        columns.header[HeaderSlot.START_NS] = START_NS
        for name in COLUMNS:
            values = table[name][share]
            if name in TIMES:
                values = np.where(values < 0, 0, values + START_NS)
            elif name == "outcome":  # workers know no such outcome: it is an issued query without an end
                values = np.where(values == Outcome.OUTSTANDING, Outcome.NOT_ISSUED, values)
            columns.array(name)[:] = values
    directory.write_json(FACTS, FACTS_RUNNING)
    return directory


def assert_holds(data: RunData, table: Table) -> None:
    for field in fields(RunData)[2:]:
        found = getattr(data, field.name)
        assert found.tolist() == table[field.name].tolist(), field.name
        assert found.dtype == table[field.name].dtype, field.name


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("rows_a_group", [pytest.param(1 << 20, id="one group"), pytest.param(7, id="groups of 7")])
@pytest.mark.parametrize(
    ("queries", "workers"),
    [
        pytest.param(1, 1, id="one query"),
        pytest.param(100, 1, id="1 worker"),
        pytest.param(101, 2, id="2 workers, uneven"),
        pytest.param(101, 3, id="3 workers, uneven"),
        pytest.param(100, 11, id="11 workers, whose names sort differently"),
        pytest.param(2, 3, id="fewer queries than workers"),
    ],
)
def test_columns_and_parquet_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queries: int, workers: int, rows_a_group: int
) -> None:
    monkeypatch.setattr(rundir, "_ROWS_A_GROUP", rows_a_group)
    table = truth(queries, workers)
    directory = record(tmp_path / "run", table, workers)
    unfinished = read_run(directory.path)
    assert unfinished.facts == FACTS_RUNNING
    assert_holds(unfinished, table)

    directory.finish(FACTS_COMPLETE)
    assert names(directory.path) == {FACTS, QUERIES, "server"}
    finished = read_run(directory.path)
    assert finished.facts == FACTS_COMPLETE
    assert_holds(finished, table)
    rows_a_worker = -(-queries // workers)
    groups = -(-rows_a_worker // max(1, rows_a_group // workers))
    assert pq.ParquetFile(directory.path / QUERIES).num_row_groups == groups


def test_others_can_read_the_parquet_file(tmp_path: Path) -> None:
    """What pyarrow alone makes of it: words for outcomes, nulls for what never happened."""
    table = truth(300, 2)
    directory = record(tmp_path / "run", table, 2)
    directory.finish(FACTS_COMPLETE)
    found = pq.read_table(directory.path / QUERIES).to_pydict()
    words = ["not_issued", "outstanding", "ok", "timeout", "connect", "stale", "reset", "protocol", "status", "output"]
    words += ["shed", "unfinished", "client"]
    assert found["outcome"] == [words[code] for code in table["outcome"]]
    for name in TIMES:
        assert found[name] == [None if value < 0 else value for value in table[name].tolist()], name
    assert found["worker"] == [0, 1] * 150
    assert list(found) == [*COLUMNS, "worker"]


def test_issued_without_an_end_is_outstanding_and_waiting_is_not(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    columns = Columns.create(directory.columns_path(0), rows=3, worker=0, workers=1)
    columns.header[HeaderSlot.START_NS] = START_NS
    columns.array("scheduled_ns")[:] = START_NS
    columns.array("issued_ns")[0] = START_NS  # the very first nanosecond is not "never"
    directory.write_json(FACTS, FACTS_RUNNING)
    for _ in range(2):
        data = read_run(directory.path)
        assert data.outcome.tolist() == [Outcome.OUTSTANDING, Outcome.NOT_ISSUED, Outcome.NOT_ISSUED]
        assert data.issued_ns.tolist() == [0, -1, -1]
        directory.finish(FACTS_COMPLETE)
    assert columns.array("outcome").tolist() == [0, 0, 0], "reading changes nothing"


def test_a_run_that_never_measured_has_its_plan(tmp_path: Path) -> None:
    """Killed during the warm-up: due times are still relative, t=0 is not known."""
    directory = RunDirectory.create(tmp_path / "run")
    for worker in range(2):
        columns = Columns.create(directory.columns_path(worker), rows=2, worker=worker, workers=2)
        columns.array("scheduled_ns")[:] = [worker * 10, 100 + worker * 10]
    directory.write_json(FACTS, FACTS_RUNNING)
    data = read_run(directory.path)
    assert data.scheduled_ns.tolist() == [0, 10, 100, 110]
    assert data.issued_ns.tolist() == [-1] * 4
    assert set(data.outcome.tolist()) == {Outcome.NOT_ISSUED}


# --- trouble ------------------------------------------------------------------------------


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("method", ["__init__", "write_table", "close"])
def test_a_full_disk_while_writing_parquet_loses_nothing(tmp_path: Path, method: str) -> None:
    table = truth(101, 2)
    directory = record(tmp_path / "run", table, 2)
    before = names(directory.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetWriter, method, no_space)
        with pytest.raises(RunError, match="No space left on device; judge what is in the columns") as caught:
            directory.finish(FACTS_COMPLETE)
        patch.undo()
    assert str(caught.value).startswith(f"{directory.path / QUERIES}: cannot be written: ")
    assert names(directory.path) == before
    data = read_run(directory.path)
    assert data.facts == FACTS_COMPLETE, "it has been measured to its end"
    assert_holds(data, table)
    directory.finish(FACTS_COMPLETE)  # once there is room again
    assert_holds(read_run(directory.path), table)


def test_a_full_disk_while_writing_the_final_facts_loses_nothing(tmp_path: Path) -> None:
    table = truth(101, 2)
    directory = record(tmp_path / "run", table, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dump", no_space)
        with pytest.raises(RunError, match=r"/run/facts\.json: cannot be written: No space left on device$"):
            directory.finish(FACTS_COMPLETE)
    assert {"columns-0.bin", "columns-1.bin"} < names(directory.path)
    data = read_run(directory.path)
    assert data.facts == FACTS_RUNNING, "it does not look complete"
    assert_holds(data, table)


@pytest.mark.parametrize("write", ["write_json", "write_profile"])
def test_a_full_disk_is_our_own_error_at_any_file(tmp_path: Path, write: str) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    arguments = ("environment.json", {}) if write == "write_json" else ({"name": "x"},)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", no_space)
        with pytest.raises(RunError, match=r"/run/\w+\.(json|yaml): cannot be written: No space left on device$"):
            getattr(directory, write)(*arguments)
    assert names(directory.path) == {"server"}


def test_files_of_use_to_a_run_that_goes_on_make_room_before_anything_is_written(tmp_path: Path) -> None:
    table = truth(10, 2)
    directory = record(tmp_path / "run", table, 2)
    for name in ("warmup-0.bin", "warmup-1.bin", "replies-1.npz"):
        (directory.path / name).write_bytes(bytes(100))
    seen: list[set[str]] = []

    def look(*arguments: Any, **options: Any) -> None:
        seen.append(names(directory.path))
        no_space()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "write_json", look)
        with pytest.raises(RunError):
            directory.finish(FACTS_COMPLETE)
    assert seen == [{FACTS, "columns-0.bin", "columns-1.bin", "server"}]


def test_a_directory_killed_before_its_columns_went_is_read_from_parquet(tmp_path: Path) -> None:
    table = truth(101, 2)
    directory = record(tmp_path / "run", table, 2)
    second = directory.columns_path(1).read_bytes()
    directory.finish(FACTS_COMPLETE)
    directory.columns_path(1).write_bytes(second)
    assert_holds(read_run(directory.path), table)


def spoil_parquet(path: Path, where: slice, by: bytes) -> None:
    data = bytearray((path / QUERIES).read_bytes())
    data[where] = by
    (path / QUERIES).write_bytes(data)


def rename_column(path: Path) -> None:
    table = pq.read_table(path / QUERIES)
    pq.write_table(
        table.rename_columns([name if name != "issued_ns" else "sent" for name in table.column_names]), path / QUERIES
    )


def invent_outcome(path: Path) -> None:
    table = pq.read_table(path / QUERIES)
    words = pa.array(["lost"] * len(table)).dictionary_encode()
    pq.write_table(table.set_column(table.column_names.index("outcome"), "outcome", words), path / QUERIES)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: spoil_parquet(path, slice(None), b""), id="empty"),
        pytest.param(lambda path: spoil_parquet(path, slice(-1, None), b""), id="cut short"),
        pytest.param(lambda path: spoil_parquet(path, slice(10, 200), b"\xff" * 190), id="broken data"),
        pytest.param(lambda path: spoil_parquet(path, slice(-100, -60), b"\xff" * 40), id="broken footer"),
        pytest.param(rename_column, id="a column is missing"),
        pytest.param(invent_outcome, id="an outcome of another time"),
    ],
)
def test_a_broken_parquet_file_is_named(tmp_path: Path, spoil: Any) -> None:
    directory = record(tmp_path / "run", truth(100, 1), 1)
    directory.finish(FACTS_COMPLETE)
    spoil(directory.path)
    with pytest.raises(ProfileError) as caught:
        read_run(directory.path)
    assert str(caught.value).startswith(f"{directory.path / QUERIES}: cannot be read: ")
    assert len(str(caught.value).splitlines()) == 1


def test_columns_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """Without one worker's file, the others' rows would be taken for the whole run."""
    directory = record(tmp_path / "run", truth(100, 3), 3)
    first = directory.columns_path(0).read_bytes()
    directory.columns_path(0).unlink()
    with pytest.raises(ProfileError, match=r"the records of worker 0 are missing"):
        read_run(directory.path)
    directory.columns_path(0).write_bytes(first[:-1])
    with pytest.raises(ProfileError, match=r"columns-0.bin: not a column file, or cut short"):
        read_run(directory.path)
    for worker in range(3):
        directory.columns_path(worker).unlink()
    with pytest.raises(ProfileError, match=r"holds no records: neither queries.parquet nor columns-\*.bin"):
        read_run(directory.path)


# --- locks and whole files ----------------------------------------------------------------


def test_a_directory_is_running_as_long_as_its_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from servebench.record.rundir import RunDirectory\n"
        "directory = RunDirectory.create(Path(sys.argv[1])); print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        assert is_running(path)
        assert is_running(path), "asking takes no lock"
        owner.kill()
        owner.wait(timeout=10)
        assert not is_running(path)


def test_unlocking_ends_it_too(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "deep" / "run")
    assert is_running(directory.path)
    directory.unlock()
    directory.unlock()
    reader = os.open(directory.path, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)  # another one who asks at the same moment
    assert not is_running(directory.path)
    os.close(reader)


def test_a_directory_in_use_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ProfileError, match="is not empty; choose another directory, nothing was overwritten"):
        RunDirectory.create(tmp_path)
    with pytest.raises(ProfileError, match="cannot be used for the run directory: File exists"):
        RunDirectory.create(tmp_path / "precious")
    assert names(tmp_path) == {"precious"}


def test_a_directory_that_another_run_has_just_taken_is_not_taken(tmp_path: Path) -> None:
    """The other one has written nothing yet: it still talks to its server."""
    first = RunDirectory.create(tmp_path / "run")
    with pytest.raises(ProfileError, match="run: another run is going on there"):
        RunDirectory.create(tmp_path / "run")
    first.unlock()
    RunDirectory.create(tmp_path / "run").unlock()


@pytest.mark.parametrize("there", [True, False])
def test_a_discarded_directory_is_as_it_was(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "run"
    if there:
        path.mkdir()
        path.chmod(0o750)
    directory = RunDirectory.create(path)
    directory.write_profile({"name": "x"})
    (path / "server" / "stub.log").touch()
    directory.discard()
    assert path.exists() == there
    assert not there or (names(path), path.stat().st_mode & 0o777) == (set(), 0o750)


def test_a_log_that_was_left_is_replaced_by_the_next_try(tmp_path: Path) -> None:
    path = tmp_path / "run"
    directory = RunDirectory.create(path)
    directory.write_profile({"name": "x"})
    (path / "server" / "stub.log").write_text("no")
    (path / "server" / "config.pbtxt").write_text("x")
    directory.discard()
    directory.unlock()
    assert names(path) == {"server"} and names(path / "server") == {"stub.log"}
    RunDirectory.create(path).unlock()
    assert names(path) == {"server"} and names(path / "server") == set()


@pytest.mark.parametrize("other", ["server/notes.txt", "server/deep/stub.log", "stub.log", "facts.json"])
def test_what_is_more_than_such_a_log_is_not_overwritten(tmp_path: Path, other: str) -> None:
    for name in ("server/stub.log", other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    with pytest.raises(ProfileError, match="is not empty; choose another directory, nothing was overwritten"):
        RunDirectory.create(tmp_path)
    assert [(tmp_path / name).read_text() for name in ("server/stub.log", other)] == ["precious"] * 2


def test_logs_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "access.log").write_text("precious")
    with pytest.raises(ProfileError, match="is not empty"):
        RunDirectory.create(tmp_path)
    assert names(tmp_path) == {"access.log"}


@pytest.mark.parametrize("binary", [False, True])
def test_a_file_is_replaced_when_its_block_ends(tmp_path: Path, binary: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    content = {False: "new\nü", True: "new\nü".encode()}[binary]
    with replacing(path, binary=True) if binary else replacing(path) as file:
        file.write(content)  # type: ignore[arg-type]
        file.flush()
        assert path.read_text() == "old", "the old one stays whole meanwhile"
    assert path.read_bytes() == "new\nü".encode()
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()], ids=repr)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_the_old_file_and_no_stray(tmp_path: Path, error: BaseException, exists: bool) -> None:
    path = tmp_path / "file"
    if exists:
        path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write("half")
        raise error
    assert names(tmp_path) == ({"file"} if exists else set())
    assert not exists or path.read_text() == "old"


def test_a_document_json_has_no_word_for_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"rate": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"rate": float("nan")})
    assert json.loads(path.read_text()) == {"rate": 1.5}
    assert names(tmp_path) == {"run.json"}


def test_the_profile_is_yaml_in_its_own_order(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    settings = {"name": "x", "description": "Größe", "load": {"target_qps": 5.0, "max_duration_s": None}}
    directory.write_profile(settings)
    text = (directory.path / "profile.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == settings
    assert text.startswith("name: x\ndescription: Größe\n")
