"""What requests to a bundled model and its replies look like on TorchServe, which leaves both to the handler.

A reply has the form of its request. ``n`` rows are one request and one reply of ``n`` rows;
TorchServe's ``batchSize`` counts requests, not rows.

=============  ===================================================  =======================================
form           request                                              reply
=============  ===================================================  =======================================
``raw``        a multipart field or gRPC input for each input,      the output's little-endian bytes
               called by its name, with its little-endian bytes;
               or all inputs' bytes, one input after the other,
               as HTTP body, or field or gRPC input ``data``
``instances``  ``{"instances": [row, ...]}``; a row is an array, or  ``{"predictions": [row, ...]}``
               for several inputs an object of arrays by name
``inputs``     KServe v2: every input with name, datatype, shape    KServe v2: the output, and the
               ``[n, ...]`` and data, as JSON                       request's id if it has one
=============  ===================================================  =======================================

``raw`` says no shape, so it follows from the number of bytes: as many rows as fit, or, where a
model leaves sizes open, one row whose open sizes are all equal.

The form follows from the body, not from the path: TorchServe hands JSON over decoded
(``Content-Type: application/json``), anything else as bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .settings import Array, TensorSpec

_JSON = "application/json"


class BadRequestError(ValueError):
    """A request that is not of one of the forms; its text is for the client."""


@dataclass(frozen=True, slots=True)
class Request:
    """Arrays ``[n, ...]`` in the order of the model's inputs, and the form that the reply has to have."""

    arrays: tuple[Array, ...]
    form: Literal["raw", "instances", "inputs"]
    request_id: str | None = None  #: KServe's ``id``


