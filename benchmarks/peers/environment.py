"""Python environments of the peers: one each, below ``benchmarks/.peers``, so that nobody's requirements meet ours.

An environment is complete when its stamp says what was asked for; anything else is made again. A lock
keeps two benchmarks from making the same one at once.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.base import Progress, run_bounded

CACHE = Path(__file__).parents[1] / ".peers"
_STAMP = "installed.txt"
_INSTALL_DEADLINE_S = 900.0


def environment_python(name: str) -> Path:
    """Where the interpreter of the environment ``name`` is, once it is made."""
    return CACHE / name / "bin" / "python"


def make_environment(name: str, requirements: Sequence[str], progress: Progress) -> Path:
    """The folder of an environment with ``requirements`` (pip's words), made unless it is there. `RunError` if pip fails."""
    directory = CACHE / name
    stamp, wanted = directory / _STAMP, "\n".join(requirements)
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return directory
        progress(f"installing {', '.join(requirements)} (once; large ones take minutes)")
        shutil.rmtree(directory, ignore_errors=True)
        run_bounded("venv", [sys.executable, "-m", "venv", str(directory)], timeout_s=_INSTALL_DEADLINE_S)
        pip = [str(environment_python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        run_bounded("pip", pip, timeout_s=_INSTALL_DEADLINE_S)
        stamp.write_text(wanted, encoding="utf-8")
    return directory
