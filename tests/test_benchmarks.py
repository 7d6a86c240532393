"""The ceiling benchmark: the null server speaks KServe, and the ladder, the criteria and the exit codes are what they claim."""

import dataclasses
import http.client
import json
import re
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

from benchmarks import ceiling, ceiling_grpc, contest, entry, run_all
from benchmarks.contest import OURS, Contest, Figures, Goal, Settings, delivered_share, hold
from benchmarks.nghttpd import NullGrpcServer, find_nghttpd
from benchmarks.nginx import BINARY_MODEL, INFER_PATH, NullServer, find_nginx, render_config
from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target
from benchmarks.peers.pingpong import ping_pong_ns
from benchmarks.peers.query import BODY, HEADERS
from benchmarks.steps import (
    Step,
    climb,
    header_line,
    measure_saturated_qps,
    measure_step,
    step_line,
    step_of,
)
from benchmarks.verdicts import floor_line, goal_lines

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
        pytest.param({"delay_p99_ns": None, "delay_p50_ns": None}, "issue delay -", id="most queries were never sent"),
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
    ("answers", "start", "best", "seen"),
    [
        pytest.param({10: "c", 20: "c", 30: "xxx", 40: "c"}, 0, 20, [10, 20, 30, 30, 30], id="ends at the first unclean rate"),
        pytest.param({10: "c", 20: "xxc", 30: "xxx"}, 0, 20, [10, 20, 20, 20, 30, 30, 30], id="the third try counts"),
        pytest.param({10: "xxx", 20: "c"}, 0, None, [10, 10, 10], id="no rate is clean"),
        pytest.param({10: "c", 20: "c"}, 0, 20, [10, 20], id="the whole ladder is clean"),
        pytest.param({10: "", 20: "c", 30: "xxx"}, 1, 20, [20, 30, 30, 30], id="from a rung upwards"),
        pytest.param({5: "c", 10: "xxc", 20: "xxx", 30: "c"}, 2, 10, [20, 20, 20, 10, 10, 10], id="down if need be"),
        pytest.param({10: "xxx", 20: "xxx"}, 1, None, [20, 20, 20, 10, 10, 10], id="nothing below is clean either"),
    ],
)
def test_the_ladder(answers: dict[float, str], start: int, best: float | None, seen: list[float]) -> None:
    steps: list[Step] = []
    found = climb(measured(answers), list(answers), steps.append, tries=3, start=start)
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


# --- contests ---------------------------------------------------------------------------


@dataclasses.dataclass
class ScriptedPeer:
    """A peer whose results are written down; it keeps what it was asked for."""

    arrivals: frozenset[Arrivals]
    results: list[PeerResult | RunError]
    asked: list[tuple[Arrivals, float | None]] = dataclasses.field(default_factory=list)
    name: str = "scripted"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http"})

    def absent(self) -> str | None:
        return None

    def set_up(self, progress: Progress) -> None:
        pass

    def run(self, target: Target, load: Load) -> PeerResult:
        self.asked.append((load.arrivals, load.rate_qps))
        result = self.results.pop(0)
        if isinstance(result, RunError):
            raise result
        return result


def peer_result(rate_qps: float, *, errors: int = 0) -> PeerResult:
    return PeerResult(round(rate_qps * 2), errors, 2.0, rate_qps, None, 1.0, "scripted")


def hold_two_rounds(monkeypatch: pytest.MonkeyPatch, peer: ScriptedPeer, lines: list[str]) -> Contest:
    """A contest in which servebench is clean up to 200/s in round one, 400/s in round two, and saturated at 600/s and 900/s."""
    clean_to, saturated = iter([200.0, 400.0]), iter([600.0, 900.0])
    monkeypatch.setattr(contest, "climb", lambda *_, **__: dataclasses.replace(CLEAN, target_qps=next(clean_to)))
    monkeypatch.setattr(contest, "measure_saturated_qps", lambda *_, **__: next(saturated))
    settings = Settings(rounds=2, tries=3, step_s=1, peer_s=2, shares=(0.8, 0.5), ladder_qps=(100, 200, 400), first_rung=1)
    server: Any = None  # only the patched functions would ask it
    return hold(server, Target("http://127.0.0.1:1", "null", "/", b""), [peer], [0], settings, say=lines.append)


