"""The watcher that excuses measurements on a shared machine excuses nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from e2e import CLIENT_CPUS, without_pauses
from synthetic import MS, S, synthetic_run, with_delay, with_stall
from witness import Witness

from servebench.clock import now_ns
from servebench.judge import judge
from servebench.record.rundata import RunData


def having_seen(*pauses_ns: tuple[int, int]) -> Witness:
    witness = Witness([])
    witness.pauses_ns = np.array(sorted(pauses_ns), dtype=np.int64).reshape(-1, 2)
    return witness


def trust_of(data: RunData) -> str:
    return str(judge(data)["trust"]["verdict"])


def test_spans_that_a_pause_overlaps() -> None:
    witness = having_seen((100, 200), (150, 160), (400, 500))
    spans = np.array([[0, 100], [0, 101], [199, 300], [200, 300], [120, 130], [300, 450], [0, 900], [500, 600]])
    assert witness.touched(spans[:, 0], spans[:, 1]).tolist() == [False, True, True, False, True, True, True, False]
    assert not having_seen().touched(spans[:, 0], spans[:, 1]).any()


def test_what_was_late_in_a_pause_is_excused_and_nothing_else() -> None:
    run = synthetic_run(queries=4_000)
    start_ns = run.facts["start_ns"]
    rows = slice(1_000, 1_200)
    late = with_delay(run, rows, 60 * MS)
    assert trust_of(late) == trust_of(without_pauses(late, having_seen())) == "INVALID"
    due_ns = start_ns + late.scheduled_ns[rows]
    around = (int(due_ns[0]) - MS, int(due_ns[-1]) + 60 * MS)
    assert trust_of(without_pauses(late, having_seen(around))) == "VALID"
    half = (around[0], int(due_ns[100]) - 61 * MS)
    assert trust_of(without_pauses(late, having_seen(half))) == "INVALID"


def test_a_stall_is_excused_by_a_pause_at_its_time() -> None:
    run = with_stall(synthetic_run(), 3 * S, 80 * MS)
    (stall,) = run.facts["workers"][0]["stats"]["stalls"]
    begin_ns = run.facts["start_ns"] + stall["at_ns"]
    assert trust_of(run) == trust_of(without_pauses(run, having_seen((begin_ns + S, begin_ns + 2 * S)))) == "INVALID"
    assert trust_of(without_pauses(run, having_seen((begin_ns, begin_ns + 80 * MS)))) == "VALID"


def test_a_process_that_hogs_the_cpu_is_no_pause_of_the_machine() -> None:
    hog = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {CLIENT_CPUS})\nwhile True: pass"])
    try:
        with Witness(CLIENT_CPUS) as witness:
            if not witness.sees:
                pytest.skip("no permission for a real-time priority")
            time.sleep(1)
    finally:
        hog.kill()
        hog.wait()
    assert witness.paused_share() < 0.3  # the hog would have had at least half


def test_a_cpu_that_stands_still_is_seen() -> None:
    """A process of a higher real-time priority stands for the hypervisor."""
    thief = (
        f"import os, time\nos.sched_setaffinity(0, {CLIENT_CPUS})\n"
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))\n"
        "begin = time.monotonic_ns()\nwhile time.monotonic_ns() < begin + 50_000_000: pass\nprint(begin)"
    )
    with Witness(CLIENT_CPUS) as witness:
        if not witness.sees:
            pytest.skip("no permission for a real-time priority")
        begin_ns = int(subprocess.run([sys.executable, "-c", thief], capture_output=True, check=True).stdout)
    span = np.array([begin_ns + 5 * MS])
    assert witness.touched(span, span + 40 * MS).all()
    assert np.diff(witness.pauses_ns).max() >= 45 * MS


def test_without_permission_it_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("witness._WATCHER", "print('blind', flush=True)")
    with Witness(CLIENT_CPUS) as witness:
        assert not witness.sees
    assert len(witness.pauses_ns) == 0
    assert witness.paused_share() == 0


def test_a_watcher_does_not_outlive_the_tests() -> None:
    code = "from witness import Witness\nimport time\n"
    code += f"w = Witness({CLIENT_CPUS}).__enter__()\nprint(w._watchers[0].pid, flush=True)\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert parent.stdout is not None
    watcher = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline_ns = now_ns() + 10_000_000_000
    while now_ns() < deadline_ns:
        try:
            os.kill(watcher, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the watcher is still there")
