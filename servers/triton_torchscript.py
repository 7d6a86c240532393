"""What Triton needs to host a bundled model without Python: its PyTorch backend, and the model as TorchScript.

That backend (libtorch) is part of NVIDIA's full images and not of the nvidia-pytriton wheel. It loads
``1/model.pt``, and runs all instances as threads of the server's own process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError

from .host import installed_version
from .models.options import Hosting
from .triton_install import check_torch, find_server

MODEL_FILE = "model.pt"
_LIBRARY = Path("pytorch", "libtriton_pytorch.so")
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class LibtorchInstallation:
    """A Triton with the PyTorch backend."""

    server: Path
    backends: Path  #: to give as ``--backend-directory``


def find_libtorch(binary: str | None) -> LibtorchInstallation:
    """The Triton to start (see `find_server`), if it has the PyTorch backend; `LaunchError` otherwise."""
    server = find_server(binary)
    remedy = "use container with a full Triton image, a binary that has one, or backend: python"
    if server is None:
        raise LaunchError(f"backend: torchscript needs a Triton with the PyTorch backend, and none is installed; {remedy}")
    backends = server.parent.parent / "backends"
    if not (backends / _LIBRARY).is_file():
        raise LaunchError(f"backend: {server} has no PyTorch backend ({backends / _LIBRARY} is missing); {remedy}")
    return LibtorchInstallation(server, backends)


def check_traceable(hosting: Hosting) -> None:
    """`LaunchError` for a model or device that the PyTorch backend cannot host, and where torch is missing to trace it."""
    if not hosting.model.uses_torch:
        raise LaunchError(f"backend: {hosting.model.name} is no torch network, so it has no torchscript; use python")
    if hosting.placement.kind not in _DEVICES:
        raise LaunchError(f"backend: torchscript computes on {' or '.join(_DEVICES)}, not on {hosting.placement.kind}")
    check_torch(installed_version("torch"))


def write_torchscript(hosting: Hosting, target: Path, *, timeout_s: float) -> None:
    """Trace the model to ``target``, with its weights; `LaunchError` when that fails or takes longer than ``timeout_s``.

    In a process of its own: torch is large, and a client that is about to measure must not carry it.
    """
    asked = {
        "settings": hosting.settings.to_json(),
        "weights": None if hosting.weights is None else str(hosting.weights.absolute()),
        "target": str(target),
    }
    name = hosting.model.name
    try:
        subprocess.run(
            [sys.executable, "-m", f"{__package__}.models.tracing"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{name} was not traced to TorchScript within {timeout_s:g} s; raise startup_timeout_s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise LaunchError(f"{name} cannot be traced to TorchScript: {last[0]}", log_tail=error.stderr) from None
