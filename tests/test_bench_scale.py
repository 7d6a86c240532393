"""The benchmarks of scale, start and floor: what they look at, how they count it, and what they hold against the targets."""

import contextlib
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are run from the checkout, they are not installed

from synthetic import S, synthetic_run

from benchmarks import floor, scale, start
from benchmarks.nginx import NullServer, PayloadServer, find_nginx, render_config
from benchmarks.process_tree import Look, Watch, disk_bytes, look
from benchmarks.scale import Measured, Point, measure, measured_of, points, settings_of
from servebench.errors import RunError
from servebench.load.scenario import plan_server
from servebench.profile import parse_profile
from servebench.record.columns import COLUMNS, Columns
from servebench.record.rundir import FACTS, RunDirectory
from servebench.report.rewrite import rewrite_reports

MB = 1_000_000
needs_nginx = pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed")

POINT = Point(1_000, 10_000_000)
MET = Measured(
    point=POINT,
    ok=10_000_000,
    issued_qps=1_000.0,
    delay_p99_ns=1,
    connections=1,
    running_bytes=400 * MB,
    running_anonymous_bytes=1,
    judging_bytes=399 * MB,
    judging_anonymous_bytes=1,
    running_disk=64.0,
    judging_disk=90.0,
    kept_disk=20.0,
    verdict_s=20.0,
    trust="VALID",
)

# --- looking at processes -------------------------------------------------------------------

_HOLD = """
import mmap, sys
kind, size = sys.argv[1], int(sys.argv[2])
if kind == "anonymous":
    held = bytearray(b"x") * size
else:
    with open(sys.argv[3], "r+b") as file:
        held = mmap.mmap(file.fileno(), size)
    held.write(b"x" * size)
print("ready", flush=True)
sys.stdin.read()
"""
# A process whose child holds the memory: what is counted is the whole tree.
_HOLD_IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_HOLD!r}, *sys.argv[1:]])"


@contextlib.contextmanager
def holding(*arguments: str) -> Iterator[int]:
    """Process id of a parent whose child holds some memory."""
    argv = [sys.executable, "-c", _HOLD_IN_A_CHILD, *arguments]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def test_memory_of_a_process_tree_tells_files_from_what_is_in_memory_only(tmp_path: Path) -> None:
    file, size = tmp_path / "file", 64 * MB // mmap.PAGESIZE * mmap.PAGESIZE
    file.write_bytes(bytes(size))
    with holding("anonymous", "0") as pid:
        empty = look(pid, tmp_path, 7)
    with holding("anonymous", str(size)) as pid:
        anonymous = look(pid, tmp_path, 7)
    with holding("file", str(size), str(file)) as pid:
        mapped = look(pid, tmp_path, 7)
    assert empty.at_ns == 7
    assert empty.anonymous_bytes > 2 * MB, "two interpreters"
    assert anonymous.anonymous_bytes - empty.anonymous_bytes == pytest.approx(size, rel=0.1)
    assert anonymous.resident_bytes - empty.resident_bytes == pytest.approx(size, rel=0.1)
    assert mapped.anonymous_bytes - empty.anonymous_bytes < size / 4
    assert mapped.resident_bytes - empty.resident_bytes == pytest.approx(size, rel=0.1)


def test_a_process_that_has_ended_counts_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert look(process.pid, tmp_path, 1) == Look(1, 0, 0, 0)


def test_disk_is_what_is_allocated(tmp_path: Path) -> None:
    assert disk_bytes(tmp_path / "absent") == 0
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "full").write_bytes(b"x" * 1_000_000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(50_000_000)
    assert 1_000_000 <= disk_bytes(tmp_path) <= 1_000_000 + 4 * mmap.PAGESIZE


def test_a_watch_looks_until_it_is_left(tmp_path: Path) -> None:
    with holding("anonymous", "0") as pid, Watch(pid, tmp_path, 0.001) as watch:
        while len(watch.looks) < 3:
            time.sleep(0.001)
    seen = len(watch.looks)
    assert [one.at_ns for one in watch.looks] == sorted(one.at_ns for one in watch.looks)
    assert all(one.resident_bytes > MB for one in watch.looks)
    assert len(watch.looks) == seen


# --- scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, [], id="exactly at every target: met"),
        pytest.param({"running_bytes": 400 * MB + 1}, ["400 MB resident"], id="memory while it runs"),
        pytest.param({"judging_bytes": 500 * MB}, ["500 MB resident"], id="memory while it is judged"),
        pytest.param({"running_disk": 64.1}, ["64.1 bytes a query"], id="disk"),
        pytest.param({"verdict_s": 20.5}, ["20.5 s after the last reply"], id="verdict"),
        pytest.param({"running_disk": 70, "verdict_s": 30}, ["70.0 bytes", "30.0 s"], id="two of them"),
    ],
)
def test_what_misses_a_target(change: dict[str, Any], words: list[str]) -> None:
    problems = dataclasses.replace(MET, **change).problems
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_the_runs_cover_what_they_should() -> None:
    full, quick = points(quick=False), points(quick=True)
    for wanted in (full, quick):
        assert {one.workers for one in wanted} == {1, 2}
        assert {(one.payload_bytes, one.workers) for one in wanted} >= {
            (size, workers) for size in (1_024, 150_528, 2_097_152) for workers in (1, 2)
        }
        assert {one.connections for one in wanted} >= {1, 4_096}
        assert wanted[-1].queries == max(one.queries for one in wanted)
    assert {one.queries for one in full} >= {10_000, 100_000, 1_000_000, 10_000_000}
    assert sum(one.queries / one.rate_qps + 2 for one in full) + 20 < 8 * 60
    assert sum(one.queries / one.rate_qps + 2 for one in quick) < 40


