"""The server of a run: launched before it, stopped after it, its log and configuration kept with it."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from servebench.errors import LaunchError, ProfileError
from servebench.launcher import Launcher, RunningServer, find_launcher
from servebench.profile import Profile, describe_validation_error


def check_launch_options(launcher: Launcher, given: dict[str, Any], *, source: str) -> BaseModel:
    """The launcher's options as a value; `ProfileError` names the key."""
    try:
        return launcher.Options.model_validate(given)
    except ValidationError as error:
        raise ProfileError(f"{source}.{describe_validation_error(error, launcher.Options)}") from None


def launcher_options(profile: Profile) -> tuple[Launcher | None, BaseModel | None]:
    """The launcher that a profile names and its options, or Nones. `ProfileError` for what is not there or not allowed."""
    if profile.server.launch is None:
        return None, None
    launcher = find_launcher(profile.server.launch)
    return launcher, check_launch_options(launcher, profile.server.options, source="server.options")


@contextlib.contextmanager
def launched(launcher: Launcher, model: str, options: BaseModel | None, folder: Path) -> Iterator[RunningServer]:
    """A running server; afterwards ``folder`` holds its log and configuration, and nothing else of it.

    The text of a `LaunchError` ends with the place of the log, if there is one, a `ProfileError` of the
    launcher's (options that do not fit the model) begins with their place in the profile.
    """
    work = folder / "work"
    work.mkdir()
    server: RunningServer | None = None
    try:
        try:
            server = launcher.launch(model, options, work)
        except ProfileError as error:
            raise ProfileError(f"server.options.{error}") from None
        except OSError as error:
            raise LaunchError(f"{launcher.name}: cannot be started in {work}: {error.strerror or error}") from None
        yield server
    except LaunchError as error:
        if server is not None:
            raise
        _keep_files(server, work, folder)
        raise with_log(error, launcher.name, folder) from None
    finally:
        if server is not None:
            server.stop()
        _keep_files(server, work, folder)


def with_log(error: LaunchError, launcher: str, folder: Path) -> LaunchError:
    """The error of a server that could not start or ended, with the place of the log that it left under ``folder``, if any."""
    log = _log_left(launcher, folder)
    return error if log is None else LaunchError(f"{error}; log: {log}", log_tail=error.log_tail)


def with_kept_log(error: LaunchError, launcher: str, folder: Path, keep_as: Path) -> LaunchError:
    """`with_log` for a ``folder`` that is about to be removed: the log is copied to ``keep_as``.log.

    Where that exists it is ``keep_as``-2.log and so on; nothing is overwritten. Where it cannot be copied the error says why.
    """
    log = _log_left(launcher, folder)
    if log is None:
        return error
    kept, number = Path(f"{keep_as}.log"), 2
    try:
        while kept.exists():
            kept, number = Path(f"{keep_as}-{number}.log"), number + 1
        with log.open("rb") as source, kept.open("xb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as reason:
        place = f"its log cannot be kept as {kept}: {reason.strerror}"
    else:
        place = f"log: {kept}"
    return LaunchError(f"{error}; {place}", log_tail=error.log_tail)


def _log_left(launcher: str, folder: Path) -> Path | None:
    """The log that a server left under ``folder``, if any; first the launcher's own."""
    logs = [log for log in folder.rglob("*.log") if log.stat().st_size]
    return min(logs, key=lambda log: (log.stem != launcher, log), default=None)


def launch_warnings(described: Mapping[str, Any]) -> list[str]:
    """What in a server's own description makes it slower than it has to be, one line each.

    More threads than CPUs take turns, each batch with the others': latency grows, and throughput falls.
    """
    threads = described.get("threads") or {}
    total, cpus = threads.get("total", 0), threads.get("cpus", 0)
    if described.get("device") != "cpu" or total <= cpus:
        return []
    return [
        f"more threads than CPUs: the model computes with {threads['processes']} x {threads['each']} torch_threads on {cpus}, "
        "where they slow each other down; lower torch_threads or the number of processes, or give the server more cpus"
    ]


@contextlib.contextmanager
def interrupting(*signals: signal.Signals) -> Iterator[None]:
    """Let signals unwind like Ctrl-C where no event loop handles them (while a server starts or stops).

    A signal that is ignored already stays so: whoever ignores the end of a terminal does it on purpose.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_files(server: RunningServer | None, work: Path, folder: Path) -> None:
    files = [server.log_path, *server.config_files()] if server is not None else list(work.rglob("*.log"))
    for file in files:
        with contextlib.suppress(OSError):
            shutil.copyfile(file, folder / file.name)
    shutil.rmtree(work, ignore_errors=True)