def parse(row: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Request:
    """The request in a row as TorchServe hands it over; `BadRequestError` says what is wrong with it."""
    if all(isinstance(row.get(spec.name), bytes | bytearray) for spec in inputs):
        return _checked(Request(tuple(_from_bytes(row[spec.name], [spec])[0] for spec in inputs), "raw"), inputs)
    if len(inputs) > 1 and any(spec.name in row for spec in inputs):
        raise BadRequestError(f"found the fields {', '.join(row)}; send bytes for each of {_names(inputs)}")
    body = row.get("data", row.get("body"))
    if isinstance(body, bytes | bytearray):
        return Request(_from_bytes(body, inputs), "raw")
    if isinstance(body, dict) and "instances" in body:
        return _checked(Request(_from_instances(body["instances"], inputs), "instances"), inputs)
    if isinstance(body, dict) and "inputs" in body:
        return _checked(Request(_from_v2(body["inputs"], inputs), "inputs", body.get("id")), inputs)
    raise BadRequestError(
        f"send the bytes of {_names(inputs)} as application/octet-stream or as fields of these names, "
        'or a JSON object with "instances" or "inputs"'
    )


def render(request: Request, output: Array, spec: TensorSpec, *, model: str, version: str) -> tuple[bytes, str]:
    """The reply to a request, and its content type."""
    if request.form == "raw":
        return output.astype(spec.dtype, copy=False).tobytes(), "application/octet-stream"
    document: dict[str, Any]
    if request.form == "instances":
        document = {"predictions": output.tolist()}
    else:
        tensor = {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(output.shape),
            "data": output.ravel().tolist(),
        }
        document = {"model_name": model, "model_version": version, "outputs": [tensor]}
        if request.request_id is not None:
            document["id"] = request.request_id
    return json.dumps(document, separators=(",", ":")).encode(), _JSON


def render_error(message: str) -> tuple[bytes, str]:
    """The reply to a request that cannot be answered (KServe's form), and its content type."""
    return json.dumps({"error": message}).encode(), _JSON


def _names(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in inputs)


def _from_bytes(body: bytes | bytearray, inputs: Sequence[TensorSpec]) -> tuple[Array, ...]:
    """The inputs in one run of bytes."""
    if any(-1 in spec.dims for spec in inputs):
        rows, size = 1, _open_size(len(body), inputs)
    else:
        rows, size = divmod(len(body), _row_bytes(inputs, 0))[0], 0
    if not body or rows * _row_bytes(inputs, size) != len(body):
        described = " then ".join(f"{spec.datatype} {list(spec.dims)}" for spec in inputs)
        raise BadRequestError(
            f"{len(body)} bytes are not {'one row' if size else f'rows of {_row_bytes(inputs, 0)} bytes'} of {described}"
        )
    arrays, start = [], 0
    for spec in inputs:
        dims = [size if declared == -1 else declared for declared in spec.dims]
        count = rows * math.prod(dims)
        arrays.append(np.frombuffer(body, spec.dtype, count, start).reshape(rows, *dims))
        start += count * spec.dtype.itemsize
    return tuple(arrays)


def _row_bytes(inputs: Sequence[TensorSpec], size: int) -> int:
    """Bytes of one row whose open sizes are all ``size``."""
    return sum(
        spec.dtype.itemsize * math.prod(size if declared == -1 else declared for declared in spec.dims) for spec in inputs
    )


def _open_size(length: int, inputs: Sequence[TensorSpec]) -> int:
    """The open size, 1 or more, of a row of ``length`` bytes, or one beside it if there is none."""
    low, high = 1, max(length, 1)
    while low < high:  # the bytes of a row grow with its size
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _row_bytes(inputs, middle) < length else (low, middle)
    return low


def _from_instances(instances: Any, inputs: Sequence[TensorSpec]) -> tuple[Array, ...]:
    if len(inputs) == 1:
        return (_from_numbers("instances", instances, inputs[0]),)
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise BadRequestError(f'"instances" has to hold objects with {_names(inputs)}')
    return tuple(_from_numbers(spec.name, [one.get(spec.name) for one in instances], spec) for spec in inputs)


def _from_v2(tensors: Any, inputs: Sequence[TensorSpec]) -> tuple[Array, ...]:
    found: dict[Any, dict[str, Any]] = {}
    if isinstance(tensors, list):
        found = {tensor["name"]: tensor for tensor in tensors if isinstance(tensor, dict) and "name" in tensor}
    arrays = []
    for spec in inputs:
        match found.get(spec.name):
            case {"datatype": spec.datatype, "shape": [*_] as shape, "data": data}:
                arrays.append(_from_numbers(spec.name, data, spec, shape))
            case _:
                raise BadRequestError(
                    f'"inputs" has to hold {spec.name} with datatype {spec.datatype}, shape, and data as JSON numbers'
                )
    if len(tensors) > len(inputs):
        raise BadRequestError(f'"inputs" has to hold {_names(inputs)} and nothing else')
    return tuple(arrays)


def _from_numbers(what: str, numbers: Any, spec: TensorSpec, shape: list[Any] | None = None) -> Array:
    try:
        array = np.asarray(numbers)
        if not np.can_cast(array.dtype, spec.dtype, "same_kind") or array.dtype.kind == "b":
            raise TypeError  # words, or fractions where whole numbers are wanted
        array = array.astype(spec.dtype)
        array = array if shape is None else array.reshape(shape)
    except (ValueError, TypeError):  # ragged, not numbers, not as many as the shape says
        raise BadRequestError(f"{what}: not an array of numbers{'' if shape is None else f' of shape {shape}'}") from None
    return array


def _checked(request: Request, inputs: Sequence[TensorSpec]) -> Request:
    """The request, if all its inputs have shapes that the model allows, and equally many rows."""
    for array, spec in zip(request.arrays, inputs, strict=True):
        fits = array.ndim == len(spec.dims) + 1 and all(
            size == declared or (declared == -1 and size > 0) for size, declared in zip(array.shape[1:], spec.dims, strict=True)
        )
        if not fits or not len(array):
            raise BadRequestError(f"{spec.name}: has shape {list(array.shape)}, not [n, {', '.join(map(str, spec.dims))}]")
    if len({len(array) for array in request.arrays}) > 1:
        raise BadRequestError(f"the inputs have {[len(array) for array in request.arrays]} rows, not equally many")
    return request
