"""The ceiling benchmark: the null server speaks KServe, and the ladder, the criteria and the exit codes are what they claim."""

import dataclasses
import http.client
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tritonclient.http import InferResult

from servebench.errors import RunError

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are run from the checkout, they are not installed

from benchmarks import ceiling, ceiling_grpc
from benchmarks.ceiling import (
    FLOOR_QPS,
    MAX_TRIES,
    Step,
    climb,
    floor_line,
    header_line,
    measure_step,
    step_line,
    step_of,
)
from benchmarks.nghttpd import NullGrpcServer, find_nghttpd
from benchmarks.nginx import INFER_PATH, NullServer, find_nginx, render_config
from benchmarks.peers import BODY, HEADERS, parse_wrk, ping_pong_ns, wrk_qps

CLEAN = Step(
    target_qps=25_000,
    planned=100_000,
    not_ok=0,
    issued_qps=25_010.0,
    on_time_share=0.995,
    delay_p50_ns=2_000,
    delay_p99_ns=1_000_000,
    delay_max_ns=4_000_000,
    response_p50_ns=40_000,
    response_p99_ns=1_500_000,
    service_p50_ns=38_000,
    worker_cpu_share=0.97,
    server_cpu_share=0.23,
    connections=76,
    trust="DEGRADED",
)
LATE = dataclasses.replace(CLEAN, delay_p99_ns=1_000_001)


def served_replies(config: str) -> dict[str, str]:
    return dict(re.findall(r"location = (\S+) \{ return 200 '(.*)'; \}", config))


# --- the null server's configuration ----------------------------------------------------


def test_the_configuration_serves_what_kserve_clients_read() -> None:
    replies = served_replies(render_config(8123, Path("/scratch"), facts="nginx version: nginx/1.22.1"))
    assert "/v2/health/ready" in replies

    result = InferResult.from_response_body(replies["/v2/models/null/infer"].encode())
    output = result.as_numpy("OUTPUT")
    assert output.dtype == np.float32
    assert output.shape == (1, 4)

    metadata = json.loads(replies["/v2/models/null"])
    assert metadata["name"] == "null"
    assert metadata["inputs"] == [{"name": "INPUT", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "OUTPUT", "datatype": "FP32", "shape": [-1, 4]}]
    assert json.loads(replies["/v2/models/null/config"])["max_batch_size"] >= 1


def test_the_configuration_is_for_one_quiet_worker_on_loopback() -> None:
    lines = render_config(8123, Path("/scratch"), facts="").splitlines()
    assert "master_process off;" in lines
    assert "access_log off;" in lines
    assert [line for line in lines if line.startswith("listen")] == ["listen 127.0.0.1:8123 backlog=4096;"]
    keepalive = next(line for line in lines if line.startswith("keepalive_requests"))
    assert int(keepalive.removesuffix(";").split()[1]) > 250_000 * 120  # more than a whole run on one connection


@pytest.mark.parametrize(
    ("facts", "scgi"),
    [
        pytest.param("configure arguments: --with-threads", True, id="module built in"),
        pytest.param("configure arguments: --without-http_scgi_module", False, id="module left out: its directive is unknown"),
    ],
)
def test_scratch_folders_are_set_for_the_modules_there_are(facts: str, scgi: bool) -> None:
    config = render_config(8123, Path("/scratch"), facts)
    assert 'client_body_temp_path "/scratch/client_body";' in config
    assert ("scgi_temp_path" in config) == scgi


# --- criteria and ladder ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param({}, None, id="exactly at every bound: clean"),
        pytest.param({"delay_p99_ns": 1_000_001}, "issue delay", id="p99 issue delay over 1 ms"),
        pytest.param({"not_ok": 1}, "1 of 100,000 queries not ok", id="one failed query"),
        pytest.param({"on_time_share": 0.9949}, "99.49% issued", id="less than 99.5 % issued in time"),
        pytest.param({"trust": "INVALID"}, "INVALID", id="servebench itself does not trust the run"),
        pytest.param({"delay_max_ns": 9_000_000, "response_p99_ns": None}, None, id="maximum and response are no criteria"),
    ],
)
def test_what_makes_a_step_clean(change: dict[str, Any], problem: str | None) -> None:
    step = dataclasses.replace(CLEAN, **change)
    assert len(step.problems) == (problem is not None)
    assert step_line(step).endswith("clean" if problem is None else step.problems[0])
    if problem is not None:
        assert problem in step.problems[0]


