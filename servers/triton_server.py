"""A Triton server process from its start to its end: awaited, questioned, stopped without leftovers.

Ready means that its health and the model's both say so *and* that the configuration it
reports is the one asked for: Triton keeps quiet about what it changes.

Triton's Python backend leaves shared memory behind when it is killed, so each server gets a name
prefix of its own (`new_shm_prefix`), and `TritonServer.stop` deletes what is left of that prefix.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servebench.errors import LaunchError
from servebench.launcher import RunningServer

from .container_engine import ContainerError
from .host import HOST, memory_kills
from .process import ServerProcess
from .remedies import explain
from .triton_config import TritonModelConfig
from .triton_install import SHM_DIR

_PROBE_TIMEOUT_S = 2.0
# Unloading takes Triton a second per instance, and it looks at the result once a second.
_STOP_GRACE_S, _STOP_GRACE_PER_INSTANCE_S = 5.0, 2.0
# After the failed reload of a model that was served, Triton waits half a minute for a model that is no longer there.
_ALONE_GRACE_S = 2.5


class TritonServer:
    """A Triton that was started; `TritonLauncher.launch` makes it and waits until it is ready."""

    def __init__(
        self,
        process: ServerProcess,
        *,
        config: TritonModelConfig,
        config_path: Path,
        ports: Mapping[str, int],
        shm_prefix: str,
        scratch: Path,
        facts: Mapping[str, Any],
    ) -> None:
        self._process = process
        process.alone_grace_s = _ALONE_GRACE_S  # it computes nothing by itself
        self._config = config
        self._config_path = config_path
        self._ports = ports
        self._shm_prefix = shm_prefix
        self._scratch = scratch
        self._facts = dict(facts)

    @property
    def urls(self) -> dict[str, str]:
        """``http``, ``grpc`` (scheme ``grpc://``) and ``metrics`` (the page to scrape)."""
        return {
            "http": f"http://{HOST}:{self._ports['http']}",
            "grpc": f"grpc://{HOST}:{self._ports['grpc']}",
            "metrics": f"http://{HOST}:{self._ports['metrics']}/metrics",
        }

    @property
    def tokens(self) -> dict[str, str]:
        """None: it asks for no token."""
        return {}

    @property
    def log_path(self) -> Path:
        """Triton's and its instances' combined output."""
        return self._process.log_path

    def describe(self) -> dict[str, Any]:
        """Facts for the report: server, command, model and weights, effective settings, how long it took to be ready."""
        return {**self._facts, "command": list(self._process.argv), "pid": self._process.pid}

    def config_files(self) -> list[Path]:
        """The rendered ``config.pbtxt``."""
        return [self._config_path]

    def exit_code(self) -> int | None:
        """None while Triton runs, else its exit code (negative: a signal)."""
        return self._process.exit_code()

    def stop(self) -> None:
        """End Triton and its instances (Triton takes 2 s, and 1 s per instance), delete its shared memory; idempotent."""
        grace_s = _STOP_GRACE_S + _STOP_GRACE_PER_INSTANCE_S * self._config.instance_count
        if self.exit_code() is not None:
            grace_s = 0.0  # instances that outlive Triton hear no signal but SIGKILL
        try:
            self._process.stop(grace_s)
        finally:
            for region in SHM_DIR.glob(f"{self._shm_prefix}*"):
                region.unlink(missing_ok=True)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def wait_ready(self, deadline_s: float) -> None:
        """Return when the model answers with the configuration asked for; `LaunchError` otherwise, and all is stopped."""
        started_s = time.monotonic()
        try:
            self._wait_until_it_says_so(deadline_s)
            self._check_config()
            self._facts["version"] = self._get_json("/v2")["version"]
            self._facts["ready_after_s"] = round(time.monotonic() - started_s, 3)
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_says_so(self, deadline_s: float) -> None:
        model_ready = f"/v2/models/{self._config.name}/ready"
        kills_before = memory_kills()
        try:
            self._process.wait_ready(lambda: self._says_ready("/v2/health/ready") and self._says_ready(model_ready), deadline_s)
        except ContainerError:
            raise
        except LaunchError as error:
            # The process quotes the log's last line; Triton's last *error* says more.
            happened = str(error).partition(": ")[0]
            cause = failure_cause(self.log_path.read_text(encoding="utf-8", errors="replace"))
            told = LaunchError(f"{happened}: {cause}" if cause else str(error), log_tail=error.log_tail)
            raise explain(told, killed_for_memory=memory_kills() > kills_before) from None

    def _check_config(self) -> None:
        differences = self._config.differences(self._get_json(f"/v2/models/{self._config.name}/config"))
        if differences:
            message = f"Triton changed the model's configuration: {'; '.join(differences)}"
            raise LaunchError(message, log_tail=self._process.log_tail())

    def _says_ready(self, path: str) -> bool:
        try:
            return self._get(path)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):  # not listening yet, or not talking HTTP yet
            return False

    def _get_json(self, path: str) -> dict[str, Any]:
        try:
            status, body = self._get(path)
            if status != http.HTTPStatus.OK:
                raise LaunchError(f"Triton answers {status} to GET {path}", log_tail=self._process.log_tail())
            answer: dict[str, Any] = json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LaunchError(f"Triton does not answer GET {path}: {error}", log_tail=self._process.log_tail()) from error
        return answer

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self._ports["http"], timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def new_shm_prefix() -> str:
    """Name prefix for one server's shared memory, unlike any other server's on this machine."""
    return f"servebench-{os.getpid()}-{secrets.token_hex(4)}-"


def failure_cause(log: str) -> str:
    """One line out of Triton's log that says why it did not start; "" if there is none.

    Triton logs in glog's format (``E`` and the date for an error) and repeats the innermost
    error outwards, so the last one names the model as well. Line breaks inside a message are
    spelled ``\\n``; a Python traceback follows the first.
    """
    errors = re.findall(r'^E\d{4} \S+\s+\d+ \S+\] "?(.*?)"?\s*$', log, flags=re.MULTILINE)
    # Said on every machine without a GPU.
    causes = [text for text in errors if "CudaDriverHelper" not in text]
    if not causes:  # not Triton speaking: the dynamic loader, a shell
        causes = [line.strip() for line in log.splitlines() if line.strip() and not re.match(r"[A-Z]\d{4} |[|+]", line)]
    return causes[-1].split("\\n")[0].strip() if causes else ""


if TYPE_CHECKING:
    _server: type[RunningServer] = TritonServer
