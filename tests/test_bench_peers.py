"""The benchmark's peers: their reports are read as meant, their processes are bounded, and the chat stub is a queue."""

import http.client
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
from servebench_servers.stub import StubOptions
from servebench_servers.stub_queue import Service

from servebench.errors import RunError

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are run from the checkout, they are not installed

from benchmarks import peers
from benchmarks.contest import CONNECTIONS
from benchmarks.nginx import NullServer, find_nginx
from benchmarks.openai_stub import BODY, PATH, OpenAIStub
from benchmarks.peers import environment, perf_analyzer
from benchmarks.peers.base import Arrivals, Load, Peer, PeerProtocol, PeerResult, Progress, Target, run_bounded
from benchmarks.peers.h2load import H2Load, logged_times_ns, parse_h2load
from benchmarks.peers.hey import Hey, parse_hey
from benchmarks.peers.locust import parse_locust
from benchmarks.peers.numbers import of_counts, of_times
from benchmarks.peers.openai_clients import parse_aiperf, parse_guidellm
from benchmarks.peers.perf_analyzer import PerfAnalyzer, exported_times_ns, parse_table
from benchmarks.peers.query import http_target
from benchmarks.peers.wrk import Wrk, parse_wrk, wrk_script

# --- percentiles ------------------------------------------------------------------------


def test_percentiles_are_nearest_rank_however_times_are_kept() -> None:
    for count in (1, 2, 99, 1000, 1001, 4321):
        times_ns = np.random.default_rng(count).integers(1, 50_000, count) * 1000
        shares = {50.0: Fraction(50, 100), 99.0: Fraction(99, 100), 99.9: Fraction(999, 1000)}
        expected = {p: int(np.sort(times_ns)[math.ceil(share * count) - 1]) for p, share in shares.items()}
        values, counts = np.unique(times_ns, return_counts=True)
        assert of_times(times_ns) == expected
        assert of_counts(dict(zip(values.tolist(), counts.tolist(), strict=True))) == expected


def test_no_times_have_no_percentiles() -> None:
    assert of_times([]) is None
    assert of_counts({}) is None


# --- reports, as the tools wrote them ----------------------------------------------------

HEY = """
Summary:
  Total:	2.0055 secs
  Slowest:	0.0014 secs
  Requests/sec:	39.7828

Response time histogram:
  0.000 [1]	|
  0.001 [19]	|

Latency distribution:
  50% in 0.0005 secs
  95% in 0.0007 secs
  99% in 0.0013 secs

Status code distribution:
  [200]	40 responses
"""
HEY_WITH_TROUBLE = (
    HEY
    + """  [503]	7 responses

Error distribution:
  [10]	Post "http://127.0.0.1:1/x": dial tcp 127.0.0.1:1: connect: connection refused
  [3]	Post "http://127.0.0.1:1/x": context deadline exceeded
"""
)
H2LOAD = """
finished in 1500.00ms, 40.00 req/s, 11.05KB/s
requests: 60 total, 66 started, 60 done, 57 succeeded, 1 failed, 2 errored, 0 timeout
status codes: 57 2xx, 0 3xx, 1 4xx, 0 5xx
"""
PERF_ANALYZER_TABLE = """Request Rate,Inferences/Second,Client Send,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
50,49.9746,131,0,270,392,398,438
"""
PERF_ANALYZER_TEXT = "  Client: \n    Request count: 54\n    Throughput: 49.9746 infer/sec\n"
PERF_ANALYZER_EXPORT = (
    b'{"experiments":[{"experiment":{"mode":"request_rate","value":50.0},"requests":['
    b'{"timestamp":1795334198460203814,"request_inputs":{"INPUT":null},"response_timestamps":[1795334198460733322],'
    b'"response_outputs":[{"OUTPUT":"\\u0000\x80?"}]},'
    b'{"timestamp":1795334198500201925,"request_inputs":{"INPUT":null},"response_timestamps":[1795334198500201999]}]}]}'
)
LOCUST = json.dumps(
    [
        {
            "num_requests": 100,
            "num_failures": 4,
            "start_time": 50.0,
            "last_request_timestamp": 52.0,
            "response_times": {"1": 98, "20": 1, "300": 1},
        }
    ]
)
AIPERF = json.dumps({"benchmark_duration": {"unit": "sec", "avg": 2.5}, "error_request_count": {"avg": 2.0}})
AIPERF_RECORDS = "\n".join(
    json.dumps(record)
    for record in (
        {"metrics": {"request_latency": {"value": 1.5, "unit": "ms"}}, "error": None},
        {"metrics": {"request_latency": {"value": 2.5, "unit": "ms"}}, "error": None},
        {"metrics": {}, "error": {"code": 503}},
        {"metrics": {}, "error": {"code": 503}},
    )
)
GUIDELLM = json.dumps(
    {
        "benchmarks": [
            {
                "duration": 3.0,
                "metrics": {
                    "request_totals": {"successful": 294, "errored": 1, "incomplete": 5, "total": 300},
                    "request_latency": {"successful": {"percentiles": {"p50": 0.012, "p99": 0.0609, "p999": 0.25}}},
                },
            }
        ]
    }
)