@pytest.mark.parametrize("point", points(quick=True), ids=lambda point: point.name)
def test_a_profile_asks_for_exactly_these_queries(point: Point) -> None:
    profile = parse_profile(settings_of(point, "http://127.0.0.1:8000", PayloadServer.endpoint, [0]), source="test")
    assert plan_server(profile.load, profile.samples, profile.samples.count).planned == point.queries
    assert profile.load.warmup_s == 0
    assert profile.client.max_connections == point.connections
    (shape,) = profile.samples.shapes.values()
    assert 4 * shape[0] == point.payload_bytes


def test_looks_are_divided_at_the_last_reply(tmp_path: Path) -> None:
    run = synthetic_run(queries=500, target_qps=1_000)
    directory = RunDirectory.create(tmp_path / "run")
    columns = Columns.create(directory.columns_path(0), rows=500, worker=0, workers=1)
    start_ns = run.facts["start_ns"]
    columns.header[4] = start_ns
    for name in COLUMNS:
        values = getattr(run, name)
        columns.array(name)[:] = values + start_ns if name.endswith("_ns") else values
    directory.write_json(FACTS, run.facts)
    directory.finish(run.facts)
    rewrite_reports(directory.path)
    last_ns = start_ns + int(run.completed_ns.max())
    looks = [
        Look(start_ns, 10, 5, 1_000),
        Look(last_ns, 30, 4, 23_500),
        Look(last_ns + 1, 70, 60, 50_000),
        Look(last_ns + S, 20, 10, 10_000),
    ]
    found = measured_of(Point(1_000, 500), directory.path, looks, last_ns + 2 * S)
    assert (found.running_bytes, found.running_anonymous_bytes, found.running_disk) == (30, 5, 47)
    assert (found.judging_bytes, found.judging_anonymous_bytes, found.judging_disk) == (70, 60, 100)
    assert found.resident_bytes == 70
    assert found.verdict_s == 2
    assert found.ok == 500
    assert found.kept_disk == disk_bytes(directory.path) / 500
    head, rule, line = scale.table([found]).splitlines()
    assert head.split()[:4] == ["|", "queries", "|", "workers"]
    assert rule.startswith("| ---")
    assert line.split()[:4] == ["|", "500", "|", "1"]
    assert len({text.count("|") for text in (head, rule, line)}) == 1
    unsent = scale.table([dataclasses.replace(found, delay_p99_ns=None)]).splitlines()[2]
    assert unsent.split("|")[7].strip() == "-"


def test_a_host_whose_workers_share_a_core_is_told_so() -> None:
    two = dataclasses.replace(MET, point=Point(1_000, 10, workers=2))
    note = scale.shared_core_note([MET, two], [1])
    assert note is not None
    assert "up to 2 workers shared 1 CPU:" in note
    assert scale.shared_core_note([MET, two], [1, 2]) is None
    assert scale.shared_core_note([MET], [1]) is None


def test_the_picture_is_of_the_runs_whose_length_is_the_question() -> None:
    def length(queries: int, **change: Any) -> Measured:
        return dataclasses.replace(MET, point=Point(scale.LENGTH_QPS, queries, connections=scale.LENGTH_CONNECTIONS), **change)

    memory, verdict = scale.charts([MET, length(1_000, running_bytes=90 * MB, verdict_s=0.5), length(10_000, judging_bytes=MB)])
    assert memory.xs == verdict.xs == [1_000, 10_000]
    assert {one.label: one.values for one in memory.series} == {"running": [90, 400], "judging": [399, 1]}
    assert (memory.value_label, verdict.value_label) == ("MB", "s")
    assert [one.values for one in verdict.series] == [[0.5, 20]]