def test_an_unclean_step_tells_when_others_ran_on_the_workers_core() -> None:
    crowded = dataclasses.replace(LATE, worker_cpu_share=0.71)
    assert "others ran on the worker's core" in step_line(crowded)
    assert "others ran" not in step_line(LATE)
    assert step_line(dataclasses.replace(CLEAN, worker_cpu_share=0.71)).endswith("clean")


def measured(answers: dict[float, str]) -> Callable[[float], Step]:
    """A measurement whose tries at a rate come out as written: c is clean, x is not."""
    tries = {rate: iter(answer) for rate, answer in answers.items()}
    return lambda rate: dataclasses.replace(CLEAN if next(tries[rate]) == "c" else LATE, target_qps=rate)


@pytest.mark.parametrize(
    ("answers", "best", "seen"),
    [
        pytest.param({10: "c", 20: "c", 30: "xxx", 40: "c"}, 20, [10, 20, 30, 30, 30], id="ends at the first unclean rate"),
        pytest.param({10: "c", 20: "xxc", 30: "xxx"}, 20, [10, 20, 20, 20, 30, 30, 30], id="the third try counts"),
        pytest.param({10: "xxx", 20: "c"}, None, [10, 10, 10], id="no rate is clean"),
        pytest.param({10: "c", 20: "c"}, 20, [10, 20], id="the whole ladder is clean"),
    ],
)
def test_the_ladder(answers: dict[float, str], best: float | None, seen: list[float]) -> None:
    assert MAX_TRIES == 3
    steps: list[Step] = []
    found = climb(measured(answers), list(answers), steps.append)
    assert (found and found.target_qps) == best
    assert [step.target_qps for step in steps] == seen


def test_a_step_reads_the_run_document() -> None:
    def block(**percentiles: int | None) -> dict[str, Any]:
        return {"percentiles": {name.removeprefix("p"): value for name, value in percentiles.items()}, "max_ns": 90}

    document = {
        "rates": {"target_qps": 1000.0, "issued_qps": 1003.5},
        "counts": {"planned": 4000, "ok": 3990},
        "issue_delay": block(p50=1, p99=2),
        "response_time": block(p50=3, p99=None),
        "service_time": block(p50=5, p99=6),
        "workers": [{"stats": {"cpu_s": 1.5, "wall_s": 6.0, "connections_peak": 17}}],
        "trust": {"verdict": "VALID"},
    }
    step = step_of(document, on_time_share=0.75, server_cpu_share=0.5)
    assert step == Step(1000.0, 4000, 10, 1003.5, 0.75, 1, 2, 90, 3, None, 5, 0.25, 0.5, 17, "VALID")
    assert len(header_line("nginx")) - len("clean?") == step_line(step).index("no: ")  # the columns line up, also without a p99


# --- exit codes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate_qps", "code", "words"),
    [
        pytest.param(FLOOR_QPS, 0, "Floor met: highest clean rate 25,000/s", id="the floor itself is enough"),
        pytest.param(FLOOR_QPS - 1, 1, "Floor NOT met: highest clean rate 24,999/s", id="less is not"),
        pytest.param(None, 1, "Floor NOT met: no rate was clean", id="nothing was clean"),
    ],
)
def test_the_floor_decides_the_exit_code(rate_qps: int | None, code: int, words: str) -> None:
    best = None if rate_qps is None else dataclasses.replace(CLEAN, target_qps=rate_qps)
    assert floor_line(best).startswith(words)
    assert ceiling.exit_code(best) == code


def test_without_nginx_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceiling, "find_nginx", lambda: None)
    assert ceiling.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "apt install nginx-light" in err


# --- the peers --------------------------------------------------------------------------


