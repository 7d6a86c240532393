"""A TorchServe process from its start to its end: awaited, questioned, stopped without leftovers.

Ready means that every worker has loaded the model *and* that the settings the server reports are
those asked for. ``GET /ping`` is no help: it says "Healthy" before any model is loaded, and goes
on saying so for the five minutes in which TorchServe restarts a worker that cannot load one. So
the log is watched as well: a worker that ends before it was ready ends the wait.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servebench.errors import LaunchError
from servebench.launcher import RunningServer

from .container_engine import ContainerError
from .host import HOST, memory_kills
from .process import ServerProcess
from .remedies import explain
from .torchserve_config import TorchServeConfig
from .torchserve_cpu_launcher import inspect_workers

KEY_FILE = "key_file.json"
_STARTED = "Model server started."
_PROBE_TIMEOUT_S = 2.0
# The end of a Python traceback. "RuntimeError: 500 - ..." is the worker's own, after the exception proper.
_EXCEPTION = re.compile(r"(?!RuntimeError: \d{3} - )[A-Za-z_][\w.]*(: |$)")
# Netty ends after 2 quiet seconds, and a query under way may take longer.
_STOP_GRACE_S = 10.0


class TorchServeServer:
    """A TorchServe that was started; `TorchServeLauncher.launch` makes it and waits until it is ready.

    ``temp_dir`` is its own: working directory, sockets, unpacked model, keys. It is removed by `stop`.
    """

    def __init__(
        self,
        process: ServerProcess,
        *,
        config: TorchServeConfig,
        config_files: Sequence[Path],
        ports: Mapping[str, int],
        temp_dir: Path,
        facts: Mapping[str, Any],
    ) -> None:
        self._process = process
        self._config = config
        self._config_files = list(config_files)
        self._ports = ports
        self._temp_dir = temp_dir
        self._tokens: dict[str, str] = {}
        self._seen_log = ""
        self._described: dict[str, Any] = {}
        self._facts = dict(facts)

    @property
    def urls(self) -> dict[str, str]:
        """``http`` and ``grpc`` (``grpc://``) for inference, ``management``, ``grpc_management``, and the page ``metrics``."""
        return {
            "http": f"http://{HOST}:{self._ports['inference']}",
            "grpc": f"grpc://{HOST}:{self._ports['grpc']}",
            "management": f"http://{HOST}:{self._ports['management']}",
            "grpc_management": f"grpc://{HOST}:{self._ports['grpc_management']}",
            "metrics": f"http://{HOST}:{self._ports['metrics']}/metrics",
        }

    @property
    def tokens(self) -> dict[str, str]:
        """With ``token_auth``, the bearer tokens ``inference`` and ``management``, else none."""
        return dict(self._tokens)

    @property
    def log_path(self) -> Path:
        """TorchServe's and its workers' combined output."""
        return self._process.log_path

    def describe(self) -> dict[str, Any]:
        """Facts for the report: server, Java, command, model and weights, effective settings, how long it took to be ready."""
        return {**self._facts, "command": list(self._process.argv), "pid": self._process.pid}

    def config_files(self) -> list[Path]:
        """The rendered ``config.properties``, ``model-config.yaml`` and, unless TorchServe's own is used, ``log4j2.xml``."""
        return list(self._config_files)

    def exit_code(self) -> int | None:
        """None while TorchServe runs, else its exit code (negative: a signal)."""
        return self._process.exit_code()

    def stop(self) -> None:
        """End TorchServe (it takes some 3 s) and its workers, remove its temporary directory; idempotent."""
        grace_s = _STOP_GRACE_S if self.exit_code() is None else 0.0  # without TorchServe its workers have nothing to finish
        try:
            self._process.stop(grace_s)
        finally:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def wait_ready(self, deadline_s: float) -> None:
        """Return when all workers are ready with the settings asked for; `LaunchError` otherwise, and all is stopped."""
        started_s = time.monotonic()
        try:
            self._wait_until_it_says_so(deadline_s)
            self._check_config()
            self._facts["ready_after_s"] = round(time.monotonic() - started_s, 3)
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_says_so(self, deadline_s: float) -> None:
        kills_before = memory_kills()
        try:
            self._process.wait_ready(self._is_ready, deadline_s)
        except ContainerError:
            raise
        except LaunchError as error:
            # The process quotes the log's last line; an exception in it says more. But not one that
            # TorchServe logged only because it was stopped.
            happened = str(error).partition(": ")[0]
            cause = failure_cause(self._log() if " ended (" in happened else self._seen_log)
            text = f"{happened}: {cause}" if cause else str(error)
            told = LaunchError(text, log_tail=error.log_tail)
            raise explain(told, killed_for_memory=memory_kills() > kills_before) from None

    def _is_ready(self) -> bool:
        log = self._seen_log = self._log()
        if worker_ended(log):
            raise LaunchError("a worker of torchserve ended before the model was loaded", log_tail=self._process.log_tail())
        if _STARTED not in log:
            return False
        if self._config.token_auth and not self._tokens:
            self._tokens = read_tokens(self._temp_dir / KEY_FILE)
        try:
            self._described = self._describe_model()
        except (OSError, http.client.HTTPException):  # it is busy, or about to end
            return False
        return [worker["status"] for worker in self._described["workers"]] == ["READY"] * self._config.workers

    def _check_config(self) -> None:
        differences = self._config.differences(self._described)
        if differences:
            message = f"TorchServe changed the model's configuration: {'; '.join(differences)}"
            raise LaunchError(message, log_tail=self._process.log_tail())
        launcher = self._config.cpu_launcher
        if launcher is not None:
            workers = inspect_workers(launcher, [worker["pid"] for worker in self._described["workers"]])
            self._facts["cpu_launcher"] = {**self._facts["cpu_launcher"], "workers": workers}

    def _describe_model(self) -> dict[str, Any]:
        path = f"/models/{self._config.model}"
        headers = {"Authorization": f"Bearer {self._tokens['management']}"} if self._tokens else {}
        connection = http.client.HTTPConnection(HOST, self._ports["management"], timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            message = f"torchserve answers {response.status} to GET {path}"
            raise LaunchError(message, log_tail=self._process.log_tail())
        described: dict[str, Any] = json.loads(body)[0]
        return described

    def _log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def read_tokens(key_file: Path) -> dict[str, str]:
    """The tokens ``inference`` and ``management`` in the file that TorchServe writes them to.

    Not the ``API`` key: it only serves to renew the others, which invalidates them.
    """
    try:
        document = json.loads(key_file.read_text(encoding="utf-8"))
        return {use: document[use]["key"] for use in ("inference", "management")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        # The error's own text could quote the file.
        raise LaunchError(f"torchserve wrote no usable {KEY_FILE} ({type(error).__name__})") from None


def worker_ended(log: str) -> bool:
    """Whether a worker process has ended, and all that it said is in the log."""
    ended = re.findall(r" Stopped Scanner - (W-\S+)-(stdout|stderr)$", log, flags=re.MULTILINE)
    return any((name, other) in ended for name, stream in ended for other in {"stdout", "stderr"} - {stream})


def failure_cause(log: str) -> str:
    """One line out of TorchServe's log that says why it did not start; "" if there is none.

    A worker's traceback says most, and its last line is the exception; but TorchServe's worker
    follows up on some with one of its own that only has a status code. Else the first of Java's
    exceptions, which others wrap no further, or the last line that is marked as an error.
    """
    said: list[str] = re.findall(r" MODEL_LOG - (.*)$", log, flags=re.MULTILINE)
    raised = [line for before, line in pairwise(said) if before.startswith("  ") and _EXCEPTION.match(line)]
    if raised:
        return raised[-1].strip()
    java = re.search(
        r"^(?:Exception in thread \S+ )?((?:[a-z]\w*\.)+[A-Z]\w*(?:Exception|Error)\b.*|Invalid configuration: .*|Error: .*)$",
        log,
        flags=re.MULTILINE,
    )
    if java:
        return str(java[1]).strip()
    errors: list[str] = re.findall(r"^\S+ \[(?:ERROR|WARN )\] \S+ \S+ - (.*)$", log, flags=re.MULTILINE)
    return errors[-1].strip() if errors else ""


if TYPE_CHECKING:
    _server: type[RunningServer] = TorchServeServer
