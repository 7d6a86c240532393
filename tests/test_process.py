"""ServerProcess: what it starts it can end, whatever the server does, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import is_gone, until
from servebench_servers.host import free_port
from servebench_servers.process import ServerProcess

from servebench.errors import LaunchError

IGNORES_SIGINT = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("up", flush=True)
while True: time.sleep(60)
"""
HEARS_SIGINT = IGNORES_SIGINT.replace("SIG_IGN", "SIG_DFL")
IGNORES_ALL = IGNORES_SIGINT.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint")
# A leader that starts a stubborn child in another process group, says its id, and (given "die") ends.
HAS_CHILD = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {IGNORES_ALL!r}], process_group=0)
print(child.pid, flush=True)
if sys.argv[1] == "stay":
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    started = []

    def start_python(code: str, *args: str, **options: object) -> ServerProcess:
        argv = [sys.executable, "-c", code, *args]
        process = ServerProcess("thing", argv, tmp_path / "server.log", **options)  # type: ignore[arg-type]
        started.append(process)
        return process

    yield start_python
    for process in started:
        process.stop(grace_s=0)


def test_runs_as_leader_of_its_own_session_with_both_streams_in_the_log(start):
    process = start("import os, sys; print(os.getpid(), os.getsid(0)); print('oops', file=sys.stderr); sys.exit(7)")
    until(lambda: process.exit_code() is not None)
    assert process.exit_code() == 7
    assert set(process.log_tail().splitlines()) == {f"{process.pid} {process.pid}", "oops"}
    assert process.pid != os.getsid(0)


def test_exit_code_of_a_killed_server_is_the_negative_signal_also_after_stop(start):
    process = start("import time; time.sleep(60)")
    assert process.exit_code() is None
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: process.exit_code() is not None)
    assert process.exit_code() == -signal.SIGKILL
    process.stop()
    process.stop()
    assert process.exit_code() == -signal.SIGKILL


def test_log_tail_gives_the_last_lines_and_survives_bad_bytes(start):
    code = "import sys\nfor i in range(20000): print('line', i)\nsys.stdout.flush()\nsys.stdout.buffer.write(b'\\xff end')"
    process = start(code)
    until(lambda: process.exit_code() is not None)
    assert process.log_tail(lines=3).splitlines() == ["line 19998", "line 19999", "\ufffd end"]
    assert len(process.log_tail().splitlines()) == 20


def test_wait_ready_returns_as_soon_as_the_probe_says_so(start):
    process = start("print('ready', flush=True); import time; time.sleep(60)")
    process.wait_ready(lambda: "ready" in process.log_tail(), deadline_s=10)
    assert process.exit_code() is None


def test_wait_ready_of_a_dead_server_raises_at_once_with_cause_and_log_tail(start):
    process = start("import sys; print('first', flush=True); sys.exit('no model called resnet')")
    with pytest.raises(LaunchError, match=r"^thing ended \(exit code 1\) before it was ready: no model") as caught:
        process.wait_ready(lambda: False, deadline_s=60)
    assert caught.value.log_tail == "first\nno model called resnet"


def test_wait_ready_names_the_signal_that_ended_the_server(start):
    process = start("import os; os.kill(os.getpid(), 11)")
    with pytest.raises(LaunchError, match=r"SIGSEGV.*it wrote nothing"):
        process.wait_ready(lambda: False, deadline_s=60)


def test_wait_ready_of_a_slow_server_raises_in_time_and_stops_it(start):
    process = start("print('loading', flush=True); import time; time.sleep(60)")
    until(lambda: process.log_tail() == "loading")
    with pytest.raises(LaunchError, match=r"^thing was not ready within 0.05 s$") as caught:
        process.wait_ready(lambda: False, deadline_s=0.05)
    assert caught.value.log_tail == "loading"
    assert process.exit_code() is not None


def test_an_exception_from_the_probe_passes_and_stops_the_server(start):
    process = start("import time; time.sleep(60)")

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.wait_ready(interrupted, deadline_s=60)
    assert process.exit_code() is not None


@pytest.mark.parametrize(
    ("code", "signal_number"),
    [
        pytest.param(HEARS_SIGINT, 2, id="sigint"),
        pytest.param(IGNORES_SIGINT, 15, id="sigterm-when-sigint-is-ignored"),
        pytest.param(IGNORES_ALL, 9, id="sigkill-when-both-are-ignored"),
    ],
)
def test_stop_escalates_until_the_server_ends(start, code, signal_number):
    process = start(code)
    process.wait_ready(lambda: process.log_tail() == "up", deadline_s=10)
    process.stop(grace_s=0.1)
    assert process.exit_code() == -signal_number
    assert is_gone(process.pid)