@pytest.mark.parametrize(
    ("parse", "completed", "errors", "duration_s", "percentiles"),
    [
        pytest.param(
            lambda: parse_wrk("  1 threads\nRESULT 655037 3100000 0 72 6207 9676\n", cpu_s=1, command=""),
            655_037,
            0,
            3.1,
            {50: 72_000, 99: 6_207_000, 99.9: 9_676_000},
            id="wrk",
        ),
        pytest.param(
            lambda: parse_wrk("RESULT 655037 3100000 37 72 6207 9676\n", cpu_s=1, command=""),
            655_000,
            37,
            3.1,
            {50: 72_000, 99: 6_207_000, 99.9: 9_676_000},
            id="wrk counts failed replies as requests",
        ),
        pytest.param(lambda: parse_hey(HEY, cpu_s=1, command=""), 40, 0, 2.0055, {50: 500_000, 99: 1_300_000}, id="hey"),
        pytest.param(
            lambda: parse_hey(HEY_WITH_TROUBLE, cpu_s=1, command=""),
            40,
            20,
            2.0055,
            {50: 500_000, 99: 1_300_000},
            id="hey with refused connections and another status",
        ),
        pytest.param(lambda: parse_h2load(H2LOAD, cpu_s=1, command=""), 57, 3, 1.5, None, id="h2load"),
        pytest.param(
            lambda: parse_table(PERF_ANALYZER_TABLE, PERF_ANALYZER_TEXT, None, cpu_s=1, command=""),
            54,
            0,
            54 / 49.9746,
            {50: 270_000, 99: 438_000},
            id="perf_analyzer",
        ),
        pytest.param(
            lambda: parse_table(
                PERF_ANALYZER_TABLE, PERF_ANALYZER_TEXT, exported_times_ns(PERF_ANALYZER_EXPORT), cpu_s=1, command=""
            ),
            54,
            0,
            54 / 49.9746,
            {50: 74, 99: 529_508, 99.9: 529_508},
            id="perf_analyzer with every request, whose tensors are no UTF-8",
        ),
        pytest.param(
            lambda: parse_locust(LOCUST, "CPU 1.5\n", command=""),
            96,
            4,
            2.0,
            {50: 1_000_000, 99: 20_000_000, 99.9: 300_000_000},
            id="locust",
        ),
        pytest.param(
            lambda: parse_aiperf(AIPERF, AIPERF_RECORDS, cpu_s=1, command=""),
            2,
            2,
            2.5,
            {50: 1_500_000, 99: 2_500_000, 99.9: 2_500_000},
            id="aiperf",
        ),
        pytest.param(
            lambda: parse_guidellm(GUIDELLM, cpu_s=1, command=""),
            294,
            1,
            3.0,
            {50: 12_000_000, 99: 60_900_000, 99.9: 250_000_000},
            id="guidellm",
        ),
    ],
)
def test_reports_are_read(
    parse: Callable[[], PeerResult], completed: int, errors: int, duration_s: float, percentiles: dict[float, int] | None
) -> None:
    result = parse()
    assert (result.completed, result.errors) == (completed, errors)
    assert result.duration_s == pytest.approx(duration_s)
    assert result.rate_qps == pytest.approx(completed / duration_s)
    assert result.percentiles == percentiles


