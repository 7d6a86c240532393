"""Runs of millions of queries: judged in pieces with the same result, in little memory; records leave memory as they age."""

import asyncio
import hashlib
import json
import mmap
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthetic
from scipy import stats
from synthetic import MS, S, synthetic_run, with_delay, with_facts, with_outcome

from servebench.engine.worker import RELEASED_ROWS, Trail
from servebench.judge import arrivals, judge
from servebench.record import rundata, rundir
from servebench.record.columns import COLUMNS, HEADER_BYTES, Columns, HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.recorder import Recorder
from servebench.record.rundata import RunData
from servebench.record.rundir import FACTS, QUERIES, RunDirectory, open_run, read_run
from servebench.report.rewrite import HGRM, HLOG, rewrite_reports

START_NS = 5_000 * S
TIMES = ("scheduled_ns", "issued_ns", "first_byte_ns", "completed_ns")
CONSTRAINTS = ("p99 <= 50ms", "service.p99.9 <= 40ms", "delay.p99 <= 1ms", "within(4500us) >= 10%", "mean <= 20ms")


def record(path: Path, run: RunData) -> RunDirectory:
    """The directory of a run as its workers leave it, before the books are closed."""
    workers = len(run.workers)
    directory = RunDirectory.create(path)
    for worker in range(workers):
        share = slice(worker, None, workers)
        rows = len(run.outcome[share])
        columns = Columns.create(directory.columns_path(worker), rows=rows, worker=worker, workers=workers)
        columns.header[HeaderSlot.START_NS] = START_NS
        for name in COLUMNS:
            values = getattr(run, name)[share]
            columns.array(name)[:] = np.where(values < 0, 0, values + START_NS) if name in TIMES else values
    directory.write_json(FACTS, run.facts)
    return directory


def mixed(run: RunData) -> RunData:
    """Some queries of every ending, and some that were late."""
    random = np.random.default_rng(3)
    for outcome in Outcome:
        if outcome not in (Outcome.OK, Outcome.OUTSTANDING, Outcome.NOT_ISSUED):
            run = with_outcome(run, random.integers(0, run.planned, 9).tolist(), outcome)
    late = np.flatnonzero((run.outcome == Outcome.OK) & (random.random(run.planned) < 0.03))
    return with_delay(run, late.tolist(), random.integers(MS, 70 * MS, len(late)))