def test_the_payload_server_takes_vectors_and_large_bodies() -> None:
    replies, body_limit = PayloadServer.replies, PayloadServer.body_limit
    config = render_config(8123, Path("/scratch"), facts="", replies=replies, body_limit=body_limit)
    assert '"inputs":[{"name":"INPUT","datatype":"FP32","shape":[-1]}]' in config
    assert '"max_batch_size":0' in config
    assert "client_max_body_size 64m;" in config
    assert '"shape":[-1, 4]' not in config
    assert '"max_batch_size":1' not in config


@needs_nginx
@pytest.mark.load
def test_a_run_of_two_megabyte_queries_is_watched_to_its_verdict() -> None:
    nginx = find_nginx()
    assert nginx is not None
    point = Point(20, 10, workers=2, payload_bytes=scale.TWO_MB, connections=3)
    with PayloadServer(nginx, ()) as server:
        found = measure(point, server, [])
        with pytest.raises(RunError, match=r"2 workers, 3 connections: .*client.cpus"):
            measure(point, server, [100_000])
    assert found.ok == 10
    assert found.connections == 6
    assert found.running_bytes >= found.running_anonymous_bytes > 40 * MB
    assert found.judging_bytes > 20 * MB
    assert found.running_disk * 10 >= 2 * (4_096 + 5 * 47)
    assert found.kept_disk * 10 >= 4_096
    assert 0 < found.verdict_s < 30


# --- start ----------------------------------------------------------------------------------


def test_the_median_is_held_against_the_target() -> None:
    exact = start.Started("servebench --help", (0.2, 9.0, 0.35), 0.35)
    assert exact.median_s == 0.35
    assert exact.met
    late = dataclasses.replace(exact, target_s=0.349)
    assert not late.met
    head, _, met, not_met = start.table([exact, late]).splitlines()
    assert met.startswith("| servebench --help | ")
    assert met.split(" | ")[-1].split() == ["met", "|"]
    assert not_met.endswith("| NOT met |")
    assert head.startswith("| command ")


@needs_nginx
@pytest.mark.load
def test_the_first_query_leaves_after_the_command_began_and_before_it_ends() -> None:
    nginx = find_nginx()
    assert nginx is not None
    with NullServer(nginx, ()) as server:
        began_s = time.monotonic()
        first_s = start.first_query_s(server.url)
        whole_s = time.monotonic() - began_s
    assert 0.1 < first_s < whole_s, "t=0 is at least 0.1 s after the workers are ready"
    with pytest.raises(RunError, match="servebench run failed with exit code 1"):
        start.first_query_s("http://127.0.0.1:9")


# --- floor ----------------------------------------------------------------------------------


def turn(pacing: str, service_p50_ns: int, ping_pong_p50_ns: int) -> floor.Turn:
    return floor.Turn(pacing, service_p50_ns, 2 * service_p50_ns, 10_000, ping_pong_p50_ns, 2 * ping_pong_p50_ns)


def test_the_ratio_is_the_median_of_the_turns_ratios() -> None:
    turns = [turn("precise", 60_000, 30_000), turn("precise", 100_000, 100_000), turn("precise", 90_000, 30_000)]
    turns += [turn("eco", 40_000, 10_000)]
    assert floor.median_ratio(turns, "precise") == 2.0  # of 2, 1 and 3, not 90 us over 30 us
    assert floor.median_ratio(turns, "eco") == 4.0
    head, _, precise, eco = floor.table(turns).splitlines()
    assert precise.split()[-6:] == ["2.00", "|", "1.00", "|", "3.00", "|"]
    assert eco.split()[-6:] == ["4.00", "|", "4.00", "|", "4.00", "|"]
    assert head.startswith("| pacing ")


@needs_nginx
@pytest.mark.load
def test_a_turn_measures_a_run_and_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    nginx = find_nginx()
    assert nginx is not None
    monkeypatch.setattr(floor, "RUN_S", 0.2)
    monkeypatch.setattr(floor, "SOCKET_S", 0.1)
    with NullServer(nginx, ()) as server:
        found = floor.take_turn(server, [max(os.sched_getaffinity(0))], "eco")
    assert 1_000 < found.ping_pong_p50_ns <= found.ping_pong_p99_ns
    assert 1_000 < found.service_p50_ns <= found.service_p99_ns
    assert found.ratio == found.service_p50_ns / found.ping_pong_p50_ns
    assert json.loads(json.dumps(dataclasses.asdict(found)))["pacing"] == "eco"
