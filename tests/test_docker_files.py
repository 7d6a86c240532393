"""The images and compose files of docker/, and the script for GPU hosts: structure, pins, words that programs accept.

No container engine runs here. What can be held without one is: that files they name exist, ports
stay on loopback, versions are pinned, and that each command line fits the program it is for.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from servebench_servers.container import ContainerOptions
from servebench_servers.torchserve_container import torchserve_container
from servebench_servers.triton_container import triton_container
from servebench_servers.triton_install import find_installation

from servebench.engine.hosting import launcher_options
from servebench.profile import load_profile

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
COMPOSE = sorted(DOCKER.glob("compose.*.yaml"))
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PINNED = r"[\w./-]+:[\w.-]*\d[\w.-]*"  # a tag with a number; "latest" has none
PORT = r"127\.0\.0\.1:\d+:\d+"

#: The part of the compose specification that these files use; a key that is not in it is most likely misspelt.
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context", "dockerfile"],
            "properties": {"context": {"type": "string"}, "dockerfile": {"type": "string"}, "args": {"type": "object"}},
        },
        "image": {"type": "string", "pattern": f"^{PINNED}$"},
        "extends": {"type": "object", "required": ["file", "service"]},
        "command": {"type": "array", "items": {"type": "string"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": f"^{PORT}$"}},
        "volumes": {"type": "array", "items": {"type": "string"}},
        "depends_on": {"type": "object", "additionalProperties": {"properties": {"condition": {"const": "service_healthy"}}}},
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test", "interval", "timeout", "retries", "start_period"],
            "properties": {
                "test": {"type": "array", "minItems": 2, "prefixItems": [{"enum": ["CMD", "CMD-SHELL"]}]},
                "interval": {"pattern": "^[0-9]+s$"},
                "timeout": {"pattern": "^[0-9]+s$"},
                "start_period": {"pattern": "^[0-9]+s$"},
                "retries": {"type": "integer"},
            },
        },
        "deploy": {"type": "object"},
        "shm_size": {"type": "string", "pattern": "^[0-9]+[kmg]b$"},
        "stop_signal": {"enum": ["SIGINT", "SIGTERM"]},
        "stop_grace_period": {"type": "string", "pattern": "^[0-9]+s$"},
        "cpuset": {"type": "string"},
        "ulimits": {"type": "object"},
        "user": {"type": "string"},
    },
}
FILE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "properties": {"services": {"type": "object", "additionalProperties": SERVICE}},
}


def services(path: Path) -> dict[str, dict[str, Any]]:
    """A compose file's services, with what they extend put in."""
    own: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
    for service in own.values():
        if "extends" in service:
            base = services(path.parent / service["extends"]["file"])[service["extends"]["service"]]
            service.update({key: value for key, value in base.items() if key not in service})
    return own


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_there_is_something_to_check() -> None:
    assert {path.name for path in COMPOSE} >= {
        f"compose.{name}.yaml" for name in ("client", "torchserve", "triton-cpu", "triton-gpu")
    }
    assert {path.name for path in DOCKERFILES} == {f"{name}.Dockerfile" for name in ("client", "torchserve", "triton")}


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.stem)
def test_compose_files_are_of_the_form_and_name_files_that_exist(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), FILE)
    for name, service in services(path).items():
        assert "build" in service, f"{name}: nobody publishes these images"
        build = service["build"]
        context = path.parent / build["context"]
        dockerfile = context / build["dockerfile"]
        assert dockerfile.is_file(), dockerfile
        declared = {rest.partition("=")[0] for word, rest in instructions(dockerfile) if word == "ARG"}
        assert set(build.get("args", {})) <= declared
        for volume in service["volumes"]:
            source, _, mode = re.fullmatch(r"(\$\{[^}]*\}|[^:]+):([^:]+)(?::(ro))?", volume).groups()  # type: ignore[union-attr]
            assert mode == "ro" or name == "client", "servers may not write to this host"
            assert source.startswith("${") or (path.parent / source).is_file(), source
        for other in service.get("depends_on", {}):
            assert "healthcheck" in services(path)[other]
        if name != "client":
            assert "healthcheck" in service and service["ports"]


