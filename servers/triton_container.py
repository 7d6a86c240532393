"""Triton in a container: which container to run for a model repository, and the devices it will see.

Triton listens on its own ports there (8000, 8001, 8002). The image has to bring what the model imports:
numpy before 2, and torch (`docker/triton.Dockerfile`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from .container import ContainerOptions, ContainerSpec, new_container_name

_REPOSITORY = PurePosixPath("/models")
_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def triton_container(
    container: ContainerOptions,
    repository: Path,
    model: str,
    ports: Mapping[str, int],
    *,
    http_threads: int | None = None,
    cpus: Sequence[int] | None = None,
) -> ContainerSpec:
    """The container that serves ``model`` of ``repository``; ``ports`` are ours, by endpoint."""
    arguments = [
        f"--model-repository={_REPOSITORY}",
        "--model-control-mode=explicit",
        f"--load-model={model}",
        # Ours is complete; completing it would run the model once more, and could change it.
        "--disable-auto-complete-config",
        *(f"--{endpoint}-port={port}" for endpoint, port in _PORTS.items()),
        f"--allow-gpu-metrics={'false' if container.gpus is None else 'true'}",
    ]
    if http_threads is not None:
        arguments.append(f"--http-thread-count={http_threads}")
    return ContainerSpec(
        name=new_container_name("triton"),
        options=container,
        command=arguments,
        ports={ports[endpoint]: port for endpoint, port in _PORTS.items()},
        volumes={repository: _REPOSITORY},
        cpus=cpus,
        entrypoint="tritonserver",
    )
