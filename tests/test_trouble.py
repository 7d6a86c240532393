"""Real runs that go wrong: a guilty client, an overloaded or broken server, killed processes, interrupts."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e import (
    CLIENT_CPUS,
    SERVER_CPUS,
    Quiet,
    assert_books_balance,
    await_issued,
    command,
    facts,
    profile_data,
    run,
    start_command,
    stub,
)

from servebench.clock import now_ns
from servebench.judge.verdict import exit_code
from servebench.record.outcome import Outcome
from servebench.record.progress import Snapshot
from servebench.record.rundir import read_run

pytestmark = pytest.mark.load


def codes(document: dict[str, Any]) -> set[str]:
    return {reason["code"] for reason in document["trust"]["reasons"] if reason["severity"] == "INVALID"}


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def write_profile(tmp_path: Path, data: dict[str, Any]) -> str:
    path = tmp_path / "profile.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return str(path)


# --- the client's own fault -----------------------------------------------------------------


def test_a_stalled_client_is_invalid_and_blames_itself(tmp_path: Path) -> None:
    """The worker is stopped for 100 ms: to it and to its queries, a stalled event loop."""
    out = tmp_path / "run"
    stamps: list[int] = []

    def resume(pid: int) -> None:
        stamps.append(now_ns())
        os.kill(pid, signal.SIGCONT)

    def stall(snapshot: Snapshot) -> None:
        if not stamps and snapshot.elapsed_s > 1:
            pid = facts(out)["workers"][0]["pid"]
            os.kill(pid, signal.SIGSTOP)
            stamps.append(now_ns())
            threading.Timer(0.1, resume, (pid,)).start()

    with stub(tmp_path, service={"kind": "constant", "mean_ms": 1}) as server:
        load = {"target_qps": 200, "min_duration_s": 4}
        document, data = run(profile_data(server.urls["http"], constraints=["p99 <= 50ms"], load=load), out, Quiet(stall))
    stopped_ns, resumed_ns = (stamp - data.facts["start_ns"] for stamp in stamps)
    assert document["trust"]["verdict"] == document["verdict"] == "INVALID"
    assert exit_code(document["verdict"]) == 5
    assert any("stood still" in reason["text"] or "event loop" in reason["text"] for reason in document["trust"]["reasons"])
    first_due_ns = int(data.scheduled_ns[data.scheduled_ns > stopped_ns].min())
    assert document["issue_delay"]["max_ns"] >= resumed_ns - first_due_ns > 0
    assert_books_balance(document, tmp_path / "run")


def test_a_client_whose_cpu_others_use_says_so(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(stub(tmp_path, service={"kind": "constant", "mean_ms": 1}))
        pin = f"import os\nos.sched_setaffinity(0, {CLIENT_CPUS})\nwhile True: pass"
        for _ in range(4):
            stack.callback(kill, subprocess.Popen([sys.executable, "-c", pin]))
        load = {"target_qps": 300, "min_duration_s": 0, "min_query_count": 900}
        document, data = run(profile_data(server.urls["http"], constraints=["p99 <= 20ms"], load=load), tmp_path / "run")
    reasons = {reason["code"]: reason for reason in document["trust"]["reasons"]}
    assert reasons.keys() & {"lateness", "loop_stall"}
    # Of five that never sleep each has a fifth; a worker that mostly sleeps waits for less than the rest of the time.
    assert 0.01 < reasons["cpu_wait"]["measured"] < 0.8
    stats = data.facts["workers"][0]["stats"]
    assert stats["cpu_wait_s"] == pytest.approx(reasons["cpu_wait"]["measured"] * stats["wall_s"])


def test_a_rate_far_above_what_a_core_can_issue_is_invalid_and_ends_in_time(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.01}) as server:
        load = {"target_qps": 1_500_000, "min_duration_s": 1, "drain_timeout_s": 1, "arrivals": "constant"}
        begun_ns = now_ns()
        document, _ = run(profile_data(server.urls["http"], constraints=["p99 <= 50ms"], load=load), tmp_path / "run")
        assert now_ns() - begun_ns < 30e9
    assert exit_code(document["verdict"]) == 5
    assert document["rates"]["target_qps"] >= 10 * document["rates"]["issued_qps"] > 0
    assert document["counts"]["shed"] > 0
    assert any("client" in reason["text"] for reason in document["trust"]["reasons"] if reason["severity"] == "INVALID")
    assert_books_balance(document, tmp_path / "run")


# --- the server's fault ---------------------------------------------------------------------

PATIENT = ["p99 <= 500ms", "errors < 1%"]


def test_twice_the_capacity_fails(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 4}) as server:
        load = {"target_qps": 500, "min_duration_s": 4, "drain_timeout_s": 1}
        document, data = run(profile_data(server.urls["http"], constraints=PATIENT, load=load), tmp_path / "run")
    assert document["verdict"] == "FAIL", document["reasons"]
    assert exit_code("FAIL") == 3
    assert_books_balance(document, tmp_path / "run")
    # 250 queries a second are served for the 4 s of arrivals and the 1 s of drain; the rest is still out.
    assert document["counts"]["ok"] == pytest.approx(5 * 250, rel=0.03)
    assert document["counts"]["unfinished"] == document["counts"]["planned"] - document["counts"]["ok"]
    assert (data.completed_ns[data.outcome == Outcome.UNFINISHED] > data.scheduled_ns[-1]).all()


def test_ten_percent_of_errors_fail_and_are_counted(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.5}, faults={"status": 0.1, "seed": 3}) as server:
        load = {"target_qps": 400, "min_duration_s": 4}
        document, _ = run(profile_data(server.urls["http"], constraints=PATIENT, load=load), tmp_path / "run")
    assert document["verdict"] == "FAIL", document["reasons"]
    assert_books_balance(document, tmp_path / "run")
    planned, error = document["counts"]["planned"], document["counts"]["error"]
    assert error == pytest.approx(0.1 * planned, abs=5 * np.sqrt(0.09 * planned))
    (kind,) = document["errors"]
    assert (kind["kind"], kind["count"]) == ("status", error)
    assert kind["detail"].startswith("HTTP 503: ")
    # The failures are 10 % of the queries and over every bound: the p99 is one of them.
    assert document["response_time"]["percentiles"]["99"] is None


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        pytest.param({"hang": 0.05}, {"timeout"}, id="hang"),
        pytest.param({"reset": 0.05}, {"reset"}, id="reset"),
        pytest.param({"truncated": 0.05}, {"reset"}, id="truncated body"),
        pytest.param({"garbage": 0.05}, {"protocol"}, id="garbage"),
    ],
)
def test_faults_have_their_own_kind(tmp_path: Path, fault: dict[str, float], kinds: set[str]) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.2}, faults={**fault, "seed": 1}) as server:
        load = {"target_qps": 400, "min_duration_s": 2, "timeout_s": 0.4, "drain_timeout_s": 2}
        data = profile_data(server.urls["http"], constraints=["p99.9 <= 300ms"], load=load, client={"warm_connections": 1})
        begun_ns = now_ns()
        document, _ = run(data, tmp_path / "run")
        assert now_ns() - begun_ns < 13e9, "no hang past the drain limit, 4 s after the first query"
    assert {error["kind"] for error in document["errors"]} == kinds
    assert document["verdict"] == "FAIL", document["reasons"]
    assert_books_balance(document, tmp_path / "run")


def test_a_server_that_closes_idle_connections(tmp_path: Path) -> None:
    """The next query waits for the one connection, and is sent just as the server closes it."""
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 2}, faults={"close_idle": 0.2, "seed": 1}) as server:
        load = {"target_qps": 400, "min_duration_s": 2, "drain_timeout_s": 5, "timeout_s": 5}
        client = {"warm_connections": 1, "max_connections": 1}
        data = profile_data(server.urls["http"], constraints=["p99.9 <= 300ms"], load=load, client=client)
        document, _ = run(data, tmp_path / "run")
    # A reset that overtakes the news of the close looks like any other.
    found = {error["kind"] for error in document["errors"]}
    assert {"stale"} <= found <= {"stale", "reset"}
    assert_books_balance(document, tmp_path / "run")


def test_wrong_outputs_are_found_behind_status_200(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.2}, faults={"wrong_output": 1.0}) as server:
        load = {"target_qps": 200, "min_duration_s": 1}
        document, _ = run(profile_data(server.urls["http"], constraints=["p99 <= 300ms"], load=load), tmp_path / "run")
    assert document["verdict"] == "INVALID"
    (error,) = document["errors"]
    assert error["kind"] == "output"
    assert "OUTPUT" in error["detail"]
    assert_books_balance(document, tmp_path / "run")


def test_a_server_killed_mid_run_fails_and_nothing_hangs(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 1}) as server:
        pid = server.describe()["pid"]
        killed: list[int] = []

        def kill(snapshot: Snapshot) -> None:
            if not killed and snapshot.elapsed_s > 1.5:
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

        load = {"target_qps": 200, "min_duration_s": 4, "drain_timeout_s": 2}
        begun_ns = now_ns()
        document, _ = run(profile_data(server.urls["http"], constraints=PATIENT, load=load), tmp_path / "run", Quiet(kill))
        assert now_ns() - begun_ns < 15e9
    assert document["verdict"] == "FAIL", document["trust"]["reasons"]
    assert_books_balance(document, tmp_path / "run")
    assert {error["kind"] for error in document["errors"]} <= {"connect", "reset", "stale"}
    assert "connect: Connection refused" in {error["detail"] for error in document["errors"]}


# --- killed and interrupted -----------------------------------------------------------------


def test_a_killed_worker_is_missed_and_its_records_stay(tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed: list[int] = []

    def kill(snapshot: Snapshot) -> None:
        if not killed and snapshot.ok > 200:
            killed.append(facts(out)["workers"][1]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.5}) as server:
        load = {"target_qps": 300, "min_duration_s": 3}
        data_of = profile_data(server.urls["http"], constraints=PATIENT, load=load, client={"workers": 2})
        document, data = run(data_of, out, Quiet(kill))
    assert killed
    assert document["state"] == "failed"
    assert document["verdict"] == "INVALID"
    assert document["counts"]["ok"] > 200
    assert_books_balance(document, tmp_path / "run")
    assert not (data.outcome[0::2] == Outcome.NOT_ISSUED).any(), "the other worker went on"
    assert (data.outcome[1::2] == Outcome.OK).sum() > 50, "what the killed one had measured is there"
    left = data.outcome[1::2] == Outcome.NOT_ISSUED
    # The run went on, so what the killed one left was due; what it had out is unfinished, and neither could be told of.
    assert document["counts"]["shed"] == left.sum() > 50
    assert document["counts"]["not_due"] == 0


def test_what_a_killed_run_had_measured_can_be_reported(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.5}) as server:
        load = {"target_qps": 300, "min_duration_s": 30}
        path = write_profile(tmp_path, profile_data(server.urls["http"], constraints=PATIENT, load=load))
        process = start_command("run", path, "--out", "run", cwd=tmp_path)
        await_issued(tmp_path / "run", 300)
        busy = command("report", "run", cwd=tmp_path)
        assert busy.returncode == 2
        assert "still going on" in busy.stderr
        worker = facts(tmp_path / "run")["workers"][0]["pid"]
        process.kill()
        process.communicate(timeout=10)
        _await_exit(worker)
    reported = command("report", "run", "--json", cwd=tmp_path)
    assert reported.returncode == 5, reported.stderr
    document = json.loads(reported.stdout)
    assert (document["state"], document["verdict"]) == ("failed", "INVALID")
    assert document["counts"]["ok"] >= 250
    assert document["counts"]["planned"] > 8000
    assert document["counts"]["not_due"] > 7000
    assert document["counts"]["shed"] <= 3
    assert document["response_time"]["percentiles"]["90"] < 500e6
    assert_books_balance(document, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == document


def _await_exit(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    readable, _, _ = select.select([descriptor], [], [], 10)
    os.close(descriptor)
    assert readable, "the worker outlived its coordinator"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains_and_closes_the_books(tmp_path: Path, number: signal.Signals) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.5}) as server:
        load = {"target_qps": 300, "min_duration_s": 60}
        path = write_profile(tmp_path, profile_data(server.urls["http"], constraints=PATIENT, load=load))
        process = start_command("run", path, "--out", "run", "--json", cwd=tmp_path)
        await_issued(tmp_path / "run", 300)
        process.send_signal(number)
        out, err = process.communicate(timeout=15)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["state"] == "interrupted"
    assert document["verdict"] == "INVALID", "an interrupted run never passes"
    counts = document["counts"]
    assert counts["issued"] == counts["ok"], "what was out was awaited"
    assert counts["not_due"] > 10_000
    # Of 300 queries a second, the ones that were due before the signal was heard and had not been sent.
    assert counts["shed"] <= 3
    # Every query that was due had its reply within some milliseconds: so say the percentiles and the promises.
    assert document["response_time"]["percentiles"]["97"] < 500e6
    assert [item["result"] for item in document["constraints"]] == ["INCONCLUSIVE", "INCONCLUSIVE"], document["reasons"]
    assert all(item["queries"] == counts["issued"] + counts["shed"] for item in document["constraints"])
    assert_books_balance(document, tmp_path / "run")
    assert (tmp_path / "run" / "queries.parquet").exists()


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.5}, faults={"hang": 0.05}) as server:
        load = {"target_qps": 300, "min_duration_s": 60, "timeout_s": 600, "drain_timeout_s": 600}
        path = write_profile(tmp_path, profile_data(server.urls["http"], constraints=PATIENT, load=load))
        process = start_command("run", path, "--out", "run", "--json", cwd=tmp_path)
        await_issued(tmp_path / "run", 300)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "interrupted" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["state"] == "interrupted"
    assert document["counts"]["unfinished"] > 0
    assert document["counts"]["ok"] > 200
    assert document["counts"]["not_due"] > 10_000
    assert document["counts"]["shed"] <= 3
    assert document["response_time"]["percentiles"]["50"] < 500e6
    assert_books_balance(document, tmp_path / "run")


def test_workers_share_one_schedule(tmp_path: Path) -> None:
    """The same seed gives the same arrivals and samples for one worker and for two."""
    found = []
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.2}) as server:
        for workers in (1, 2):
            load = {"target_qps": 400, "min_duration_s": 1}
            data_of = profile_data(server.urls["http"], constraints=PATIENT, load=load, client={"workers": workers})
            document, data = run(data_of, tmp_path / f"run-{workers}")
            assert (data.outcome == Outcome.OK).all()
            assert np.bincount(data.worker).tolist() == [len(data.worker[k::workers]) for k in range(workers)]
            found.append((document["schedule"]["sha256"], data.scheduled_ns.tolist(), data.sample.tolist()))
    assert found[0] == found[1]


def test_a_cap_on_outstanding_queries_sheds_and_says_so(tmp_path: Path) -> None:
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 20}) as server:
        load = {"target_qps": 200, "min_duration_s": 2}
        data_of = profile_data(server.urls["http"], constraints=PATIENT, load=load, client={"max_outstanding": 4})
        document, data = run(data_of, tmp_path / "run")
    assert_books_balance(document, tmp_path / "run")
    assert document["counts"]["shed"] == (data.outcome == Outcome.SHED).sum() > 100
    # An M/D/1/4 queue at four times its rate is full nearly always: it serves 50 queries a second.
    assert document["counts"]["ok"] == pytest.approx(100, rel=0.1)
    assert document["verdict"] == "FAIL"


def test_a_killed_run_does_not_blame_the_server_that_it_took_with_it(tmp_path: Path) -> None:
    """The server dies with the coordinator; a worker that lived on would record what that looks like."""
    load = {"target_qps": 1000, "min_duration_s": 30}
    data_of = profile_data("", constraints=PATIENT, load=load)
    data_of["server"]["options"] = {"cpus": SERVER_CPUS, "service": {"kind": "constant", "mean_ms": 0.5}}
    path = write_profile(tmp_path, data_of)
    for attempt in ("first", "second", "third"):
        process = start_command("run", path, "--out", attempt, cwd=tmp_path)
        await_issued(tmp_path / attempt, 300)
        worker = facts(tmp_path / attempt)["workers"][0]["pid"]
        process.kill()
        process.communicate(timeout=10)
        _await_exit(worker)
        outcomes = set(read_run(tmp_path / attempt).outcome.tolist())
        assert outcomes <= {Outcome.OK, Outcome.OUTSTANDING, Outcome.NOT_ISSUED}, attempt


def test_a_run_that_cannot_begin_leaves_its_directory_as_it_was_and_can_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        load = {"target_qps": 50, "min_duration_s": 1}
        nobody = profile_data(f"http://127.0.0.1:{port}", constraints=PATIENT, load=load)
        occupied = profile_data("", constraints=PATIENT, load=load)
        occupied["server"]["options"] = {"port": port}
        taken.close()
        done = command("run", write_profile(tmp_path, nobody), "--out", "run", cwd=tmp_path)
        assert (done.returncode, list((tmp_path / "run").iterdir())) == (1, []), done.stderr
    with socket.create_server(("127.0.0.1", port)):
        for attempt in ("first", "second"):
            done = command("run", write_profile(tmp_path, occupied), "--out", "run", cwd=tmp_path)
            assert (done.returncode, "in use" in done.stderr) == (1, True), (attempt, done.stderr)
            assert [file.name for file in (tmp_path / "run").rglob("*")] == ["server", "stub.log"]
    done = command("run", write_profile(tmp_path, occupied), "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "run.json").exists(), done.stderr
