"""What a launcher tells the processes that host a model: plain values, as JSON in the server's own configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: numpy's dtype for each KServe data type that a bundled model has.
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}

#: One tensor.
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. ``dims`` leaves out the batch axis, which the server adds in front; -1 is any size."""

    name: str
    datatype: str  #: KServe v2 name, e.g. ``FP32``
    dims: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's dtype, little-endian."""
        return DTYPES[self.datatype]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to host one model in this process. ``weights`` names a state-dict file beside it; None draws them from ``seed``."""

    model: str
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    uses_torch: bool
    pads: bool  #: queries of different sizes share a batch, zero-padded
    options: dict[str, Any] = field(default_factory=dict)  #: of the model's ``build``
    weights: str | None = None
    seed: int = 0
    #: torch's names of the devices, one per group of instances; several are used where the server says which is whose.
    devices: tuple[str, ...] = ("cpu",)
    device_plugin: str | None = None  #: module that teaches torch the device
    precision: str = "fp32"
    torch_threads: int = 1

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """What `to_json` wrote."""
        data = json.loads(text)
        return cls(
            **data
            | {
                "inputs": tuple(_spec(one) for one in data["inputs"]),
                "output": _spec(data["output"]),
                "devices": tuple(data["devices"]),
            }
        )


def _spec(data: dict[str, Any]) -> TensorSpec:
    return TensorSpec(data["name"], data["datatype"], tuple(data["dims"]))
