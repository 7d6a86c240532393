"""A TorchServe process from its start to its end: awaited, questioned, stopped without leftovers.

Ready means that every worker has loaded the model *and* that the settings the server reports are
those asked for. ``GET /ping`` is no help: it says "Healthy" before any model is loaded, and goes
on saying so for the five minutes in which TorchServe restarts a worker that cannot load one. So
the log is watched as well: a worker that ends before it was ready ends the wait.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

from servebench.errors import LaunchError

from .host import HOST, get
from .process import ServerProcess
from .running import HostingProcess
from .torchserve_config import TorchServeConfig
from .torchserve_cpu_launcher import inspect_workers

KEY_FILE = "key_file.json"
_STARTED = "Model server started."
# The end of a Python traceback. "RuntimeError: 500 - ..." is the worker's own, after the exception proper.
_EXCEPTION = re.compile(r"(?!RuntimeError: \d{3} - )[A-Za-z_][\w.]*(: |$)")
# Netty ends after 2 quiet seconds, and a query under way may take longer.
_STOP_GRACE_S = 10.0


class TorchServeServer(HostingProcess):
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
        super().__init__(process, facts=facts, config_files=config_files)
        self._config = config
        self._ports = ports
        self._temp_dir = temp_dir
        self._tokens: dict[str, str] = {}
        self._seen_log = ""
        self._described: dict[str, Any] = {}

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

    def stop(self) -> None:
        """End TorchServe (it takes some 3 s) and its workers, remove its temporary directory; idempotent."""
        grace_s = _STOP_GRACE_S if self.exit_code() is None else 0.0  # without TorchServe its workers have nothing to finish
        try:
            self._process.stop(grace_s)
        finally:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _is_ready(self) -> bool:
        log = self._seen_log = self._log()
        if worker_ended(log):
            raise self._refusal("a worker of torchserve ended before the model was loaded")
        if _STARTED not in log:
            return False
        if self._config.token_auth and not self._tokens:
            self._tokens = read_tokens(self._temp_dir / KEY_FILE)
        try:
            self._described = self._describe_model()
        except (OSError, HTTPException):  # it is busy, or about to end
            return False
        return [worker["status"] for worker in self._described["workers"]] == ["READY"] * self._config.workers

    def _check_config(self) -> None:
        differences = self._config.differences(self._described)
        if differences:
            raise self._refusal(f"TorchServe changed the model's configuration: {'; '.join(differences)}")
        launcher = self._config.cpu_launcher
        if launcher is not None:
            workers = inspect_workers(launcher, [worker["pid"] for worker in self._described["workers"]])
            self._facts["cpu_launcher"] = {**self._facts["cpu_launcher"], "workers": workers}

    def _failure_cause(self, happened: str) -> str:
        # One that did not end was stopped before it was ready, and TorchServe logs exceptions because of that.
        return failure_cause(self._log() if " ended (" in happened else self._seen_log)

    def _describe_model(self) -> dict[str, Any]:
        path = f"/models/{self._config.model}"
        headers = {"Authorization": f"Bearer {self._tokens['management']}"} if self._tokens else {}
        status, body = get(self._ports["management"], path, headers=headers)
        if status != HTTPStatus.OK:
            raise self._refusal(f"torchserve answers {status} to GET {path}")
        described: dict[str, Any] = json.loads(body)[0]
        return described


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
