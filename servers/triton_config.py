"""Triton's model configuration: rendered as ``config.pbtxt``, and compared with what a server says it applied.

Pure text and values. Field names and meaning are those of Triton's ``ModelConfig`` (protobuf
text format); KServe data types map to Triton's by a ``TYPE_`` prefix, but for the one exception
below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .devices import InstanceGroup
from .models import TensorSpec


class DynamicBatching(BaseModel):
    """How Triton joins queued requests into one batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preferred_batch_size: list[int] = Field(default_factory=list)
    """Batch sizes worth sending off before `max_batch_size` is reached. Triton's advice is to leave this empty."""
    max_queue_delay_us: int = Field(default=0, ge=0)
    """How long the oldest request may wait for company, in microseconds; 0 batches only what is queued already."""

    @field_validator("preferred_batch_size")
    @classmethod
    def _at_least_one(cls, sizes: list[int]) -> list[int]:
        if any(size < 1 for size in sizes):
            raise ValueError(f"batch sizes are 1 or more, found {sizes}")
        return sizes


@dataclass(frozen=True, slots=True)
class TritonModelConfig:
    """The settings of one model. Dims leave out the batch axis."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    dynamic_batching: DynamicBatching | None
    instances_per_device: int
    parameters: Mapping[str, str]
    groups: tuple[InstanceGroup, ...] = (InstanceGroup("KIND_CPU"),)
    ragged: bool = False  #: requests of different sizes may share a batch
    backend: str = "python"

    @property
    def instance_count(self) -> int:
        """Instances on all devices."""
        return self.instances_per_device * sum(len(group.gpus) or 1 for group in self.groups)

    def render(self) -> str:
        """The ``config.pbtxt`` of this configuration."""
        lines = [
            f"name: {_quoted(self.name)}",
            f"backend: {_quoted(self.backend)}",
            f"max_batch_size: {self.max_batch_size}",
            *(f"input {_tensor(spec, ragged=self.ragged)}" for spec in self.inputs),
            *(f"output {_tensor(spec)}" for spec in self.outputs),
            *(f"instance_group {_group(group, self.instances_per_device)}" for group in self.groups),
        ]
        if self.dynamic_batching is not None:
            lines.append(
                f"dynamic_batching {{ preferred_batch_size: {self.dynamic_batching.preferred_batch_size} "
                f"max_queue_delay_microseconds: {self.dynamic_batching.max_queue_delay_us} }}"
            )
        for key, value in self.parameters.items():
            lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
        return "\n".join(lines) + "\n"

    def differences(self, reported: Mapping[str, Any]) -> list[str]:
        """What a server's ``/v2/models/NAME/config`` has otherwise than asked: ``"max_batch_size is 4, asked for 16"``."""
        groups = reported.get("instance_group", [])
        batching = reported.get("dynamic_batching")
        pairs: list[tuple[str, Any, Any]] = [
            ("max_batch_size", self.max_batch_size, reported.get("max_batch_size")),
            # Triton counts per GPU.
            ("instance count", self.instance_count, sum(group["count"] * len(group.get("gpus") or [0]) for group in groups)),
            ("instance kind", sorted({group.kind for group in self.groups}), sorted({group["kind"] for group in groups})),
            (
                "GPUs",
                sorted(gpu for group in self.groups for gpu in group.gpus),
                sorted(gpu for group in groups for gpu in group.get("gpus", [])),
            ),
            ("dynamic_batching", self.dynamic_batching is not None, batching is not None),
        ]
        if self.dynamic_batching is not None and batching is not None:
            delay_us = int(batching.get("max_queue_delay_microseconds", 0))
            pairs.append(("max_queue_delay_microseconds", self.dynamic_batching.max_queue_delay_us, delay_us))
            # Left empty, Triton fills in max_batch_size: the same behaviour, spelled out.
            sizes = self.dynamic_batching.preferred_batch_size or [self.max_batch_size]
            pairs.append(("preferred_batch_size", sizes, batching.get("preferred_batch_size") or [self.max_batch_size]))
        return [f"{what} is {found}, asked for {asked}" for what, asked, found in pairs if found != asked]


def _tensor(spec: TensorSpec, *, ragged: bool = False) -> str:
    kind = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    sizes = " allow_ragged_batch: true" if ragged and -1 in spec.dims else ""
    return f"{{ name: {_quoted(spec.name)} data_type: {kind} dims: {list(spec.dims)}{sizes} }}"


def _group(group: InstanceGroup, count: int) -> str:
    gpus = f" gpus: {list(group.gpus)}" if group.gpus else ""
    return f"{{ kind: {group.kind} count: {count}{gpus} }}"


def _quoted(text: str) -> str:
    # JSON's escapes are a subset of protobuf text format's.
    return json.dumps(text, ensure_ascii=False)