def test_sigterm_is_given_a_second_and_not_the_grace_of_sigint(start):
    process = start(IGNORES_ALL)
    process.wait_ready(lambda: process.log_tail() == "up", deadline_s=10)
    started_s = time.monotonic()
    process.stop(grace_s=4)
    assert 5 <= time.monotonic() - started_s < 7.5


@pytest.mark.parametrize("leader", ["stay", "die"])
def test_stop_ends_children_of_the_session_whether_or_not_the_leader_lives(start, leader):
    process = start(HAS_CHILD, leader)
    until(lambda: "up" in process.log_tail())
    child = int(process.log_tail().splitlines()[0])
    if leader == "die":
        until(lambda: process.exit_code() == 0)
    assert not is_gone(child)
    process.stop(grace_s=0.05)
    assert is_gone(child)


def test_stop_ends_children_in_sessions_of_their_own(start):
    """As torch's launchers start their workers; the leader ends by itself, nothing of its session is left."""
    process = start(HAS_CHILD.replace("process_group=0", "start_new_session=True"), "die")
    until(lambda: "up" in process.log_tail() and process.exit_code() == 0)
    child = int(process.log_tail().splitlines()[0])
    assert os.getsid(child) == child and not is_gone(child)
    process.stop(grace_s=0.05)
    assert is_gone(child)


def test_children_are_not_taken_for_another_servers(start):
    first = start(HAS_CHILD.replace("process_group=0", "start_new_session=True"), "stay")
    until(lambda: "up" in first.log_tail())
    child = int(first.log_tail().splitlines()[0])
    second = start(HEARS_SIGINT)
    second.stop(grace_s=5)
    assert not is_gone(child) and first.exit_code() is None


def test_orphans_get_no_grace_of_their_leaders(start):
    process = start(HAS_CHILD, "die")
    until(lambda: "up" in process.log_tail() and process.exit_code() == 0)
    started_s = time.monotonic()
    process.stop(grace_s=60)
    assert time.monotonic() - started_s < 20


def test_a_leader_that_is_left_alone_gets_less_grace(start):
    """Its only child hears SIGINT, it does not, and has nothing to do any more."""
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {HEARS_SIGINT!r}])
print(child.pid, flush=True)
while True: time.sleep(60)
"""
    process = start(code)
    until(lambda: "up" in process.log_tail())
    child = int(process.log_tail().splitlines()[0])
    process.alone_grace_s = 0.1
    started_s = time.monotonic()
    process.stop(grace_s=60)
    assert time.monotonic() - started_s < 20
    assert process.exit_code() == -signal.SIGTERM and is_gone(child)


def test_a_server_started_where_sigint_is_ignored_hears_it_nevertheless(start):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for background jobs
    try:
        process = start("print('up', flush=True); import time; time.sleep(60)")
    finally:
        signal.signal(signal.SIGINT, before)
    process.wait_ready(lambda: process.log_tail() == "up", deadline_s=10)
    process.stop(grace_s=30)
    assert "KeyboardInterrupt" in process.log_tail()


def test_the_server_dies_when_its_parent_is_killed(tmp_path):
    code = """
import pathlib, sys, time
from servebench_servers.process import ServerProcess
server = ServerProcess("thing", [sys.executable, "-c", sys.argv[2]], pathlib.Path(sys.argv[1]))
server.wait_ready(lambda: server.log_tail() == "up", 10)
print(server.pid, flush=True)
time.sleep(60)
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "server.log"), IGNORES_ALL]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        assert not is_gone(server)
        parent.kill()
    until(lambda: is_gone(server))


def test_cpus_pin_the_server(start):
    cpu = max(os.sched_getaffinity(0))
    process = start("import os; print(os.sched_getaffinity(0))", cpus=[cpu])
    until(lambda: process.exit_code() == 0)
    assert process.log_tail() == f"{{{cpu}}}"


def test_a_cpu_that_does_not_exist_is_named(start):
    process = start("print('never')", cpus=[4095])
    with pytest.raises(LaunchError) as caught:
        process.wait_ready(lambda: False, deadline_s=10)
    assert "cannot run on CPUs 4095" in caught.value.log_tail


def test_a_missing_command_is_named(tmp_path):
    with pytest.raises(LaunchError, match="no command 'tritonserver-x'"):
        ServerProcess("triton", ["tritonserver-x"], tmp_path / "log")


def test_starting_from_another_thread_is_refused(tmp_path):
    refusals = []

    def start_there() -> None:
        try:
            ServerProcess("thing", [sys.executable], tmp_path / "log")
        except RuntimeError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=start_there)
    thread.start()
    thread.join()
    assert "main thread" in refusals[0]


def test_free_port_can_be_bound():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