def test_wrk_rates_are_requests_over_time() -> None:
    output = "Running 3s test\n  1 threads and 16 connections\nRequests/sec: 211302.26\nRESULT 655037 3100000 0\n"
    assert parse_wrk(output) == pytest.approx(655_037 / 3.1)


@pytest.mark.parametrize(
    "output",
    [
        pytest.param("RESULT 655037 3100000 12\n", id="requests failed"),
        pytest.param("unable to connect to 127.0.0.1:1 Connection refused\n", id="no server"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_wrk_that_failed_is_no_rate(output: str) -> None:
    with pytest.raises(RunError, match="wrk did not measure"):
        parse_wrk(output)


# --- for real ---------------------------------------------------------------------------


@pytest.mark.load
def test_a_real_step_against_nginx() -> None:
    nginx, cpus = find_nginx(), sorted(psutil.Process().cpu_affinity())
    if nginx is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    with NullServer(nginx, cpus[:1]) as server:
        processes = [child for child in psutil.Process().children(recursive=True) if child.name() == "nginx"]
        assert [process.cpu_affinity() for process in processes] == [cpus[:1]]

        step = measure_step(server, cpus[-1:], 2000, duration_s=1)
        assert step.target_qps == 2000
        assert step.planned == pytest.approx(2000, rel=0.1)  # Poisson: a standard deviation is 2.2 %
        assert step.not_ok == 0
        assert step.response_p50_ns is not None
        assert step.service_p50_ns is not None
        assert 0 < step.service_p50_ns <= step.response_p50_ns
        assert 0 < step.server_cpu_share < 1

        port = int(server.url.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", INFER_PATH, BODY, dict(HEADERS))
        reply = connection.getresponse()
        assert reply.status == 200
        assert InferResult.from_response_body(reply.read()).as_numpy("OUTPUT").tolist() == [[0.0, 1.0, 2.0, 3.0]]
        connection.close()

        before = psutil.Process().cpu_affinity()
        times_ns = ping_pong_ns(server.url, cpus[-1:], rate_qps=1000, duration_s=0.1)
        assert len(times_ns) == pytest.approx(100, abs=60)  # six standard deviations
        assert min(times_ns) > 1000  # no loopback is that fast
        wrk = shutil.which("wrk")
        if wrk is not None:
            assert wrk_qps(wrk, server.url, cpus[-1:], duration_s=1) > 100
        assert psutil.Process().cpu_affinity() == before
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


# --- gRPC -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire_qps", "reference_qps", "code", "words"),
    [
        pytest.param(30_000, 10_000, 0, "Floor met: 3.0 times", id="both floors just met"),
        pytest.param(29_000, 10_000, 1, "Floor NOT met: 2.9 times", id="ratio too small"),
        pytest.param(19_000, 1_000, 1, "Floor met: 19.0 times", id="rate too small"),
        pytest.param(None, 1_000, 1, "No ratio", id="ours had no clean rate"),
        pytest.param(50_000, None, 1, "No ratio", id="the reference had none"),
    ],
)
def test_the_grpc_floors_decide_the_exit_code(wire_qps: int | None, reference_qps: int | None, code: int, words: str) -> None:
    best = {
        client: None if qps is None else dataclasses.replace(CLEAN, target_qps=qps)
        for client, qps in (("wire", wire_qps), ("grpcio", reference_qps))
    }
    assert ceiling_grpc.exit_code(best) == code
    assert ceiling_grpc.ratio_line(best).startswith(words)


@pytest.mark.load
def test_real_steps_against_nghttpd() -> None:
    nghttpd, cpus = find_nghttpd(), sorted(psutil.Process().cpu_affinity())
    if nghttpd is None:
        pytest.skip("nghttpd is not installed (apt install nghttp2-server)")
    with NullGrpcServer(nghttpd, cpus[:1]) as server:
        for transport in ("wire", "grpcio"):
            step = measure_step(server, cpus[-1:], 500, duration_s=1, transport=transport)
            assert (step.target_qps, step.not_ok) == (500, 0)
            assert step.planned == pytest.approx(500, rel=0.2)
