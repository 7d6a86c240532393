"""Traces a model's network to TorchScript, for servers that run it without Python.

The network, its weights and its precision are those that the other backends host
(`serving.torch_model`); tensors travel as declared, so casts to the precision and back are part of
the file. It is traced on the CPU and names no device: whoever loads it chooses one.

Run as a program, it reads what to trace as JSON (`settings`, `weights`, `target`) from its standard input.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import MODELS
from .hosted import Settings
from .serving.torch_model import TORCH_DTYPES, in_precision, load_network

_ROWS = 2  # of the example: one row could be taken for something to repeat
_INPUT_DTYPES = {"FP32": torch.float32, "INT64": torch.int64}


class Casting(nn.Module):
    """A network of another precision, between tensors as they travel."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs in the model's order to its output, which is fp32."""
        output: Tensor = self.network(*(one.to(self._dtype) if one.is_floating_point() else one for one in inputs))
        return output.float()


def trace(settings: Settings, weights: Path | None) -> Any:
    """The network as a TorchScript module; ``weights`` is the file of its weights, None where they come from the seed.

    `ValueError` for weights of something else, and for a network that makes up its mind by its
    inputs: the trace would always do what it did for the example.
    """
    build = importlib.import_module(f"{__package__}.{settings.model}.network").build
    if weights is not None:
        settings = replace(settings, weights=weights.name)
    network = in_precision(load_network(build, settings, weights.parent if weights else Path()), settings.precision)
    jit: Any = torch.jit  # without types of its own
    casting = Casting(network, TORCH_DTYPES[settings.precision]).eval()
    # Kept for a look at them; that torch deprecates TorchScript is none of the user's concern (Triton batches nothing newer).
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = jit.trace(casting, tuple(_example(settings)), check_trace=False)
    for one in caught:
        if issubclass(one.category, jit.TracerWarning):
            raise ValueError(str(one.message))
    return traced


def _example(settings: Settings) -> list[Tensor]:
    """Zeros in the shapes of the model's inputs."""
    open_size = MODELS[settings.model].traced_size
    return [
        torch.zeros([_ROWS, *(open_size if size == -1 else size for size in spec.dims)], dtype=_INPUT_DTYPES[spec.datatype])
        for spec in settings.inputs
    ]


def main() -> None:
    """See the module."""
    asked = json.load(sys.stdin)
    settings = Settings.from_json(asked["settings"])
    trace(settings, asked["weights"] and Path(asked["weights"])).save(asked["target"])


if __name__ == "__main__":
    main()