def test_both_tritons_publish_what_the_launch_way_expects() -> None:
    """The container that `server.options.container` runs, and those of compose, are the same to a client."""
    spec = triton_container(ContainerOptions(image="i:1"), Path("/r"), "m", {"http": 1, "grpc": 2, "metrics": 3})
    inside = {str(port) for port in spec.ports.values()}
    for name in ("triton-cpu", "triton-gpu"):
        service = services(DOCKER / f"compose.{name}.yaml")["triton"]
        assert {port.rpartition(":")[2] for port in service["ports"]} == inside
        assert service["volumes"][0].endswith(":/models:ro")
        assert "--model-repository=/models" in service["command"]
    gpu = services(DOCKER / "compose.triton-gpu.yaml")["triton"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "/cu" in gpu["build"]["args"]["TORCH_INDEX"]


def test_triton_knows_the_flags() -> None:
    server = find_installation(None)
    help_text = subprocess.run(
        [server.server, "--help"], env=server.environment({}), capture_output=True, text=True, timeout=20, check=False
    )
    known = set(re.findall(r"--[a-z][a-z-]+", help_text.stdout + help_text.stderr))
    spec = triton_container(
        ContainerOptions(image="i:1"), Path("/r"), "m", {"http": 1, "grpc": 2, "metrics": 3}, http_threads=2
    )
    commands = [services(DOCKER / f"compose.triton-{kind}.yaml")["triton"]["command"][1:] for kind in ("cpu", "gpu")]
    for arguments in (*commands, spec.command):
        assert {argument.partition("=")[0] for argument in arguments} <= known


def test_torchserve_knows_the_flags_and_properties() -> None:
    service = services(DOCKER / "compose.torchserve.yaml")["torchserve"]
    parsed = parsed_by_torchserve(service["command"])
    assert (parsed["start"], parsed["foreground"], parsed["no_config_snapshots"]) == (True, True, True)
    assert (parsed["ts_config"], parsed["model_store"]) == ("/config/config.properties", "/models")
    text = (DOCKER / "torchserve.properties").read_text(encoding="utf-8")
    properties = dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))
    spec = find_spec("ts")
    assert spec is not None and spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar") as jar:
        manager = jar.read("org/pytorch/serve/util/ConfigManager.class")
    for key in properties:
        # A string constant of a class file: its tag, its length, itself (JVM specification, 4.4.7).
        constant = b"\x01" + len(key).to_bytes(2) + key.encode()
        assert constant in manager, f"{key}: TorchServe reads no such property"
    ports = {properties[key].rpartition(":")[2] for key in properties if key.endswith(("_address", "_port"))} - {"0.0.0.0"}
    assert ports == {port.rpartition(":")[2] for port in service["ports"]}


def parsed_by_torchserve(command: list[str]) -> dict[str, Any]:
    """What TorchServe's command makes of its arguments; in a process of its own, as importing it leaves a file open."""
    code = "import json, sys; from ts.arg_parser import ArgParser; args = ArgParser.ts_parser().parse_args(sys.argv[1:])"
    asked = [sys.executable, "-c", f"{code}; print(json.dumps(vars(args)))", *command[1:]]
    parsed: dict[str, Any] = json.loads(subprocess.run(asked, capture_output=True, check=True, timeout=30).stdout)
    return parsed


def test_the_launch_ways_torchserve_command_is_one() -> None:
    files = [Path("/w/config.properties"), Path("/w/log4j2.xml"), Path("/w/model-config.yaml")]
    ports = {"inference": 1, "management": 2, "metrics": 3, "grpc": 4, "grpc_management": 5, "worker": 6}
    spec = torchserve_container(ContainerOptions(image="i:1"), Path("/w/model_store"), files, ports, cpus=[1])
    parsed = parsed_by_torchserve(["torchserve", *spec.command])
    assert (parsed["start"], parsed["foreground"], parsed["no_config_snapshots"]) == (True, True, True)
    mounted = {str(inside): str(outside) for outside, inside in spec.volumes.items()}
    assert {mounted[parsed[key]] for key in ("ts_config", "log_config", "model_store")} == {
        "/w/config.properties",
        "/w/log4j2.xml",
        "/w/model_store",
    }
    published = {port.rpartition(":")[2] for port in services(DOCKER / "compose.torchserve.yaml")["torchserve"]["ports"]}
    assert {str(inside) for inside in spec.ports.values()} == published
    assert sorted(spec.ports) == [1, 2, 3, 4, 5], "the workers' port stays inside"


def test_the_clients_command_is_one() -> None:
    client = services(DOCKER / "compose.client.yaml")["client"]
    verb, profile, flag, setting, *out = client["command"]
    assert (verb, flag, out) == ("run", "--set", ["--out", "/runs/${RUN:-compose}"])
    default = re.fullmatch(r"\$\{PROFILE:-(.+)\}", profile)
    assert default is not None
    loaded = load_profile(default[1], (setting,))
    assert loaded.server.url == "grpc://triton:8001"
    assert loaded.server.launch is None
    assert loaded.endpoint.protocol == "kserve-grpc"
    assert [volume.rpartition(":")[2] for volume in client["volumes"]] == ["/runs"]