def test_ratios_are_taken_within_rounds_and_rates_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = ScriptedPeer(frozenset({"closed"}), [peer_result(100), peer_result(300)])
    found = hold_two_rounds(monkeypatch, peer, [])
    clean, saturated = found.ratio("clean", "scripted"), found.ratio("saturated", "scripted")
    assert clean is not None
    assert saturated is not None
    assert (clean.median, clean.lowest, clean.highest) == pytest.approx(((2 + 4 / 3) / 2, 4 / 3, 2))
    assert (saturated.lowest, saturated.highest) == pytest.approx((3, 6))
    assert found.clean_qps is not None
    assert found.clean_qps.median == 300
    assert found.ratio("clean", "nobody") is None
    assert "300 (200 - 400)" in contest.table(found)


def test_an_open_loop_is_asked_for_falling_shares_of_its_own_saturated_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        peer_result(1000),
        peer_result(790),  # 98.75 % of 800
        peer_result(498),  # 99.6 % of 500
        peer_result(1000),
        peer_result(799),
    ]
    peer = ScriptedPeer(frozenset({"closed", "poisson", "constant"}), list(results))
    found = hold_two_rounds(monkeypatch, peer, [])
    assert peer.asked == [("closed", None), ("constant", 800), ("constant", 500), ("closed", None), ("constant", 800)]
    assert found.figures["scripted"].open_qps == {0: 500, 1: 800}


def test_a_peer_that_fails_loses_its_round_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    peer = ScriptedPeer(frozenset({"closed"}), [RunError("no luck"), peer_result(100, errors=3)])
    found = hold_two_rounds(monkeypatch, peer, lines)
    assert found.ratio("clean", "scripted") is None
    assert found.figures["scripted"].errors == 3
    assert "  scripted: no luck" in lines
    assert any("3 of its queries failed" in line for line in lines)
    assert len(found.figures[OURS].open_qps) == 2


@pytest.mark.parametrize(
    ("result", "share"),
    [
        pytest.param(PeerResult(1000, 0, 2.05, 487.8, None, 1, ""), 1.0, id="the last replies take a while"),
        pytest.param(PeerResult(1000, 0, 2.5, 400, None, 1, ""), 0.8, id="late by half a second is late"),
        pytest.param(PeerResult(800, 0, 1.6, 500, None, 1, ""), 1.0, id="a tool that measures less than asked"),
        pytest.param(PeerResult(900, 0, 2.0, 450, None, 1, ""), 0.9, id="a tenth is missing"),
    ],
)
def test_what_an_open_loop_delivers(result: PeerResult, share: float) -> None:
    assert delivered_share(result, 500, 2.0) == pytest.approx(share)


# --- exit codes -------------------------------------------------------------------------


def contest_of(clean_qps: float | None, saturated_qps: float, peers: dict[str, float]) -> Contest:
    found = Contest()
    found.figures[OURS] = Figures({0: saturated_qps}, {} if clean_qps is None else {0: clean_qps})
    for name, rate_qps in peers.items():
        found.figures[name] = Figures({0: rate_qps})
    return found


@pytest.mark.parametrize(
    ("rate_qps", "code", "words"),
    [
        pytest.param(25_000, 0, "Floor met: highest clean rate 25,000/s", id="the floor itself is enough"),
        pytest.param(24_999, 1, "Floor NOT met: highest clean rate 24,999/s", id="less is not"),
        pytest.param(0, 1, "Floor NOT met: no rate was clean", id="nothing was clean"),
        pytest.param(None, 1, "Floor NOT met: no rate was clean", id="nothing was measured"),
    ],
)
def test_the_floor_decides_the_exit_code(rate_qps: int | None, code: int, words: str) -> None:
    found = contest_of(rate_qps, 30_000, {})
    assert floor_line(found, ceiling.FLOOR_QPS).startswith(words)
    assert ceiling.CEILING.exit_code(found) == code


@pytest.mark.parametrize(
    ("peers", "code"),
    [
        pytest.param({"aiohttp": 10_000, "locust": 10_000, "wrk": 120_000}, 0, id="every ratio at its floor"),
        pytest.param({"aiohttp": 10_001, "locust": 10_000, "wrk": 120_000}, 1, id="one below"),
        pytest.param({"wrk": 120_001}, 1, id="too far behind wrk"),
        pytest.param({}, 0, id="no peers, nothing to compare with"),
    ],
)
def test_ratios_to_peers_that_ran_are_floors_too(peers: dict[str, float], code: int) -> None:
    assert ceiling.CEILING.exit_code(contest_of(25_000, 30_000, peers)) == code


def test_without_nginx_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "find_nginx", lambda: None)
    assert ceiling.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "apt install nginx-light" in err


