"""Where Triton is, and whether this machine can run it: checked before anything starts.

Plan. Triton's Python backend fails late and strangely: a library that is missing hangs it for
its stub's 30 s timeout, numpy 2 makes it answer 200 with corrupted tensors. So every known
cause is a check of its own, a function of plain values that raises `LaunchError` with the
remedy; `check_machine` alone collects the values.

Words: the *server* is the ``tritonserver`` binary; the *stub* is the small program around one
libpython in which Triton runs a Python model, one process per instance. It takes the
environment of the first ``python3`` on the PATH, so that has to be ours.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError

from .host import installed_version, package_file

WHEEL = "nvidia-pytriton"
SERVER_NAME = "tritonserver"
STUB_NAME = "triton_python_backend_stub"
SHM_DIR = Path("/dev/shm")
INSTALL_HINT = "pip install 'servebench[triton]'"

_WHEEL_GLIBC = (2, 35)  # the wheel's platform tag, manylinux_2_35
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A Triton whose Python backend fits an interpreter."""

    label: str  #: what it is, for people
    server: Path
    python_backend: Path  #: folder with the backend's library and its ``triton_python_backend_utils``
    stub: Path  #: in ``python_backend``, or elsewhere where there is one for each Python version
    library_dirs: tuple[Path, ...] = ()  #: what the loader has to search beside the system's
    min_glibc: tuple[int, int] | None = None  #: None: not known, not checked

    def backend_directory(self, work_dir: Path) -> Path:
        """The folder to give as ``--backend-directory``, put together from links under ``work_dir`` if need be.

        Python writes its byte code beside the links, which keeps the installation clean.
        """
        if self.stub.parent == self.python_backend:
            return self.python_backend.parent
        backends = work_dir / "backends"
        shutil.rmtree(backends, ignore_errors=True)
        linked = backends / "python"
        linked.mkdir(parents=True)
        for source in [*self.python_backend.iterdir(), self.stub]:
            if source.is_file():
                (linked / source.name).symlink_to(source.resolve())
        return backends

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with this interpreter first on the PATH, and the libraries where the loader finds them."""
        libpython_dir = sysconfig.get_config_var("LIBDIR")
        library_dirs = [str(folder) for folder in self.library_dirs] + ([libpython_dir] if libpython_dir else [])
        return {
            **base,
            "PATH": _joined(str(Path(sys.executable).parent), base.get("PATH")),
            "LD_LIBRARY_PATH": _joined(*library_dirs, base.get("LD_LIBRARY_PATH")),
        }


def wheel_installation(site_packages: Path | None, python: tuple[int, int]) -> TritonInstallation:
    """The Triton inside the nvidia-pytriton wheel, for a Python version; ``site_packages`` is None where there is no wheel."""
    if site_packages is None:
        raise LaunchError(f"the Triton server is not installed; {INSTALL_HINT}, or set binary to a {SERVER_NAME}")
    root = _wheel_root(site_packages)
    stubs = {path.parent.name: path for path in (root / "python_backend_stubs").glob(f"*/{STUB_NAME}")}
    version = ".".join(map(str, python))
    if version not in stubs:
        known = ", ".join(sorted(stubs, key=lambda name: [int(part) for part in name.split(".")]))
        raise LaunchError(f"{WHEEL} has no Python backend for Python {version}; run servebench with one of: {known}")
    return TritonInstallation(
        label=f"{WHEEL} {installed_version(WHEEL)}",
        server=_server_of(root),
        python_backend=root / "backends" / "python",
        stub=stubs[version],
        # Once linked elsewhere, the backend's own relative search path leads nowhere.
        library_dirs=(site_packages / "nvidia_pytriton.libs",),
        min_glibc=_WHEEL_GLIBC,
    )


def binary_installation(binary: str, python: tuple[int, int], search_path: str | None) -> TritonInstallation:
    """A ``tritonserver`` given by file name, or by the word ``PATH`` for the first one on ``search_path``.

    Expects Triton's usual layout, ``bin/tritonserver`` beside ``backends/python/``.
    """
    server = _named_server(binary, search_path)
    python_backend = server.parent.parent / "backends" / "python"
    stub = python_backend / STUB_NAME
    if not stub.is_file():
        raise LaunchError(f"{server}: this Triton has no Python backend ({stub} is missing); use an image or build that has it")
    needed = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    version = ".".join(map(str, python))
    if needed is not None and needed[1].decode() != version:
        raise LaunchError(
            f"{server}: its Python backend is for Python {needed[1].decode()}; run servebench with that, not {version}"
        )
    return TritonInstallation(label=str(server), server=server, python_backend=python_backend, stub=stub)


def find_installation(binary: str | None) -> TritonInstallation:
    """The Triton to start: the wheel's where ``binary`` is None (see `binary_installation` for the rest)."""
    python = (sys.version_info.major, sys.version_info.minor)
    if binary is not None:
        return binary_installation(binary, python, os.environ.get("PATH"))
    return wheel_installation(_wheel_site_packages(), python)


