"""``servebench serve``: what it tells of a server that it keeps up, the commands it prints, and what is left: nothing."""

import asyncio
import contextlib
import importlib.util
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e import start_command
from rich.console import Console

from servebench.control.base import Activity
from servebench.engine import serving
from servebench.engine.hosting import interrupting
from servebench.engine.run_lines import run_lines
from servebench.engine.serving import LogErrors, ServingStatus, Watch
from servebench.errors import TransportError
from servebench.profile import load_profile
from servebench.report.serving import ServingView, format_uptime, status_parts

needs_triton = pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="needs the nvidia-pytriton wheel")
needs_torchserve = pytest.mark.skipif(importlib.util.find_spec("ts") is None, reason="needs the torchserve wheel")


# ---- what a look finds ---------------------------------------------------------------------


class Scripted:
    """A control plane that answers what it is told."""

    def __init__(self, answers: Sequence[Activity | TransportError]) -> None:
        self._answers = list(answers)

    async def activity(self, model: str, version: str | None = None) -> Activity:
        answer = self._answers.pop(0)
        if isinstance(answer, TransportError):
            raise answer
        return answer


def looks(
    answers: Sequence[Activity | TransportError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, every_s: float = 2.0
) -> list[ServingStatus]:
    """One status for each answer, ``every_s`` apart."""
    log = tmp_path / "server.log"
    log.touch()
    clock = {"now": 1_000_000_000}
    monkeypatch.setattr(serving, "now_ns", lambda: clock["now"])

    async def main() -> list[ServingStatus]:
        watch = Watch(Scripted(answers), "m", log)  # type: ignore[arg-type]
        found = []
        for _ in answers:
            found.append(await watch.look())
            clock["now"] += round(every_s * 1e9)
        return found

    return asyncio.run(main())


BUSY = Activity(True, requests=100, failed=1, inferences=800, executions=100, queued=100, queue_ns=1_000_000, pending=3)


def test_rates_and_means_are_those_since_the_look_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(BUSY, requests=600, inferences=2_800, executions=200, queued=600, queue_ns=21_000_000, pending=0)
    first, second, idle = looks([BUSY, later, later], tmp_path, monkeypatch)
    assert (first.requests, first.pending, first.requests_qps, first.queue_ns, first.batch_size) == (100, 3, None, None, None)
    assert (second.requests_qps, second.queue_ns, second.batch_size) == (250.0, 40_000.0, 20.0)
    assert (idle.requests_qps, idle.queue_ns, idle.batch_size) == (0.0, None, None)
    assert [one.uptime_s for one in (first, second, idle)] == [0.0, 2.0, 4.0]


def test_counters_that_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's statistics are those of a model since it was loaded."""
    again = replace(BUSY, requests=40, inferences=40, executions=20, queued=40, queue_ns=800)
    _, second = looks([BUSY, again], tmp_path, monkeypatch)
    assert (second.requests, second.requests_qps, second.batch_size, second.queue_ns) == (40, 20.0, 2.0, 20.0)


def test_a_server_that_does_not_answer_is_not_ready_and_the_reason_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = looks([BUSY, TransportError("cannot be reached"), BUSY], tmp_path, monkeypatch)
    assert (first.ready, first.error, first.error_age_s) == (True, None, None)
    assert (second.ready, second.requests, second.error, second.error_age_s) == (False, None, "cannot be reached", 0.0)
    assert (third.ready, third.requests_qps, third.error, third.error_age_s) == (True, None, "cannot be reached", 2.0)


def test_a_server_that_says_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, status = looks([Activity(True), Activity(True)], tmp_path, monkeypatch)
    assert status_parts(status) == ["ready", "up 0:00:02"]


# As the servers write them.
TRITON = "E1122 07:30:48.994276 3797 model_repository_manager.cc:1460] \"Poll failed for model directory 'digits': too large\""
TORCHSERVE = "2026-11-22T04:49:28,424 [ERROR] W-9000-digits_1.0 org.pytorch.serve.wlm.WorkerThread - Number or consecutive"
WORKER = "2026-11-22T04:49:28,424 [INFO ] W-9000-digits_1.0-stdout MODEL_LOG - "


@pytest.mark.parametrize(
    ("added", "newest"),
    [
        pytest.param("", None, id="nothing new"),
        pytest.param("I1122 07:30:48.99 3797 a.cc:1] no ERROR at all\n", None, id="no error"),
        pytest.param(f"{TRITON}\n", "Poll failed for model directory 'digits': too large", id="Triton"),
        pytest.param(f"{TORCHSERVE}\nmore\n", "Number or consecutive", id="TorchServe"),
        pytest.param(f"{WORKER}ValueError: no weights\n{WORKER}done\n", "ValueError: no weights", id="a worker"),
        pytest.param("RuntimeError: later\nValueError: latest\n", "ValueError: latest", id="the last of two"),
        pytest.param("RuntimeError: half a li", None, id="a line that is being written"),
    ],
)
def test_errors_in_the_log(tmp_path: Path, added: str, newest: str | None) -> None:
    log = tmp_path / "server.log"
    log.write_text("RuntimeError: before it was ready\n")
    errors = LogErrors(log)
    with log.open("a") as file:
        file.write(added)
    assert errors.newest() == newest
    assert errors.newest() is None
    with log.open("a") as file:
        file.write("ne, and its end\n")
    assert errors.newest() == ("RuntimeError: half a line, and its end" if "half" in added else None)


def test_a_log_that_floods_is_not_read_whole(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.touch()
    errors = LogErrors(log)
    log.write_bytes(b"ValueError: early\n" + b"x" * 99 + b"\n" * 100_000 + b"ValueError: \xff late\n")
    assert errors.newest() == "ValueError: � late"


# ---- what is shown -------------------------------------------------------------------------

STATUS = ServingStatus(3725.4, True, 12_345, 250.0, 2, 3, 420_000.0, 2.34, None, None, None)


def test_the_status_in_words() -> None:
    parts = ["ready", "12,345 requests", "250/s", "2 failed", "3 pending", "queue 420 us", "batch 2.3", "up 1:02:05"]
    assert status_parts(STATUS) == parts
    workers = replace(STATUS, ready=False, workers=("READY", "UNLOADING"))
    assert status_parts(workers)[:2] == ["not ready", "workers READY, UNLOADING"]
    assert format_uptime(59.9) == "0:00:59"


def shown(statuses: Sequence[ServingStatus], *, terminal: bool) -> str:
    out = io.StringIO()
    with ServingView("m", console=Console(file=out, force_terminal=terminal, width=100, color_system=None)) as view:
        for status in statuses:
            view.show(status)
    return out.getvalue()


def test_a_terminal_sees_every_status_and_the_last_error() -> None:
    text = shown([STATUS, replace(STATUS, requests=12_600, error="[no] luck", error_age_s=61.0)], terminal=True)
    assert "● ready  m  12,345 requests" in text and "12,600 requests" in text
    assert "last error (0:01:01 ago): [no] luck" in text


def test_without_a_terminal_a_line_says_what_changed() -> None:
    failing = replace(STATUS, uptime_s=3727, ready=False, error="no luck")
    statuses = [
        STATUS,
        replace(STATUS, uptime_s=3726),
        failing,
        replace(failing, uptime_s=3728),
        replace(failing, uptime_s=3790),
    ]
    first, second, third = shown(statuses, terminal=False).splitlines()
    assert first.startswith("servebench: m ready, 12,345 requests, ") and first.endswith("up 1:02:05")
    assert second.startswith("servebench: m not ready, ") and second.endswith("; last error: no luck")
    assert third.endswith("up 1:03:10")


# ---- commands to paste ---------------------------------------------------------------------


class Server:
    """As much of a running server as the commands need."""

    def __init__(self, urls: dict[str, str], tokens: dict[str, str] | None = None) -> None:
        self.urls, self.tokens = urls, tokens or {}

    def describe(self) -> dict[str, Any]:
        return {"key_file": "/tmp/a b/key_file.json"}


KSERVE = {"http": "http://127.0.0.1:1", "grpc": "grpc://127.0.0.1:2", "metrics": "http://127.0.0.1:3/metrics"}
TORCH = {**KSERVE, "management": "http://127.0.0.1:4"}


def loaded(line: str) -> Any:
    """The profile that a command names, with its overrides."""
    words = shlex.split(line)
    assert words[:2] == ["servebench", "run"]
    assert set(words[3::2]) == {"--set"}
    return load_profile(words[2], words[4::2])


@pytest.mark.parametrize("model", ["digits", "mine", "1", "a: b", "{x}"])
@pytest.mark.parametrize("urls", [pytest.param(KSERVE, id="both"), pytest.param({"grpc": KSERVE["grpc"]}, id="gRPC alone")])
def test_commands_for_a_triton(urls: dict[str, str], model: str) -> None:
    lines = run_lines("triton", Server(urls), model)  # type: ignore[arg-type]
    wanted = [framing for framing in ("http", "grpc") if framing in urls]
    assert len(lines) == len(wanted)
    for line, framing in zip(lines, wanted, strict=True):
        if model == "digits":
            assert line == f"servebench run digits-triton-{framing} --set 'server={{url: {urls[framing]}}}'"
        profile = loaded(line)
        assert (profile.server.url, profile.endpoint.protocol) == (urls[framing], f"kserve-{framing}")
        assert profile.endpoint.model == model
        assert profile.samples.source == ("npz" if model == "digits" else "random")


def test_commands_for_a_torchserve() -> None:
    server = Server(TORCH)
    for line, framing in zip(run_lines("torchserve", server, "digits"), ("http", "grpc"), strict=True):  # type: ignore[arg-type]
        profile = loaded(line)
        assert profile.name == f"digits-torchserve-{framing}"
        assert (profile.server.url, profile.server.management_url) == (TORCH[framing], TORCH["management"])
    for line, framing in zip(run_lines("torchserve", server, "dlrm"), ("http", "grpc"), strict=True):  # type: ignore[arg-type]
        endpoint = loaded(line).endpoint
        assert (endpoint.model, endpoint.protocol) == ("dlrm", f"torchserve-{framing}")
        assert endpoint.body == ("multipart" if framing == "http" else "raw")
    assert run_lines("torchserve", server, "mine") == []  # type: ignore[arg-type]
    assert run_lines("somebody's", server, "digits") == []  # type: ignore[arg-type]


def test_commands_for_a_server_with_tokens_hold_none() -> None:
    server = Server(TORCH, {"inference": "secret", "management": "secret"})
    for line in run_lines("torchserve", server, "digits"):  # type: ignore[arg-type]
        assert "secret" not in line
        assert line.startswith('SERVEBENCH_TOKEN="$(python3 -c ') and "'/tmp/a b/key_file.json')\" servebench run " in line
        assert line.endswith(" --set endpoint.bearer_token_env=SERVEBENCH_TOKEN")


# ---- signals -------------------------------------------------------------------------------


def test_signals_unwind_unless_they_are_ignored() -> None:
    with pytest.raises(KeyboardInterrupt), interrupting(signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupting(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- the command ---------------------------------------------------------------------------


class Served:
    """A ``servebench serve`` that says it is ready; what it printed until then, and its processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        assert process.stdout is not None
        while not (self.said and "servebench run " in self.said[-1]):
            self.said.append(process.stdout.readline())
            assert self.said[-1], process.communicate()
        self.processes = psutil.Process(process.pid).children(recursive=True)

    @property
    def command(self) -> str:
        """The first of the commands to paste."""
        return self.said[-1].strip()

    def hear(self, words: str) -> str:
        """Read stderr until it says ``words``."""
        assert self.process.stderr is not None
        text = ""
        while words not in text:
            line = self.process.stderr.readline()
            assert line, text
            text += line
        return text

    def end(self, number: int) -> str:
        """Send a signal; what it said on stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=30)
        return err


@contextlib.contextmanager
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Iterator[Served]:
    """A served model whose temporary files are all in ``tmp_path / "t"``."""
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    process = start_command("serve", *arguments, cwd=tmp_path)
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def nothing_is_left(one: Served, tmp_path: Path) -> None:
    assert not any(alive(process) for process in one.processes)
    assert list((tmp_path / "t").iterdir()) == []
    assert list(Path("/dev/shm").glob(f"servebench-{one.process.pid}-*")) == []


def paste(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a printed command in a shell, for a second."""
    load = "{target_qps: 50, min_duration_s: 1, min_query_count: 50, warmup_s: 0}"
    return subprocess.run(
        ["bash", "-c", f"{command} --set 'load={load}' --set 'constraints=[p50 <= 1s]'"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "terminal closed"])
def test_serving_ends_with_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with served(tmp_path, monkeypatch, "stub", "--model", "toy") as one:
        assert "--set name=toy " in one.command
        assert re.search(r"^server  stub [\d.]+; constant, mean 2 ms; one server, first come", "".join(one.said), re.MULTILINE)
        err = one.end(number)
        assert one.process.returncode == 0, err
        assert err.splitlines()[0] == "servebench: starting stub" and err.splitlines()[-1] == "servebench: stopping stub"
        nothing_is_left(one, tmp_path)


def test_a_server_that_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, monkeypatch, "stub", "--model", "a/b") as one:
        (stub,) = one.processes
        stub.kill()
        _, err = one.process.communicate(timeout=30)
        assert one.process.returncode == 1
        *_, error = err.splitlines()
        found = re.fullmatch(
            r"servebench: error: the server ended by itself \(exit -9\); log: (servebench-stub-a-b-\d{8}-\d{6}\.log)", error
        )
        assert found and "listen" in (tmp_path / found[1]).read_text()
        nothing_is_left(one, tmp_path)


def test_a_server_that_ends_by_itself_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, monkeypatch, "stub", "--dir", "here") as one:
        (stub,) = one.processes
        stub.kill()
        _, err = one.process.communicate(timeout=30)
        assert err.splitlines()[-1].endswith("(exit -9); log: here/stub.log")
        assert list(tmp_path.glob("*.log")) == []


@needs_triton
@pytest.mark.triton
def test_serving_triton_and_pasting_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, monkeypatch, "triton", "--model", "digits") as one:
        said = " ".join("".join(one.said).split())
        threads = r"; 1 process x 1 torch thread on \d+ CPUs?"
        device = rf"(?:cpu \(auto: .*\), fp32{threads}|cuda\S* \(auto: .*\), fp32)"
        assert re.search(rf" server triton [\d.]+ on {device}; weights: shipped, trained on scikit-learn digits", said)
        done = paste(one.command, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(one.processes) >= 2
        one.process.send_signal(signal.SIGTERM)
        err = one.hear("servebench: stopping triton")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # impatience is of no use
            one.process.send_signal(number)
        one.process.communicate(timeout=30)
        assert one.process.returncode == 0, err
        assert "servebench: digits ready, " in err
        nothing_is_left(one, tmp_path)


@needs_triton
@pytest.mark.triton
def test_a_signal_while_triton_starts_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    process = start_command("serve", "triton", "--model", "digits", cwd=tmp_path)
    try:
        while not any(log.stat().st_size for log in (tmp_path / "t").rglob("triton.log")):
            assert process.poll() is None
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert started and not any(alive(one) for one in started)
    assert list((tmp_path / "t").iterdir()) == []
    assert list(Path("/dev/shm").glob(f"servebench-{process.pid}-*")) == []


@needs_torchserve
@pytest.mark.torchserve
def test_serving_torchserve_with_tokens_and_pasting_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, monkeypatch, "torchserve", "--model", "digits", "--set", "token_auth=true") as one:
        done = paste(one.command, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        err = one.end(signal.SIGINT)
        assert one.process.returncode == 0, err
        nothing_is_left(one, tmp_path)
