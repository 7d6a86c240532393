"""Starts Triton Inference Server with one of our models: ``server.launch: triton``.

Plan. What is known to fail late or silently is checked first (`triton_install`, `models.options`).
Then a model repository is rendered under the work directory, and Triton starts on it, on loopback,
with explicit model control; `triton_server` waits for it and ends it. What hosts the model there is
Triton's Python backend, or its PyTorch backend with the same network as TorchScript (`triton_torchscript`).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from servebench.hostcheck import CheckGroup
from servebench.launcher import Launcher

from .container import IMAGES_OWN, ContainerOptions, ContainerProcess, container_devices
from .host import HOST, choose_ports, installed_version
from .models.options import Hosting, HostingOptions, prepare
from .models.serving import TRITON_FILES
from .process import ServerProcess
from .triton_config import DynamicBatching, TritonModelConfig
from .triton_container import triton_container
from .triton_install import check_machine, find_installation, shm_needed_bytes
from .triton_server import TritonServer, new_shm_prefix
from .triton_torchscript import MODEL_FILE, check_traceable, find_libtorch, write_torchscript

_LARGEST_ELEMENT_BYTES = 8  # of KServe's data types of fixed size
_ASSUMED_OPEN_SIZE = 512  # of axes that a model leaves open, to reckon with


class TritonOptions(HostingOptions):
    """``server.options`` of the Triton launcher."""

    backend: Literal["python", "torchscript"] = "python"
    """What runs the model: Triton's Python backend, or its PyTorch (libtorch) backend with the network traced to TorchScript;
    that one comes with full Triton images only, and joins queries of one size only."""
    max_batch_size: int = Field(default=16, ge=1)
    """Largest batch the server forms; 1 for none. A query of more rows than this is refused."""
    dynamic_batching: DynamicBatching | None = None
    """Join queued requests into batches; without it, each request is executed alone."""
    instance_count: int = Field(default=1, ge=1, le=256)
    """Instances of the model on each of its devices: a process each, with `torchscript` a thread (`instance_group.count`)."""
    http_threads: int | None = Field(default=None, ge=1)
    """Threads that handle HTTP requests; Triton's default (8) when omitted."""
    cpus: list[int] | None = Field(default=None, min_length=1)
    """CPUs the server and its instances may use, e.g. `[0]`; all when omitted."""
    binary: str | None = None
    """A `tritonserver` to start: a file, or `PATH` for the first on the PATH; the nvidia-pytriton wheel's when omitted."""
    container: ContainerOptions | None = None
    """Run Triton in a container, whose image has to bring torch or the PyTorch backend; a process of this host when omitted."""
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
        if self.container is not None and self.binary is not None:
            raise ValueError("binary is a program of this host, so it cannot go with container")
        given = [port for port in (self.http_port, self.grpc_port, self.metrics_port) if port]
        if len(set(given)) < len(given):
            raise ValueError(f"http_port, grpc_port and metrics_port must differ, found {given}")
        return self