@pytest.mark.parametrize(
    "parse",
    [
        pytest.param(lambda: parse_wrk("unable to connect to 127.0.0.1:1\n", cpu_s=1, command=""), id="wrk"),
        pytest.param(lambda: parse_hey("", cpu_s=1, command=""), id="hey"),
        pytest.param(lambda: parse_h2load("the protocol is not supported", cpu_s=1, command=""), id="h2load"),
        pytest.param(lambda: parse_locust("[]", "no such file", command=""), id="locust"),
        pytest.param(lambda: parse_table(PERF_ANALYZER_TABLE, "", None, cpu_s=1, command=""), id="perf_analyzer"),
        pytest.param(lambda: parse_aiperf(AIPERF, "", cpu_s=1, command=""), id="aiperf"),
    ],
)
def test_a_report_without_a_measurement_is_an_error_that_names_the_tool(
    parse: Callable[[], PeerResult], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(RunError, match=f"^{request.node.callspec.id} did not measure"):
        parse()


def test_h2loads_log_keeps_the_times_of_answered_requests() -> None:
    log = "1795334196064339\t200\t167\n1795334196064352\t503\t193\n1795334196114701\t200\t261\n"
    assert logged_times_ns(log).tolist() == [167_000, 261_000]


def test_wrk_sends_the_query_that_all_others_send() -> None:
    target = http_target("http://127.0.0.1:1")
    script = wrk_script(target).splitlines()
    assert f"wrk.body = [==[{target.body.decode()}]==]" in script
    assert 'wrk.headers["content-type"] = "application/json"' in [line.lower() for line in script]


# --- processes --------------------------------------------------------------------------


def test_a_peer_that_does_not_end_is_killed_with_all_it_started(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    # A child in the same group and one that left it, which only the family tree knows.
    code = (
        "import os, subprocess, sys, time\n"
        "children = [subprocess.Popen(['sleep', '600']), subprocess.Popen(['sleep', '600'], start_new_session=True)]\n"
        f"open({str(started)!r}, 'w').write(' '.join(str(pid) for pid in [os.getpid(), *(c.pid for c in children)]))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(RunError, match=r"^sleeper was still running after 2 s, and was killed$"):
        run_bounded("sleeper", [sys.executable, "-c", code], timeout_s=2)
    pids = [int(pid) for pid in started.read_text().split()]
    assert len(pids) == 3
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_command_runs_where_it_is_told_and_its_cpu_time_is_its_own() -> None:
    before = os.sched_getaffinity(0)
    cpu = max(before)
    code = "import os, time\nprint(os.sched_getaffinity(0))\nwhile time.process_time() < 0.3: pass"
    finished = run_bounded("burner", [sys.executable, "-c", code], timeout_s=60, cpus=[cpu])
    assert finished.stdout.strip() == f"{{{cpu}}}"
    assert 0.3 <= finished.cpu_s < 1.5
    assert os.sched_getaffinity(0) == before


def test_a_failing_command_is_an_error_with_its_last_words() -> None:
    with pytest.raises(RunError, match=r"^tool failed \(exit code 3\): no such model$"):
        run_bounded(
            "tool", [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"], timeout_s=60
        )


# --- environments and the registry ---------------------------------------------------------


def test_an_environment_is_made_once_for_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pretend(name: str, argv: list[str], **_: object) -> None:
        commands.append(argv)
        if name == "venv":
            Path(argv[-1]).mkdir()

    monkeypatch.setattr(environment, "CACHE", tmp_path / "peers")
    monkeypatch.setattr(environment, "run_bounded", pretend)
    said: list[str] = []
    for requirements in (["aiohttp==1"], ["aiohttp==1"], ["aiohttp==2"]):
        environment.make_environment("aiohttp", requirements, said.append)
    assert [argv[-1] for argv in commands if "pip" in argv] == ["aiohttp==1", "aiohttp==2"]
    assert len(said) == 2


def test_an_environment_whose_installation_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def fail_first(name: str, argv: list[str], **_: object) -> None:
        if name == "venv":
            Path(argv[-1]).mkdir()
        else:
            tries.append(argv[-1])
            if len(tries) == 1:
                raise RunError("pip failed")

    monkeypatch.setattr(environment, "CACHE", tmp_path)
    monkeypatch.setattr(environment, "run_bounded", fail_first)
    with pytest.raises(RunError, match="pip failed"):
        environment.make_environment("x", ["x==1"], lambda _: None)
    environment.make_environment("x", ["x==1"], lambda _: None)
    assert tries == ["x==1", "x==1"]


class Missing(Wrk):
    """A peer that is not there."""

    def absent(self) -> str | None:
        return "not on the PATH (apt install it)"


class Broken(Wrk):
    """A peer that cannot be set up."""

    def set_up(self, progress: Progress) -> None:
        raise RunError("pip failed")


def test_peers_that_cannot_run_are_skipped_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Wrk(name="there")
    monkeypatch.setattr(Wrk, "absent", lambda self: None)
    monkeypatch.setattr(peers, "PEERS", (Missing(name="missing"), Broken(name="broken"), there))
    said: list[str] = []
    assert peers.ready_peers("kserve-http", said.append) == [there]
    assert said == ["missing is skipped: not on the PATH (apt install it)", "broken is skipped: pip failed"]
    assert peers.ready_peers("kserve-grpc", said.append) == []


@pytest.mark.load
@pytest.mark.parametrize(
    ("peer", "arrivals"),
    [
        pytest.param(Wrk(), "closed", id="wrk"),
        pytest.param(Hey(), "closed", id="hey, closed"),
        pytest.param(Hey(), "constant", id="hey, at a rate"),
        pytest.param(H2Load(), "closed", id="h2load, closed"),
        pytest.param(H2Load(), "constant", id="h2load, at a rate"),
    ],
)
def test_the_peers_that_need_no_installation_really_run(peer: Peer, arrivals: Arrivals) -> None:
    nginx, cpus = find_nginx(), sorted(os.sched_getaffinity(0))
    if nginx is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    if shutil.which(peer.name) is None:
        pytest.skip(peer.absent() or "")
    rate_qps = None if arrivals == "closed" else 100.0
    with NullServer(nginx, cpus[:1]) as server:
        result = peer.run(http_target(server.url), Load(arrivals, rate_qps, 2, 1, cpus[-1:]))
    assert result.errors == 0
    assert result.completed > 50
    assert 0.5 < result.duration_s < 2
    assert rate_qps is None or result.rate_qps <= 1.1 * rate_qps


# --- the chat stub ------------------------------------------------------------------------


def test_the_chat_stub_is_a_queue_that_speaks_openai() -> None:
    protocol: PeerProtocol = "openai"
    assert {peer.name for peer in peers.PEERS if peer.protocols == {protocol}} == {"aiperf", "guidellm"}
    with OpenAIStub(sorted(os.sched_getaffinity(0))[:1], StubOptions(service=Service(kind="constant", mean_ms=150))) as stub:
        connections = [http.client.HTTPConnection(stub.target.address) for _ in range(2)]
        for connection in connections:  # both arrive at once: the second waits for the first
            connection.request("POST", PATH, BODY, dict(stub.target.headers))
        replies = [connection.getresponse() for connection in connections]
        documents = [json.loads(reply.read()) for reply in replies]
        assert [reply.status for reply in replies] == [200, 200]
        # What the OpenAI API reference requires of a chat completion.
        for document in documents:
            assert document["object"] == "chat.completion"
            assert document["choices"][0]["message"] == {"role": "assistant", "content": "Hi"}
            assert document["usage"]["total_tokens"] == 2

        connections[0].request("GET", "/stub/stamps")
        stamps = json.loads(connections[0].getresponse().read())
        arrivals, due = stamps["arrival_ns"], stamps["due_ns"]
        assert due[0] == arrivals[0] + 150_000_000
        assert due[1] == due[0] + 150_000_000

        connections[0].request("POST", PATH, json.dumps(json.loads(BODY) | {"stream": True}))
        streamed = connections[0].getresponse()
        events = [line.removeprefix("data: ") for line in streamed.read().decode().split("\n\n") if line]
        assert streamed.headers["content-type"] == "text/event-stream"
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["choices"][0]["delta"]["content"] == "Hi"

        connections[0].request("GET", "/v1/models")
        assert [model["id"] for model in json.loads(connections[0].getresponse().read())["data"]] == ["stub"]
        for connection in connections:
            connection.close()
        pid = stub.pid
    assert not psutil.pid_exists(pid)


HTTP, GRPC = "http://127.0.0.1:1", "grpc://127.0.0.1:1"


@pytest.mark.parametrize(
    ("url", "load", "asked"),
    [
        pytest.param(GRPC, Load("closed", None, CONNECTIONS, 2.0, [0]), [["--concurrency-range", "16"]], id="closed, gRPC"),
        pytest.param(HTTP, Load("closed", None, CONNECTIONS, 2.0, [0]), [["--concurrency-range", "4"]], id="closed, HTTP"),
        pytest.param(GRPC, Load("closed", None, 3, 2.0, [0]), [["--concurrency-range", "3"]], id="fewer are asked for"),
        pytest.param(
            HTTP,
            Load("poisson", 100.0, 512, 2.0, [0]),
            [["-a"], ["--sync", "--max-threads", "16"]],
            id="open loop, no ids echoed",
        ),
    ],
)
def test_perf_analyzer_has_as_many_connections_as_the_others_where_it_ends(
    url: str, load: Load, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def refuse(name: str, argv: list[str], **_: object) -> None:
        commands.append(argv)
        raise RunError("No valid requests recorded")

    monkeypatch.setattr(perf_analyzer, "run_bounded", refuse)
    with pytest.raises(RunError, match="No valid requests"):
        PerfAnalyzer().run(replace(http_target(HTTP), url=url), load)
    assert [argv[argv.index(words[0]) :][: len(words)] for argv, words in zip(commands, asked, strict=True)] == asked


def test_a_target_tells_its_address() -> None:
    assert Target("grpc://127.0.0.1:8001", "m", "/p", b"").address == "127.0.0.1:8001"