def raising(error: BaseException) -> Callable[[], int]:
    def need() -> int:
        raise error

    return need


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param(lambda: 0, 0, "", id="its own code"),
        pytest.param(lambda: 1, 1, "", id="its own other code"),
        pytest.param(raising(entry.MachineLacks("no such tool")), 2, "no such tool\n", id="the machine lacks something"),
        pytest.param(raising(RunError("it fell")), 1, "the measurement failed: it fell\n", id="a run fails"),
        pytest.param(raising(OSError("disk full")), 1, "the measurement failed: disk full\n", id="the system fails"),
        pytest.param(raising(KeyboardInterrupt()), 130, "", id="interrupted"),
    ],
)
def test_a_benchmark_ends_with_a_code_and_at_most_a_line(
    body: Callable[[], int], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def measure(*, quick: bool) -> int:
        asked.append(quick)
        return body()

    assert entry.enter(measure, "x", "What.\n\nHow.", ["--quick"], quick_help="less") == code
    assert entry.enter(measure, "x", "What.\n\nHow.", [], quick_help="less") == code
    assert asked == [True, False]
    assert capsys.readouterr() == ("", words * 2)


def test_the_help_is_the_modules_own_text_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    doc = "What ``it`` is.\n\n``python -m it`` takes `TIME_S`.\n\nExit codes: 0."
    with pytest.raises(SystemExit) as caught:
        entry.enter(lambda *, quick: 0, "it", doc, ["--help"], quick_help="less of it")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m benchmarks.it [-h] [--quick]\n\nWhat it is.\n")
    assert out.endswith("\n\npython -m it takes TIME_S.\n\nExit codes: 0.\n")
    assert "less of it" in out


def test_one_cpu_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry.os, "sched_getaffinity", lambda _: {7})
    with pytest.raises(entry.MachineLacks, match="one CPU is not enough"):
        entry.need_cpus()
    monkeypatch.setattr(entry.os, "sched_getaffinity", lambda _: {7, 3})
    assert entry.need_cpus() == [3, 7]


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
        connection.request("POST", INFER_PATH.replace("null", BINARY_MODEL), BODY, dict(HEADERS))
        reply = connection.getresponse()
        length = int(reply.headers["Inference-Header-Content-Length"])
        binary = InferResult.from_response_body(reply.read(), header_length=length).as_numpy("OUTPUT")
        assert binary.tobytes() == b"abcd" * 4
        connection.close()

        # Overloaded, it still gets answers, and no more than were due.
        assert 1000 < measure_saturated_qps(server, cpus[-1:], duration_s=0.5) < 250_000

        before = psutil.Process().cpu_affinity()
        times_ns = ping_pong_ns(server.url, cpus[-1:], rate_qps=1000, duration_s=0.1)
        assert len(times_ns) == pytest.approx(100, abs=60)  # six standard deviations
        assert min(times_ns) > 1000  # no loopback is that fast
        assert psutil.Process().cpu_affinity() == before
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


# --- gRPC -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean_qps", "peer_qps", "code", "words"),
    [
        pytest.param(30_000, 10_000, 0, "Floor met: our clean rate is 3.00 times", id="both floors just met"),
        pytest.param(29_000, 10_000, 1, "Floor NOT met: our clean rate is 2.90 times", id="ratio too small"),
        pytest.param(19_000, 1_000, 1, "Floor met: our clean rate is 19.00 times", id="rate too small"),
        pytest.param(0, 1_000, 1, "Floor NOT met: our clean rate is 0.00 times", id="ours had no clean rate"),
        pytest.param(50_000, None, 1, "Floor not measured: grpc.aio did not run", id="the peer did not run"),
    ],
)
def test_the_grpc_floors_decide_the_exit_code(clean_qps: int, peer_qps: int | None, code: int, words: str) -> None:
    found = contest_of(clean_qps, 60_000, {} if peer_qps is None else {"grpc.aio": peer_qps})
    assert ceiling_grpc.CEILING.exit_code(found) == code
    (line,) = goal_lines(found, [Goal("clean", "grpc.aio", 3.0)], "Floor")
    assert line.startswith(words)


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


# --- all of them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        pytest.param([0, 0], 0, id="all passed"),
        pytest.param([0, 2], 0, id="one left out"),
        pytest.param([2, 2], 2, id="none could run"),
        pytest.param([0, 1], 1, id="one failed"),
        pytest.param([2, -9], 1, id="one was killed"),
    ],
)
def test_what_all_benchmarks_come_to(codes: list[int], code: int) -> None:
    assert run_all.exit_code([run_all.Ran("x", one, 1.0, None) for one in codes]) == code


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_all.main(["ceilling"])
    assert caught.value.code == 2
    assert "ceiling, ceiling_grpc" in capsys.readouterr().err