def killed(run: RunData) -> RunData:
    """What is there after the process was killed half-way."""
    return synthetic.killed(run, int(run.scheduled_ns[run.planned // 2]))


def interrupted(run: RunData) -> RunData:
    """An interrupt half-way, after queries of every ending; some are shed from before."""
    return synthetic.interrupted(mixed(run), int(run.scheduled_ns[run.planned // 2]))


def slow(run: RunData) -> RunData:
    """Some replies after more than 4.29 s, where 32 bits of nanoseconds end."""
    completed_ns = run.completed_ns.copy()
    completed_ns[run.planned // 3 : run.planned // 2] += 5 * S
    return replace(run, completed_ns=completed_ns, first_byte_ns=completed_ns)


def disordered(run: RunData) -> RunData:
    """A damaged run, whose due times are not in order."""
    scheduled_ns = run.scheduled_ns.copy()
    scheduled_ns[[10, -10]] = scheduled_ns[[-10, 10]]
    return replace(run, scheduled_ns=scheduled_ns)


def half_shed(run: RunData) -> RunData:
    """Half of the plan was due and never sent."""
    return with_outcome(run, slice(run.planned // 2, None), Outcome.SHED)


@pytest.mark.parametrize("finished", [True, False], ids=["parquet", "columns"])
@pytest.mark.parametrize(
    ("change", "workers"),
    [
        pytest.param(lambda run: run, 1, id="clean"),
        pytest.param(mixed, 3, id="every ending, three workers"),
        pytest.param(killed, 2, id="killed"),
        pytest.param(half_shed, 2, id="half of it shed"),
        pytest.param(interrupted, 3, id="interrupted"),
        pytest.param(slow, 1, id="beyond 32 bits of ns"),
        pytest.param(disordered, 2, id="due times out of order"),
    ],
)
def test_a_run_read_in_pieces_is_judged_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, workers: int, finished: bool
) -> None:
    assert callable(change)
    run = change(synthetic_run(queries=5_001, workers=workers, constraints=CONSTRAINTS))
    directories = []
    for number, rows in enumerate((1 << 20, 997)):
        monkeypatch.setattr(rundir, "_ROWS_A_GROUP", rows)
        monkeypatch.setattr(rundata, "CHUNK_ROWS", rows)
        monkeypatch.setattr(arrivals, "_CHUNK", rows)
        directory = record(tmp_path / str(number), run)
        if finished:
            directory.finish(run.facts)
        assert len(list(open_run(directory.path).chunks("outcome"))) == (1 if number == 0 else 6)
        rewrite_reports(directory.path)
        directories.append(directory.path)
        assert json.loads(json.dumps(judge(read_run(directory.path)))) == json.loads((directory.path / "run.json").read_text())
    whole, pieces = directories
    for name in ("run.json", HLOG, HGRM):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes(), name
    stop_ns = int(run.scheduled_ns.max())
    if run.facts["state"] != "complete":
        stamps = (run.issued_ns, run.completed_ns)
        stop_ns = run.facts["workers"][0]["stats"]["stopped_ns"] if change is interrupted else max(map(np.max, stamps))
    failed = int(((run.outcome != Outcome.OK) & ((run.scheduled_ns <= stop_ns) | (run.issued_ns >= 0))).sum())
    document = json.loads((whole / "run.json").read_text())
    assert document["response_time"]["infinite"] == failed == sum(error["count"] for error in document["errors"])
    for name in (HLOG, HGRM):
        assert f"over every bound: {failed}]" in (whole / name).read_text()


def test_judging_takes_memory_for_latencies_and_one_more_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million queries are judged within 400 MB: 32 bytes each, and what does not grow with the run."""
    queries, chunk = 400_000, 1 << 13
    run = synthetic_run(queries=queries, target_qps=10_000, constraints=CONSTRAINTS)
    directory = record(tmp_path / "run", run)
    monkeypatch.setattr(rundir, "_ROWS_A_GROUP", chunk)
    monkeypatch.setattr(arrivals, "_CHUNK", chunk)
    directory.finish(run.facts)
    del run
    judge(open_run(directory.path))  # imports are not counted
    tracemalloc.start()
    try:
        rewrite_reports(directory.path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * queries + 8_000_000


@pytest.mark.parametrize("ahead", [True, False], ids=["issued too early", "issued too late"])
def test_the_distance_of_issue_times_in_pieces_is_scipys(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    random = np.random.default_rng(8)
    even, bunched = np.sort(random.integers(0, S, 2_000)), np.sort((random.random(2_000) ** 2 * S).astype(np.int64))
    planned_ns, issued_ns = (even, bunched) if ahead else (bunched, even)
    scaled = [(times - times[0]) / (times[-1] - times[0]) for times in (planned_ns, issued_ns)]
    theirs = stats.ks_2samp(*scaled)
    monkeypatch.setattr(arrivals, "_CHUNK", 173)
    assert arrivals.shape_distance(planned_ns, issued_ns) == pytest.approx(theirs.statistic, abs=1e-12)


def test_the_schedule_is_hashed_in_pieces_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = synthetic_run(queries=3_000)
    monkeypatch.setattr(rundata, "CHUNK_ROWS", 700)
    assert judge(run)["trust"]["verdict"] == "VALID"
    wrong = hashlib.sha256(b"another").hexdigest()
    (reason,) = judge(with_facts(run, {"schedule.sha256": wrong}))["trust"]["reasons"]
    assert reason["code"] == "schedule_hash"


# --- what is in memory of records -----------------------------------------------------------


def mapped_bytes(path: Path) -> int:
    """How much of a file this process's mappings of it hold in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def filled(path: Path, rows: int) -> Columns:
    columns = Columns.create(path, rows=rows, worker=0, workers=1)
    for number, name in enumerate(COLUMNS):
        columns.array(name)[:] = np.arange(rows) % (200 + number)
    return columns


def test_released_rows_leave_memory_and_stay_in_the_file(tmp_path: Path) -> None:
    rows = 100_000
    columns = filled(tmp_path / "columns-0.bin", rows)
    before = mapped_bytes(columns.path)
    assert before >= rows * 47
    columns.release(0, rows // 2)
    assert mapped_bytes(columns.path) <= before / 2 + 32 * mmap.PAGESIZE
    columns.release(rows // 2, rows + 5)  # more than there are: a caller's stride does not know where rows end
    assert mapped_bytes(columns.path) <= HEADER_BYTES + 32 * mmap.PAGESIZE
    for number, name in enumerate(COLUMNS):
        assert columns.array(name).tolist() == (np.arange(rows) % (200 + number)).tolist(), name
    columns.array("issued_ns")[7] = 123
    columns.release(0, rows)
    assert Columns.open(columns.path).array("issued_ns")[7] == 123


def test_a_worker_gives_back_what_has_ended_and_nothing_after(tmp_path: Path) -> None:
    rows = 4 * RELEASED_ROWS
    columns = filled(tmp_path / "columns-0.bin", rows)
    columns.array("outcome")[:] = Outcome.OK
    issuer = SimpleNamespace(cursor=RELEASED_ROWS - 1)

    async def scene() -> list[int]:
        trail = Trail(Recorder(columns), issuer)  # type: ignore[arg-type]
        seen = []
        for cursor, outstanding in ((RELEASED_ROWS - 1, None), (3 * RELEASED_ROWS, 2 * RELEASED_ROWS), (rows, None)):
            issuer.cursor = cursor
            columns.array("outcome")[:] = Outcome.OK
            if outstanding is not None:
                columns.array("outcome")[outstanding] = Outcome.NOT_ISSUED
            trail.release()
            seen.append(mapped_bytes(columns.path))
        trail.stop()
        return seen

    full, slack = mapped_bytes(columns.path), 40 * mmap.PAGESIZE + rows
    too_few, half, rest = asyncio.run(scene())
    assert too_few == full, "not worth it yet"
    assert full / 2 - slack <= half <= full / 2 + slack, "up to the query that is still out"
    assert rest <= slack


def test_an_unfinished_run_does_not_stay_in_memory_when_it_was_read(tmp_path: Path) -> None:
    run = synthetic_run(queries=50_000, target_qps=10_000)
    directory = record(tmp_path / "run", run)
    opened = open_run(directory.path)
    assert sum(int(np.count_nonzero(outcome == Outcome.OK)) for (outcome,) in opened.chunks("outcome")) == 50_000
    assert mapped_bytes(directory.columns_path(0)) <= 64 * mmap.PAGESIZE
    assert not (directory.path / QUERIES).exists()
