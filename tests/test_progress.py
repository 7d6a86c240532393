"""What a look at the columns says, while they change by hand between the looks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servebench.record import progress
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.progress import ProgressReader, Snapshot

S = 1_000_000_000
START_NS = 5_000 * S


class Scene:
    """Columns of some workers, and the time of the next look."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
        self.now_ns = START_NS - S
        monkeypatch.setattr(progress, "now_ns", lambda: self.now_ns)
        self.columns = [
            Columns.create(tmp_path / f"columns-{worker}.bin", rows=count, worker=worker, workers=len(rows))
            for worker, count in enumerate(rows)
        ]
        self.reader = ProgressReader(self.columns)

    def begin(self) -> None:
        for columns in self.columns:
            columns.header[HeaderSlot.START_NS] = START_NS
            columns.array("scheduled_ns")[:] = START_NS + np.arange(columns.rows) * S // 100

    def issue(self, worker: int, cursor: int, delay_ns: int = 1_000) -> None:
        """All rows up to ``cursor`` have been handed over, those that were not yet with this delay."""
        columns = self.columns[worker]
        fresh = slice(columns.header[HeaderSlot.CURSOR], cursor)
        columns.array("issued_ns")[fresh] = columns.array("scheduled_ns")[fresh] + delay_ns
        columns.header[HeaderSlot.CURSOR] = cursor

    def end(self, worker: int, row: int, outcome: Outcome = Outcome.OK, response_ns: int = 0) -> None:
        columns = self.columns[worker]
        columns.array("completed_ns")[row] = columns.array("scheduled_ns")[row] + response_ns
        columns.array("outcome")[row] = outcome
        columns.header[HeaderSlot.ENDED] += 1
        columns.header[HeaderSlot.OK] += outcome is Outcome.OK

    def look(self, after_s: float) -> Snapshot:
        self.now_ns = START_NS + round(after_s * S)
        return self.reader.look()


def close_to(value_ns: int) -> Any:
    return pytest.approx(value_ns, rel=1e-3, abs=1_024)  # what an HDR histogram keeps


def test_before_the_phase_starts_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, [100, 50])
    nothing = Snapshot(0.0, 150, 0, 0, 0, 0, 0.0, 0.0, None, None, None)
    assert scene.look(-1) == nothing
    scene.begin()
    assert scene.look(-0.5) == nothing, "t=0 is known, and to come"


def test_counts_and_rates_are_of_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, [100, 100])
    scene.begin()
    scene.issue(0, 30)
    scene.issue(1, 20)
    for row in range(10):
        scene.end(0, row, response_ns=5_000_000)
    scene.end(1, 0, Outcome.RESET)
    seen = scene.look(2)
    assert (seen.elapsed_s, seen.planned, seen.issued, seen.ok, seen.failed, seen.in_flight) == (2.0, 200, 50, 10, 1, 39)
    assert (seen.offered_qps, seen.completed_qps) == (25.0, 5.0), "since t=0"

    scene.issue(1, 40)
    for row in range(10, 30):
        scene.end(0, row, response_ns=5_000_000)
    seen = scene.look(2.5)
    assert (seen.issued, seen.ok, seen.failed, seen.in_flight) == (70, 30, 1, 39)
    assert (seen.offered_qps, seen.completed_qps) == (40.0, 40.0), "since the look before"

    seen = scene.look(3)
    assert (seen.offered_qps, seen.completed_qps, seen.elapsed_s) == (0.0, 0.0, 3.0)


def test_shed_queries_have_failed_and_are_not_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, [10])
    scene.begin()
    scene.columns[0].array("outcome")[:] = Outcome.SHED
    scene.columns[0].header[HeaderSlot.ENDED] = 10
    assert scene.look(1).in_flight == 0, "ended is stored before the cursor moves"
    scene.columns[0].header[HeaderSlot.CURSOR] = 10
    seen = scene.look(2)
    assert (seen.issued, seen.failed, seen.in_flight, seen.p50_ns, seen.delay_p99_ns) == (10, 10, 0, None, None)


def test_percentiles_are_of_response_times_and_delays_of_ok_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, [100, 100])
    scene.begin()
    scene.issue(0, 100, delay_ns=20_000)
    scene.issue(1, 2, delay_ns=7_000_000)
    for row in range(100):
        scene.end(0, row, response_ns=(row + 1) * 1_000_000)
    scene.end(1, 0, Outcome.TIMEOUT, response_ns=10 * S)
    seen = scene.look(3)
    assert (seen.p50_ns, seen.p99_ns, seen.delay_p99_ns) == (close_to(50_000_000), close_to(99_000_000), close_to(20_000))
    scene.end(1, 1, response_ns=200_000_000)
    seen = scene.look(4)
    assert (seen.p50_ns, seen.p99_ns) == (close_to(51_000_000), close_to(100_000_000))


def test_each_query_counts_once_whenever_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty looks at two workers whose queries end in random order, against all that is known by then, sorted."""
    random = np.random.default_rng(7)
    rows = [400, 377]
    scene = Scene(tmp_path, monkeypatch, rows)
    scene.begin()
    out: list[tuple[int, int]] = []
    responses: list[int] = []
    failed = 0
    for turn in range(60):
        for worker, count in enumerate(rows):
            before = scene.columns[worker].header[HeaderSlot.CURSOR]
            after = min(count, before + int(random.integers(0, 20)))
            scene.issue(worker, after)
            out.extend((worker, row) for row in range(before, after))
        random.shuffle(out)
        for _ in range(random.integers(0, len(out) + 1) if turn < 59 else len(out)):
            worker, row = out.pop()
            if random.random() < 0.1:
                scene.end(worker, row, Outcome.STATUS, response_ns=1)
                failed += 1
            else:
                responses.append(int(random.exponential(30_000_000)) + 1_000_000)
                scene.end(worker, row, response_ns=responses[-1])
        seen = scene.look(1 + turn / 10)
        assert (seen.ok, seen.failed, seen.in_flight) == (len(responses), failed, len(out))
        if responses:
            ranked = sorted(responses)
            assert seen.p50_ns == close_to(ranked[math.ceil(0.5 * len(ranked)) - 1])
            assert seen.p99_ns == close_to(ranked[math.ceil(0.99 * len(ranked)) - 1])
    assert len(responses) + failed == sum(scene.columns[worker].header[HeaderSlot.CURSOR] for worker in range(2)) > 600