class TritonLauncher:
    """Hosts a model of `MODELS` on Triton."""

    name: ClassVar[str] = "triton"
    Options: type[BaseModel] = TritonOptions

    def check_host(self) -> list[CheckGroup]:
        """What ``servebench doctor`` shows: Triton by wheel, by local binary, by container."""
        from .triton_doctor import check_host

        return check_host()

    def launch(self, model: str, options: TritonOptions, work_dir: Path) -> TritonServer:
        """Check the machine, start Triton with ``model`` on 127.0.0.1, wait until it is ready.

        Writes ``triton.log`` and ``model_repository/`` under ``work_dir``. Call it from the main
        thread: the server ends with the thread that started it. `LaunchError` says what to do.
        """
        present = None if options.container is None else container_devices(options.container)
        hosting = prepare(model, options, server="Triton", present=present)
        torchscript = options.backend == "torchscript"
        if torchscript:
            check_traceable(hosting)
            if options.container is None:
                find_libtorch(options.binary)
        ports = choose_ports({"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port})
        config = model_config(hosting, options)

        work_dir.mkdir(parents=True, exist_ok=True)
        work_dir = work_dir.resolve()
        repository = work_dir / "model_repository"
        if torchscript:
            write_torchscript_model(hosting, config, repository, timeout_s=options.startup_timeout_s)
        else:
            write_model(hosting, config, repository)
        shm_prefix = new_shm_prefix()
        start = _start_process if options.container is None else _start_container
        process, distribution = start(config, options, repository, ports, shm_prefix)
        server = TritonServer(
            process,
            config=config,
            config_path=repository / model / "config.pbtxt",
            ports=ports,
            shm_prefix=shm_prefix,
            scratch=work_dir / "backends",
            facts=_facts(hosting, options, config) | distribution,
        )
        server.wait_ready(options.startup_timeout_s)
        return server


def model_config(hosting: Hosting, options: TritonOptions) -> TritonModelConfig:
    """Triton's configuration of a model under these options.

    The parameter ``serving`` is what the Python backend's processes read. Tensors have the same names
    on the PyTorch backend: names that are neither arguments of ``forward`` nor numbered stand for them in order
    (its documentation, "Naming Convention").
    """
    if options.backend == "torchscript":
        # It takes every core otherwise.
        backend, parameters = "pytorch", {"INTRA_OP_THREAD_COUNT": str(options.torch_threads)}
    else:
        backend, parameters = "python", {"serving": hosting.settings.to_json()}
    return TritonModelConfig(
        backend=backend,
        name=hosting.model.name,
        inputs=hosting.model.inputs,
        outputs=(hosting.model.output,),
        max_batch_size=options.max_batch_size,
        dynamic_batching=options.dynamic_batching,
        instances_per_device=options.instance_count,
        parameters=parameters,
        groups=hosting.placement.instance_groups,
        # The PyTorch backend would strip what is ragged of its shape.
        ragged=hosting.model.pads and backend == "python",
    )


def write_model(hosting: Hosting, config: TritonModelConfig, repository: Path) -> None:
    """Put the model into an (else untouched) model repository, version 1, for the Python backend."""
    version = _new_version(config, repository)
    for file in hosting.model.serving_files(TRITON_FILES):
        shutil.copyfile(file, version / file.name)
    if hosting.weights is not None and hosting.settings.weights is not None:
        shutil.copyfile(hosting.weights, version / hosting.settings.weights)


def write_torchscript_model(hosting: Hosting, config: TritonModelConfig, repository: Path, *, timeout_s: float) -> None:
    """The same for the PyTorch backend."""
    write_torchscript(hosting, _new_version(config, repository) / MODEL_FILE, timeout_s=timeout_s)


def _new_version(config: TritonModelConfig, repository: Path) -> Path:
    """The folder of version 1 of a model that is in the repository from now on."""
    folder = repository / config.name
    shutil.rmtree(folder, ignore_errors=True)
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config.render(), encoding="utf-8")
    return version


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


def _start_process(
    config: TritonModelConfig, options: TritonOptions, repository: Path, ports: Mapping[str, int], shm_prefix: str
) -> tuple[ServerProcess, dict[str, Any]]:
    """A Triton of this host, and facts about it."""
    work_dir = repository.parent
    env = dict(os.environ)
    if options.backend == "torchscript":
        libtorch = find_libtorch(options.binary)
        server, backends, label = libtorch.server, libtorch.backends, str(libtorch.server)
    else:
        installation = find_installation(options.binary)
        env = installation.environment(env)
        check_machine(installation, env, shm_bytes=_shm_bytes(config))
        server, backends, label = installation.server, installation.backend_directory(work_dir), installation.label
    command = server_command(server, repository, backends, config.name, ports, shm_prefix, options.http_threads)
    process = ServerProcess("triton", command, work_dir / "triton.log", env=env, cpus=options.cpus)
    return process, {"distribution": label}


def _start_container(
    config: TritonModelConfig, options: TritonOptions, repository: Path, ports: Mapping[str, int], _shm_prefix: str
) -> tuple[ServerProcess, dict[str, Any]]:
    """A Triton in a container, and facts about it; it has a /dev/shm of its own."""
    assert options.container is not None
    spec = triton_container(
        options.container, repository, config.name, ports, http_threads=options.http_threads, cpus=options.cpus
    )
    process = ContainerProcess("triton", spec, repository.parent / "triton.log")
    return process, {"distribution": options.container.image, "container": process.describe(), **IMAGES_OWN}


def _facts(hosting: Hosting, options: TritonOptions, config: TritonModelConfig) -> dict[str, Any]:
    cpus = options.cpus or sorted(os.sched_getaffinity(0))
    # Its torch is the backend's own libtorch, and it has no numpy.
    of_torchscript = {"traced_by_torch": installed_version("torch"), "torch": "the backend's own", "numpy": None}
    return {
        "name": "triton",
        "backend": options.backend,
        **hosting.facts(processes=config.instance_count, cpus=len(cpus)),
        **(of_torchscript if options.backend == "torchscript" else {}),
        "instance_count": config.instance_count,
        "max_batch_size": options.max_batch_size,
        "dynamic_batching": options.dynamic_batching.model_dump() if options.dynamic_batching else None,
        "http_threads": options.http_threads,
        "cpus": options.cpus,
        "config": config.render(),
    }


def _shm_bytes(config: TritonModelConfig) -> int:
    """Shared memory for full batches; open axes count as `_ASSUMED_OPEN_SIZE`."""
    elements = sum(
        math.prod(_ASSUMED_OPEN_SIZE if size == -1 else size for size in spec.dims)
        for spec in (*config.inputs, *config.outputs)
    )
    return shm_needed_bytes(config.instance_count, config.max_batch_size * elements * _LARGEST_ELEMENT_BYTES)


if TYPE_CHECKING:
    _launcher: Launcher = TritonLauncher()
