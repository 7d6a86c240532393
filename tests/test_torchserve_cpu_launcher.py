"""TorchServe's CPU launcher: its arguments held to torch's own parser, what it lacks named, and what it does seen in /proc."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
from pydantic import ValidationError
from servebench_servers.models.digits import DIGITS
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.torchserve_cpu_launcher import (
    CpuLauncher,
    LauncherArgument,
    check_programs,
    inspect_workers,
    launcher_environment,
    plan_launcher,
)

from servebench.errors import LaunchError

CPUS = sorted(os.sched_getaffinity(0))
HAS_TORCHSERVE = importlib.util.find_spec("ts") is not None
RUN_CPU = "torch.backends.xeon.run_cpu"


# ---- which CPUs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "workers", "threads", "shares"),
    [
        pytest.param([0, 1], 2, 1, [[0], [1]], id="one each"),
        pytest.param([7, 2, 5, 3], 2, 2, [[2, 3], [5, 7]], id="two each, in ascending order as run_cpu takes them"),
        pytest.param([4, 5, 6], 1, 2, [[4, 5]], id="no more than are needed, or run_cpu starts several workers"),
    ],
)
def test_shares_are_those_that_run_cpu_hands_out(cpus: list[int], workers: int, threads: int, shares: list[list[int]]) -> None:
    launcher = plan_launcher(cpus, workers=workers, threads=threads)
    assert launcher.shares == shares
    assert len(launcher.cpus) // launcher.threads == workers  # how run_cpu counts, whatever --ninstances says


def test_too_few_cpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(LaunchError, match=r"3 workers of 2 torch_threads need 6 CPUs, the server has 4; lower workers"):
        plan_launcher([0, 1, 2, 3, 3, 3], workers=3, threads=2)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_torchs_own_parser_understands_every_argument() -> None:
    """As TorchServe puts them together for the second of two workers."""
    run_cpu = pytest.importorskip(RUN_CPU)
    parser = argparse.ArgumentParser()
    run_cpu.create_args(parser)
    words = plan_launcher([0, 1], workers=2, threads=1, extra=get_args(LauncherArgument)).arguments.split(" ")
    read = parser.parse_args([*words, "--ninstances", "2", "--rank", "1", "worker.py", "--sock-type", "unix"])
    assert (read.core_list, read.ncores_per_instance, read.ninstances, read.rank) == ("0,1", 1, 2, 1)
    assert (read.program, read.program_args) == ("worker.py", ["--sock-type", "unix"])
    asked_for = ("disable_numactl", "disable_iomp", "enable_tcmalloc", "enable_jemalloc", "use_default_allocator")
    assert all(getattr(read, name) is True for name in asked_for) and len(asked_for) == len(get_args(LauncherArgument))
    assert not read.disable_taskset and not read.multi_instance and read.node_id == -1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"cpu_launcher_args": ["--disable_iomp"]}, "are of no use without cpu_launcher", id="arguments alone"),
        pytest.param({"cpu_launcher": True, "cpu_launcher_args": ["--node_id 0"]}, "'--disable_numactl', ", id="unknown"),
        pytest.param(
            {"cpu_launcher": True, "cpu_launcher_args": ["--enable_tcmalloc", "--enable_jemalloc"]},
            "one allocator, found --enable_jemalloc, --enable_tcmalloc",
            id="two allocators",
        ),
        pytest.param({"cpu_launcher": True, "container": {"image": "x"}}, "does not go with container", id="in a container"),
    ],
)
def test_options_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TorchServeOptions.model_validate(settings)


# ---- what it needs -------------------------------------------------------------------------


def test_programs_that_are_missing_are_named() -> None:
    present = {"python", "hostname", "lscpu", "taskset"}
    check_programs(lambda name: name if name in present else None)
    check_programs(lambda name: name if name in present - {"taskset"} | {"numactl"} else None)
    with pytest.raises(
        LaunchError, match=r"there is no hostname, taskset or numactl on the PATH.*or set cpu_launcher to false"
    ):
        check_programs(lambda name: name if name in present - {"hostname", "taskset"} else None)


def test_the_environment_has_this_python_first_and_nothing_that_overrides_run_cpu() -> None:
    env = launcher_environment({"PATH": "/elsewhere", "OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "2", "KEPT": "yes"})
    assert env == {"PATH": f"{Path(sys.executable).parent}:/elsewhere", "KEPT": "yes"}
    assert launcher_environment({}) == {"PATH": str(Path(sys.executable).parent)}


# ---- what the kernel says of it ------------------------------------------------------------


@pytest.fixture
def pinned() -> Iterator[subprocess.Popen[bytes]]:
    """A process on our first CPU, with three OpenMP threads."""
    env = {**os.environ, "OMP_NUM_THREADS": "3"}
    code = f"import os; os.sched_setaffinity(0, [{CPUS[0]}]); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_workers_are_described_as_the_kernel_does(pinned: subprocess.Popen[bytes]) -> None:
    found = inspect_workers(CpuLauncher((CPUS[0],), 1), [pinned.pid])
    assert found == [{"pid": pinned.pid, "cpus": [CPUS[0]], "omp_num_threads": 3, "libraries": []}]


def test_workers_elsewhere_or_without_their_library_are_refused(pinned: subprocess.Popen[bytes]) -> None:
    with pytest.raises(LaunchError, match=rf"run on CPUs \[\[{CPUS[0]}\]\], not on \[\[4095\]\].*or set cpu_launcher to false"):
        inspect_workers(CpuLauncher((4095,), 1), [pinned.pid])
    with pytest.raises(LaunchError, match=r"--enable_jemalloc, but run_cpu found no libjemalloc.so"):
        inspect_workers(CpuLauncher((CPUS[0],), 1, ("--enable_jemalloc",)), [pinned.pid])
    with pytest.raises(LaunchError, match="cannot be looked at: No such file or directory"):
        inspect_workers(CpuLauncher((CPUS[0],), 1), [-1])  # TorchServe's word for a process it does not know


# ---- the real server -----------------------------------------------------------------------


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(not HAS_TORCHSERVE, reason="needs the torchserve wheel")
@pytest.mark.torchserve
def test_each_worker_of_a_real_torchserve_has_cpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On at most two of our CPUs, from the end; all of it ends with the server, sessions of run_cpu's included."""
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    cpus = CPUS[-2:]
    options = TorchServeOptions(cpu_launcher=True, workers=len(cpus), cpus=cpus)
    server = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        leader = psutil.Process(server.describe()["pid"])
        processes = [leader, *leader.children(recursive=True)]
        workers = [one for one in processes if one.parent() != leader and one != leader]
        assert all(os.getsid(one.pid) == one.pid != leader.pid for one in workers)
        assert sorted(one.cpu_affinity() for one in workers) == [[cpu] for cpu in cpus]
        assert [one.environ()["OMP_NUM_THREADS"] for one in workers] == ["1"] * len(cpus)
        assert leader.cpu_affinity() == cpus

        facts = server.describe()["cpu_launcher"]
        assert facts["args"] == f"--core_list {','.join(map(str, cpus))} --ncores_per_instance 1"
        assert {one["pid"]: (one["cpus"], one["omp_num_threads"]) for one in facts["workers"]} == {
            one.pid: (one.cpu_affinity(), 1) for one in workers
        }
        (properties,) = [path.read_text() for path in server.config_files() if path.name == "config.properties"]
        assert f"cpu_launcher_enable=true\ncpu_launcher_args={facts['args']}\n" in properties

        with np.load(DIGITS.folder / "heldout.npz") as heldout, np.load(DIGITS.folder / "golden.npz") as golden:
            image, logits = heldout["IMAGE"][:1], golden["LOGITS"][:1]
        request = urllib.request.Request(
            f"{server.urls['http']}/predictions/digits", image.tobytes(), {"Content-Type": "application/octet-stream"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            np.testing.assert_allclose(np.frombuffer(reply.read(), "<f4").reshape(1, 10), logits, rtol=1e-3, atol=1e-4)
    finally:
        server.stop()
    assert not any(alive(one) for one in processes)
