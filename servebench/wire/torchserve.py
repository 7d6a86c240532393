"""TorchServe's own protocols: one sample a request, and a body that is the handler's matter.

Over HTTP: *raw* posts the tensor's little-endian bytes (or a file's content) to
``/predictions/M``, *multipart* a form to the same, and *instances* JSON ``{"instances": [row]}`` to
``/v1/models/M:predict``. Over gRPC: ``Predictions`` with a map of bytes. TorchServe hands the fields
of a form, and the entries of the map, to its handler as one dict: a model of one input finds its
bytes there as ``data``, as every handler of TorchServe's own does; one of several finds each under
the input's name. A row of instances is an array, or for several inputs an object of arrays by name.

TorchServe describes no tensors, so what a reply must look like is known only from golden outputs
or who launched the server: raw replies are read as the first of them, JSON ones as numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import quote

import numpy as np

from servebench.wire.protocol import EncodedQuery, OutputTensor
from servebench.wire.tensors import Array, TensorSpec, byte_strings, from_blob, from_json, numpy_dtype, to_blob, to_json

Body = Literal["raw", "multipart", "instances"]
_Written = TypeVar("_Written")

#: Random enough not to occur in a payload by accident; the same in every request, so that requests are reproducible.
_BOUNDARY = "servebench-8f1c7e5d2b6a4903"
#: What the only input of a model is called in a form or a map.
_DATA = "data"
#: Names that need no quoting in a form: how other characters are written there is not agreed on.
_FIELD_NAME = re.compile(r"[ !#-\[\]-~]+")


@dataclass(frozen=True, slots=True)
class TorchServeHttp:
    """The `servebench.wire.protocol.QueryProtocol` of TorchServe's REST API. ``outputs`` are those with golden values."""

    model: str
    version: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    body: Body
    framing: ClassVar[Literal["http1"]] = "http1"

    @property
    def target(self) -> str:
        if self.body == "instances":
            return f"/v1/models/{quote(self.model, safe='')}:predict"
        version = "" if self.version is None else f"/{quote(self.version, safe='')}"
        return f"/predictions/{quote(self.model, safe='')}{version}"

    def encode(self, arrays: Mapping[str, Array]) -> EncodedQuery:
        if self.body == "instances":
            document = json.dumps({"instances": [_instance(self.inputs, arrays)]}, separators=(",", ":"))
            return EncodedQuery(document.encode(), [("Content-Type", "application/json")])
        fields = named_fields(self.inputs, arrays)
        if self.body == "multipart":
            return EncodedQuery(_form(fields), [("Content-Type", f"multipart/form-data; boundary={_BOUNDARY}")])
        if len(fields) > 1:
            raise ValueError(f"body raw carries one input, the model has {', '.join(fields)}; set endpoint.body: multipart")
        return EncodedQuery(fields[_DATA], [("Content-Type", "application/octet-stream")])

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        return decode_prediction(self.outputs, body, as_json=self.body == "instances")


def named_fields(inputs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> dict[str, bytes]:
    """What the handler finds in its dict."""
    payloads = _of_each(inputs, arrays, _payload)
    return {_DATA: payloads[inputs[0].name]} if len(inputs) == 1 else payloads


def _instance(inputs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> Any:
    """The sample as a row of TF-serving's JSON."""
    rows = _of_each(inputs, arrays, _nested)
    return rows[inputs[0].name] if len(inputs) == 1 else rows


def _form(fields: Mapping[str, bytes]) -> bytes:
    """A multipart form that uploads each field as a file of binary data."""
    parts = []
    for name, content in fields.items():
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f"input {name!r}: no name for the field of a form; use torchserve-grpc, or body instances")
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{_BOUNDARY}--\r\n".encode()])


def _of_each(
    inputs: tuple[TensorSpec, ...], arrays: Mapping[str, Array], write: Callable[[TensorSpec, Array], _Written]
) -> dict[str, _Written]:
    """Every input as ``write`` writes it, by name, in the model's order. `ValueError` names the input."""
    names = [spec.name for spec in inputs]
    if set(arrays) != set(names):
        raise ValueError(f"arrays are given for {sorted(arrays)}, but the model's inputs are {sorted(names)}")
    written = {}
    for spec in inputs:
        try:
            written[spec.name] = write(spec, arrays[spec.name])
        except ValueError as error:
            raise ValueError(f"input {spec.name!r}: {error}") from None
    return written


def _payload(spec: TensorSpec, array: Array) -> bytes:
    """The tensor's bytes; a single string is sent as it is, without KServe's length prefix."""
    if spec.datatype != "BYTES":
        return to_blob(array, spec.datatype)
    strings = byte_strings(array)
    if len(strings) != 1:
        raise ValueError(f"{len(strings)} strings, but bytes say where one ends only if it is alone; use body instances")
    return strings[0]


def _nested(spec: TensorSpec, array: Array) -> Any:
    """The tensor as nested lists, or its only value."""
    return np.array(to_json(array, spec.datatype), dtype=object).reshape(array.shape).tolist()


def decode_prediction(outputs: tuple[TensorSpec, ...], body: bytes, *, as_json: bool) -> dict[str, OutputTensor]:
    if not body:
        raise ValueError("the reply is empty")
    if not outputs:
        return {}
    spec = outputs[0]
    if not as_json:
        shape = _sized(spec.shape, len(body) // numpy_dtype(spec.datatype).itemsize)
        return {spec.name: OutputTensor(spec.datatype, from_blob(memoryview(body), spec.datatype, shape))}
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the reply is not JSON") from None
    predictions = document.get("predictions") if isinstance(document, dict) else None
    if not isinstance(predictions, list) or len(predictions) != 1:
        raise ValueError('the reply has no list "predictions" of one element')
    shape = _nested_shape(spec.shape, predictions[0])
    return {spec.name: OutputTensor(spec.datatype, from_json(predictions[0], spec.datatype, shape))}


def _sized(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """``shape``, its one open size, if it has one, such that it holds ``count`` elements, or fewer if none does."""
    row = math.prod(size for size in shape if size != -1)
    return tuple(count // max(1, row) if size == -1 else size for size in shape)


def _nested_shape(shape: tuple[int, ...], values: object) -> tuple[int, ...]:
    """``shape``, its open sizes those of nested lists."""
    sizes = []
    for declared in shape:
        found = len(values) if isinstance(values, list) else 0
        sizes.append(found if declared == -1 else declared)
        values = values[0] if isinstance(values, list) and values else None
    return tuple(sizes)
