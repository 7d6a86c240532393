"""Starts Triton Inference Server with one of our models: ``server.launch: triton``.

Plan. What is known to fail late or silently is checked first (`triton_install`). Then a model
repository is rendered under the work directory, and Triton starts on it, on CPU and loopback,
with explicit model control; `triton_server` waits for it and ends it.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FilePath, model_validator

from servebench.errors import LaunchError
from servebench.launcher import Launcher

from .host import HOST, choose_ports, installed_version
from .models import MODELS, HostedModel
from .process import ServerProcess
from .triton_config import DynamicBatching, TritonModelConfig
from .triton_install import TritonInstallation, check_machine, find_installation, shm_needed_bytes
from .triton_server import TritonServer, new_shm_prefix

_LARGEST_ELEMENT_BYTES = 8  # of KServe's data types of fixed size


class TritonOptions(BaseModel):
    """``server.options`` of the Triton launcher."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_batch_size: int = Field(default=16, ge=1)
    """Largest batch the server forms; 1 for none. A query of more rows than this is refused."""
    dynamic_batching: DynamicBatching | None = None
    """Join queued requests into batches; without it, each request is executed alone."""
    instance_count: int = Field(default=1, ge=1, le=256)
    """Instances of the model, one process each (`instance_group.count`)."""
    torch_threads: int = Field(default=1, ge=1)
    """Threads torch uses in each instance; instances x threads beyond the number of CPUs slow each other down."""
    weights: FilePath | None = None
    """File with other weights of the same network (a torch state dict); the shipped ones when omitted."""
    http_threads: int | None = Field(default=None, ge=1)
    """Threads that handle HTTP requests; Triton's default (8) when omitted."""
    cpus: list[int] | None = Field(default=None, min_length=1)
    """CPUs the server and its instances may use, e.g. `[0]`; all when omitted."""
    binary: str | None = None
    """A `tritonserver` to start: a file, or `PATH` for the first on the PATH; the nvidia-pytriton wheel's when omitted."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """Port of the HTTP endpoint; 0 takes a free one."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """Port of the gRPC endpoint; 0 takes a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the Prometheus metrics; 0 takes a free one."""
    startup_timeout_s: float = Field(default=60.0, gt=0, le=3_600)
    """How long the server may take until it is ready."""

    @model_validator(mode="after")
    def _consistent(self) -> TritonOptions:
        sizes = self.dynamic_batching.preferred_batch_size if self.dynamic_batching else []
        if max(sizes, default=0) > self.max_batch_size:
            raise ValueError(f"preferred_batch_size {sizes} goes beyond max_batch_size {self.max_batch_size}")
        given = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(given)) < len(given):
            raise ValueError(f"http_port, grpc_port and metrics_port must differ, found {given}")
        return self


class TritonLauncher:
    """Hosts a model of `MODELS` on Triton's Python backend, on CPU."""

    name: ClassVar[str] = "triton"
    Options: type[BaseModel] = TritonOptions

    def launch(self, model: str, options: TritonOptions, work_dir: Path) -> TritonServer:
        """Check the machine, start Triton with ``model`` on 127.0.0.1, wait until it is ready.

        Writes ``triton.log`` and ``model_repository/`` under ``work_dir``. Call it from the main
        thread: the server ends with the thread that started it. `LaunchError` says what to do.
        """
        hosted = find_model(model)
        ports = choose_ports({"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port})
        installation = find_installation(options.binary)
        env = installation.environment(os.environ)
        check_machine(installation, env, shm_bytes=_shm_bytes(hosted, options))

        work_dir.mkdir(parents=True, exist_ok=True)
        work_dir = work_dir.resolve()
        config = model_config(hosted, options)
        repository = work_dir / "model_repository"
        weights = write_model(hosted, config, options.weights or hosted.weights_path, repository)
        backends = installation.backend_directory(work_dir)
        shm_prefix = new_shm_prefix()
        command = server_command(
            installation.server, repository, backends, hosted.name, ports, shm_prefix, options.http_threads
        )
        facts = _facts(hosted, options, config, installation, weights)
        server = TritonServer(
            ServerProcess("triton", command, work_dir / "triton.log", env=env, cpus=options.cpus),
            config=config,
            config_path=repository / hosted.name / "config.pbtxt",
            ports=ports,
            shm_prefix=shm_prefix,
            scratch=work_dir / "backends",
            facts=facts,
        )
        server.wait_ready(options.startup_timeout_s)
        return server


def find_model(name: str) -> HostedModel:
    """The model called ``name``; `LaunchError` lists the known ones when there is none."""
    if name not in MODELS:
        raise LaunchError(f"there is no model called {name!r} to host on Triton; known: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def model_config(hosted: HostedModel, options: TritonOptions) -> TritonModelConfig:
    """Triton's configuration of a model under these options; the parameters are what ``model.py`` reads."""
    return TritonModelConfig(
        name=hosted.name,
        inputs=hosted.inputs,
        outputs=hosted.outputs,
        max_batch_size=options.max_batch_size,
        dynamic_batching=options.dynamic_batching,
        instance_count=options.instance_count,
        parameters={"weights": hosted.weights_file, "torch_threads": str(options.torch_threads)},
    )


def write_model(hosted: HostedModel, config: TritonModelConfig, weights: Path, repository: Path) -> Path:
    """Put the model into an (else untouched) model repository, version 1; returns where its weights are."""
    folder = repository / hosted.name
    shutil.rmtree(folder, ignore_errors=True)
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config.render(), encoding="utf-8")
    for name in hosted.serving_files:
        shutil.copyfile(hosted.folder / name, version / name)
    return Path(shutil.copyfile(weights, version / hosted.weights_file))


def server_command(
    server: Path,
    repository: Path,
    backends: Path,
    model: str,
    ports: Mapping[str, int],
    shm_prefix: str,
    http_threads: int | None,
) -> list[str]:
    """Triton's command line."""
    command = [
        str(server),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--model-control-mode=explicit",
        f"--load-model={model}",
        # Ours is complete; completing it would run the model once more, and could change it.
        "--disable-auto-complete-config",
        f"--http-address={HOST}",
        f"--http-port={ports['http']}",
        f"--grpc-address={HOST}",
        f"--grpc-port={ports['grpc']}",
        f"--metrics-address={HOST}",
        f"--metrics-port={ports['metrics']}",
        "--allow-gpu-metrics=false",
    ]
    if http_threads is not None:
        command.append(f"--http-thread-count={http_threads}")
    return command


def _facts(
    hosted: HostedModel, options: TritonOptions, config: TritonModelConfig, installation: TritonInstallation, weights: Path
) -> dict[str, Any]:
    return {
        "name": "triton",
        "distribution": installation.label,
        "model": hosted.name,
        "weights": {
            "origin": hosted.weights_origin if options.weights is None else str(options.weights),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "device": "cpu",
        "instance_count": options.instance_count,
        "max_batch_size": options.max_batch_size,
        "dynamic_batching": options.dynamic_batching.model_dump() if options.dynamic_batching else None,
        "torch_threads": options.torch_threads,
        "http_threads": options.http_threads,
        "cpus": options.cpus,
        "config": config.render(),
        # The instances run in this interpreter's environment, see TritonInstallation.environment.
        "torch": installed_version("torch"),
        "numpy": installed_version("numpy"),
    }


def _shm_bytes(hosted: HostedModel, options: TritonOptions) -> int:
    elements = sum(math.prod(spec.dims) for spec in (*hosted.inputs, *hosted.outputs))
    return shm_needed_bytes(options.instance_count, options.max_batch_size * elements * _LARGEST_ELEMENT_BYTES)


if TYPE_CHECKING:
    _launcher: Launcher = TritonLauncher()
