"""A Triton server process from its start to its end: awaited, questioned, stopped without leftovers.

Ready means that its health and the model's both say so *and* that the configuration it
reports is the one asked for: Triton keeps quiet about what it changes.

Triton's Python backend leaves shared memory behind when it is killed, so each server gets a name
prefix of its own (`new_shm_prefix`), and `TritonServer.stop` deletes what is left of that prefix.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from .host import HOST, get
from .process import ServerProcess
from .running import HostingProcess
from .triton_config import TritonModelConfig
from .triton_install import SHM_DIR

# Unloading takes Triton a second per instance, and it looks at the result once a second.
_STOP_GRACE_S, _STOP_GRACE_PER_INSTANCE_S = 5.0, 2.0
# After the failed reload of a model that was served, Triton waits half a minute for a model that is no longer there.
_ALONE_GRACE_S = 2.5


class TritonServer(HostingProcess):
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
        super().__init__(process, facts=facts, config_files=[config_path])
        process.alone_grace_s = _ALONE_GRACE_S  # it computes nothing by itself
        self._config = config
        self._ports = ports
        self._shm_prefix = shm_prefix
        self._scratch = scratch

    @property
    def urls(self) -> dict[str, str]:
        """``http``, ``grpc`` (scheme ``grpc://``) and ``metrics`` (the page to scrape)."""
        return {
            "http": f"http://{HOST}:{self._ports['http']}",
            "grpc": f"grpc://{HOST}:{self._ports['grpc']}",
            "metrics": f"http://{HOST}:{self._ports['metrics']}/metrics",
        }

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

    def _is_ready(self) -> bool:
        return self._says_ready("/v2/health/ready") and self._says_ready(f"/v2/models/{self._config.name}/ready")

    def _check_config(self) -> None:
        differences = self._config.differences(self._get_json(f"/v2/models/{self._config.name}/config"))
        if differences:
            raise self._refusal(f"Triton changed the model's configuration: {'; '.join(differences)}")
        self._facts["version"] = self._get_json("/v2")["version"]

    def _failure_cause(self, happened: str) -> str:
        return failure_cause(self._log())

    def _says_ready(self, path: str) -> bool:
        try:
            return get(self._ports["http"], path)[0] == HTTPStatus.OK
        except (OSError, HTTPException):  # not listening yet, or not talking HTTP yet
            return False

    def _get_json(self, path: str) -> dict[str, Any]:
        try:
            status, body = get(self._ports["http"], path)
            if status != HTTPStatus.OK:
                raise self._refusal(f"Triton answers {status} to GET {path}")
            answer: dict[str, Any] = json.loads(body)
        except (OSError, HTTPException, ValueError) as error:
            raise self._refusal(f"Triton does not answer GET {path}: {error}") from error
        return answer


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