def test_the_client_can_run_as_the_owner_of_the_folder_it_writes_to() -> None:
    text = (DOCKER / "client.Dockerfile").read_text(encoding="utf-8")
    (own,) = re.findall(r"--uid (\d+)", text)
    assert services(DOCKER / "compose.client.yaml")["client"]["user"] == f"${{RUN_AS:-{own}:{own}}}"
    (usage,) = re.findall(r"^#\s+docker run .*", text, re.MULTILINE)
    assert '--user "$(id -u):$(id -g)"' in usage and "/runs:/runs" in usage


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles(path: Path) -> None:
    """Pinned, small, and not root where the image is ours from the ground up."""
    parts = instructions(path)
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in parts} <= known
    assert parts[0][0] == "FROM"
    context = ROOT if path.stem == "client" else DOCKER
    for word, rest in parts:
        if word == "FROM":
            assert re.fullmatch(rf"{PINNED}(?: AS \w+)?", rest), rest
        elif word in ("ENTRYPOINT", "CMD"):
            assert isinstance(yaml.safe_load(rest), list), (
                f"{rest}: a shell would stand between the engine's signal and the program"
            )
        elif word == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (context / source).exists(), source
        elif word == "RUN":
            assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest
            for install in re.findall(r"pip install ([^&]*)", rest):
                assert "--no-cache-dir" in install
                packages = [one for one in re.sub(r"--index-url \S+", "", install).split() if not one.startswith("--")]
                assert all("==" in one or one == "'.[grpc]'" for one in packages), packages
    if not parts[0][1].startswith("nvcr.io/"):  # Triton's own image expects root
        assert [rest for word, rest in parts if word == "USER"] not in ([], ["root"])