def find_server(binary: str | None) -> Path | None:
    """The ``tritonserver`` alone, whatever it can host: the wheel's where ``binary`` is None, and None without a wheel."""
    if binary is not None:
        return _named_server(binary, os.environ.get("PATH"))
    site_packages = _wheel_site_packages()
    return None if site_packages is None else _server_of(_wheel_root(site_packages))


def check_glibc(version: str | None, minimum: tuple[int, int]) -> None:
    """``version`` is the C library's own words, e.g. ``"glibc 2.36"``; None where it has none."""
    match = re.fullmatch(r"glibc (\d+)\.(\d+).*", version or "")
    if match is None or (int(match[1]), int(match[2])) < minimum:
        needed = ".".join(map(str, minimum))
        found = version or "another C library"
        raise LaunchError(f"this Triton needs glibc {needed} or newer, found {found}; use a newer system or a container")


def check_numpy(version: str) -> None:
    """numpy 2 and Triton's Python backend disagree on array layout, and nobody notices: every answer is garbage."""
    if int(version.split(".", maxsplit=1)[0]) >= 2:
        raise LaunchError(f"numpy {version} silently corrupts the tensors of Triton's Python backend; pip install 'numpy<2'")


def check_torch(version: str | None) -> None:
    """``version`` is None where torch is not installed."""
    if version is None:
        raise LaunchError(f"the model needs torch, which is not installed; {INSTALL_HINT}")


def check_libraries(loader_output: str) -> None:
    """``loader_output`` is what the dynamic loader says of the stub (``ldd``)."""
    missing = sorted(set(re.findall(r"^\s*(\S+) => not found", loader_output, flags=re.MULTILINE)))
    if any(name.startswith("libpython") for name in missing):
        raise LaunchError(
            f"{missing[0]} is not found: this Python was built without a shared library; "
            "use one built with --enable-shared, or install the distribution's libpython package"
        )
    if missing:
        raise LaunchError(
            f"Triton's Python backend needs {', '.join(missing)}; install what holds them, or extend LD_LIBRARY_PATH"
        )


def check_shm(free_bytes: int | None, needed_bytes: int) -> None:
    """Triton and its stubs exchange tensors in /dev/shm; ``free_bytes`` is None where there is none."""
    if free_bytes is None:
        raise LaunchError(f"Triton's Python backend needs {SHM_DIR}, which this machine does not have; mount a tmpfs there")
    if free_bytes < needed_bytes:
        raise LaunchError(
            f"{SHM_DIR} has {free_bytes // _MIB} MiB free, Triton needs {-(-needed_bytes // _MIB)} MiB; "
            "in a container use a larger --shm-size, or fewer instances"
        )


def shm_needed_bytes(instance_count: int, batch_bytes: int) -> int:
    """Each instance maps 1 MiB at its start, and more by whole MiB when a batch of tensors does not fit."""
    return instance_count * (_MIB + -(-batch_bytes // _MIB) * _MIB)


def check_machine(installation: TritonInstallation, env: Mapping[str, str], *, shm_bytes: int) -> None:
    """All checks, on this machine and in the environment ``env`` that the server will get."""
    if installation.min_glibc is not None:
        check_glibc(_glibc_version(), installation.min_glibc)
    check_numpy(importlib.metadata.version("numpy"))
    check_torch(installed_version("torch"))
    check_libraries(trace_libraries(installation.stub, env))
    check_shm(shutil.disk_usage(SHM_DIR).free if SHM_DIR.is_dir() else None, shm_bytes)


def trace_libraries(program: Path, env: Mapping[str, str]) -> str:
    """What the dynamic loader would load for ``program``, which does not run: ``ldd``, without the tool."""
    traced = subprocess.run(
        [program], env={**env, "LD_TRACE_LOADED_OBJECTS": "1"}, capture_output=True, text=True, timeout=10, check=False
    )
    return traced.stdout + traced.stderr


def _named_server(binary: str, search_path: str | None) -> Path:
    found = shutil.which(SERVER_NAME if binary == "PATH" else binary, path=search_path)
    if found is None:
        where = f"there is no {SERVER_NAME} on the PATH" if binary == "PATH" else f"{binary}: no such program"
        raise LaunchError(f"{where}; omit binary to use the one of {WHEEL} ({INSTALL_HINT})")
    return Path(found).resolve()


def _wheel_site_packages() -> Path | None:
    package = package_file("pytriton")
    return None if package is None else package.parent.parent


def _wheel_root(site_packages: Path) -> Path:
    return site_packages / "pytriton" / "tritonserver"


def _server_of(root: Path) -> Path:
    return root / "bin" / SERVER_NAME


def _glibc_version() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # another C library does not know the name
        return None


def _joined(*folders: str | None) -> str:
    return os.pathsep.join(folder for folder in folders if folder)
