"""Reads safetensors files, the format of most published weights, with torch alone: servers' processes have nothing more.

The format (github.com/huggingface/safetensors, "Format"): eight bytes with the header's length,
little-endian; the header, a JSON object of each tensor's ``dtype``, ``shape`` and ``data_offsets``
after the header; then the tensors' bytes, little-endian and row by row. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, on the CPU; their memory is the file's pages.

    `ValueError` for a file that is cut off or contradicts itself; what is no such file at all may raise others.
    """
    with path.open("rb") as file:
        # Copied on write, so the tensors are ours to change and the file stays as it is.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if len(content) < start:
        raise ValueError(f"the header ends at byte {start}, the file at {len(content)}")
    header = json.loads(content[_LENGTH_BYTES:start])
    return {name: _tensor(content, start, name, entry) for name, entry in header.items() if name != "__metadata__"}


def _tensor(content: mmap.mmap, start: int, name: str, entry: dict[str, Any]) -> Tensor:
    """The tensor that ``entry`` of the header describes; ``start`` is where the header ends."""
    dtype, shape, (first, end) = _DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name} has dtype {entry['dtype']}; known: {', '.join(_DTYPES)}")
    count = math.prod(shape)
    if first < 0 or end - first != count * dtype.itemsize or start + end > len(content):
        raise ValueError(f"{name} of shape {shape} has bytes {first} to {end} of {len(content) - start}")
    if count == 0:  # which torch refuses to make of a buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + first).reshape(shape)