def test_the_clients_context_is_what_it_copies() -> None:
    allowed = {
        line[1:] for line in (DOCKER / "client.Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source
        for word, rest in instructions(DOCKER / "client.Dockerfile")
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert allowed == copied


def test_numpy_stays_below_2_where_tritons_python_backend_needs_it() -> None:
    (version,) = re.findall(r"numpy==(\d+)\.", (DOCKER / "triton.Dockerfile").read_text(encoding="utf-8"))
    assert version == "1"


@pytest.mark.parametrize("document", ["docker/README.md", "docs/launching.md", "docs/gpu.md"])
def test_links_and_files_in_documents(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:servebench|servers|tests|docs|docker|benchmarks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


SMI = "NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB"
RUN = {
    **{"version": "0.1.0", "verdict": "FAIL", "environment": {"python": "3.11.7", "cpu_model": "Some CPU", "cpus": 16}},
    "server": {"version": "2.51.0", "distribution": "a wheel", "torch": "2.9.1+cu126", "numpy": "1.26.4", "device": "cuda:0"},
    "counts": {"issued": 1000, "ok": 990},
    "rates": {"target_qps": 200.0, "completed_qps": 198.44, "goodput_qps": None},
    "response_time": {"percentiles": {"50": 5_250_000, "99": 16_000_000, "99.9": None}},
}
# A python that records, makes "virtual environments" of itself, and installs nothing; and a servebench that "runs".
STAND_IN = """
import json, os, shutil, sys
from pathlib import Path
me, arguments = Path(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([me.name, *arguments]) + chr(10))
if me.name == "servebench":
    if arguments[0] == "run":
        out = Path(arguments[-1])
        out.mkdir()
        out.joinpath("run.json").write_text(json.dumps(json.loads(os.environ["RUN"]) | {"profile": {"name": arguments[1]}}))
        sys.exit(int(os.environ.get("RUN_CODE", "3")))
    print("{}")
elif arguments[:2] == ["-m", "venv"]:
    folder = Path(arguments[2], "bin")
    folder.mkdir(parents=True)
    for name in ("python", "servebench"):
        shutil.copy(me, folder / name)
elif arguments[:2] == ["-m", "pip"]:
    sys.exit(os.environ.get("PIP_FAILS", "-") in arguments)
elif "torch" in " ".join(arguments):
    sys.exit("NO_CUDA" in os.environ)
else:
    if arguments[0] == "-c":
        arguments[1] = os.environ.get("HOST", "") + arguments[1]
    os.execv(REAL, [REAL, *arguments])
"""


# What other hosts' Pythons would say.
OLD_PYTHON, NEW_PYTHON = ({"HOST": f"import sys; sys.version_info = {version}; "} for version in ((3, 10, 12), (3, 13, 0)))
OLD_GLIBC, NO_GLIBC = (
    {"HOST": f"import platform; platform.libc_ver = lambda: {library}; "} for library in (("glibc", "2.31"), ("", ""))
)


@pytest.fixture
def gpu_host(tmp_path):
    """Runs the script among stand-ins; returns its exit code, what it said, and what it called."""
    commands, wheels = tmp_path / "bin", tmp_path / "wheels"
    commands.mkdir()
    wheels.mkdir()
    (wheels / "some-1.0-py3-none-any.whl").touch()
    (commands / "nvidia-smi").write_text(f"#!/bin/sh\n[ -z \"$NO_DRIVER\" ] && echo '{SMI}'\n")
    (commands / "python3").write_text(f"#!{sys.executable}\nREAL = {sys.executable!r}\n{STAND_IN}")
    for command in commands.iterdir():
        command.chmod(0o755)
    calls = tmp_path / "calls.jsonl"

    def run(*arguments: str, **settings: str) -> tuple[int, str, list[list[str]]]:
        env = {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(calls), "RUN": json.dumps(RUN), **settings}
        script = [shutil.which("bash") or "bash", str(ROOT / "benchmarks" / "gpu_host.sh"), *arguments]
        done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        called = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, called

    return run


def test_the_gpu_host_script_runs_its_profiles_and_sums_up(gpu_host, tmp_path):
    code, said, calls = gpu_host("wheels", "out", TARGET_QPS="500", DURATION_S="5")
    assert code == 0, said
    installs = [call for call in calls if call[1:3] == ["-m", "pip"]]
    assert all({"--no-index", "--find-links", str(tmp_path / "wheels")} <= set(call) for call in installs)
    assert installs[1][-2:] == ["--no-build-isolation", f"{ROOT}[grpc,triton]"]
    runs = [call for call in calls if call[:2] == ["servebench", "run"]]
    settings = ["--set", "server.options.device=cuda", "--set", "load.min_duration_s=5", "--set", "load.target_qps=500"]
    names = ["resnet50-mlperf", "bert-mlperf"]
    assert runs == [["servebench", "run", name, *settings, "--out", str(tmp_path / "out" / name)] for name in names]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary in said
    assert summary.splitlines()[:3] == [
        "- GPU 0: NVIDIA H100 80GB HBM3, 81559 MiB, driver 550.54.15",
        "- Triton 2.51.0 (a wheel), torch 2.9.1+cu126, numpy 1.26.4",
        "- servebench 0.1.0, Python 3.11.7, Some CPU, 16 CPUs",
    ]
    assert "| bert-mlperf | cuda:0 | FAIL | 200.0 | 198.4 | - | 5.25 | 16.00 | - | 10 |" in summary
    again = gpu_host("wheels", "out")
    assert again[0] == 1 and "out/resnet50-mlperf is there already; choose another OUT" in again[1]


@pytest.mark.parametrize("name", ["resnet50-mlperf", "bert-mlperf"])
def test_the_gpu_host_scripts_settings_fit_its_profiles(name: str) -> None:
    overrides = ("server.options.device=cuda", "load.min_duration_s=5", "load.target_qps=500")
    profile = load_profile(name, overrides)
    launcher, options = launcher_options(profile)
    assert launcher is not None and launcher.name == "triton"
    assert options is not None and options.model_dump()["device"] == "cuda"


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        pytest.param([], {}, "which folder has the wheels? usage: ", id="no argument"),
        pytest.param(["nowhere"], {}, "nowhere: no such folder", id="no folder"),
        pytest.param(["bin"], {}, "bin: no wheels in it", id="no wheels"),
        pytest.param(["wheels"], OLD_PYTHON, "python3: Python 3.11 or 3.12 is needed", id="a Python before 3.11"),
        pytest.param(["wheels"], NEW_PYTHON, "python3: Python 3.11 or 3.12 is needed", id="a Python after 3.12"),
        pytest.param(["wheels"], OLD_GLIBC, "not glibc 2.35 or newer", id="an old glibc"),
        pytest.param(["wheels"], NO_GLIBC, "not glibc 2.35 or newer", id="another C library"),
        pytest.param(["wheels"], {"NO_DRIVER": "1"}, "nvidia-smi does not work", id="no driver"),
        pytest.param(["wheels"], {"PIP_FAILS": "setuptools"}, "lacks setuptools", id="no setuptools"),
        pytest.param(["wheels"], {"PIP_FAILS": f"{ROOT}[grpc,triton]"}, "lacks what pip names above", id="a wheel is missing"),
        pytest.param(["wheels"], {"NO_CUDA": "1"}, "torch sees no GPU", id="a torch for the CPU"),
        pytest.param(["wheels"], {"RUN_CODE": "1"}, "resnet50-mlperf could not be run (exit code 1)", id="a failed launch"),
        pytest.param(["wheels"], {"RUN_CODE": "130"}, "could not be run (exit code 130)", id="interrupted"),
    ],
)
def test_the_gpu_host_script_stops_with_one_line(gpu_host, arguments, settings, said):
    code, output, calls = gpu_host(*arguments, **settings)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("gpu_host: ") and said in last
    assert len([call for call in calls if call[:2] == ["servebench", "run"]]) <= 1
