"""TorchServe's own protocols: one sample a request, and a body that is the handler's matter.

Over HTTP: *raw* posts the tensor's little-endian bytes (or a file's content) to
``/predictions/M``, *multipart* the same as a form field ``data``, and *instances* JSON
``{"instances": [...]}`` to ``/v1/models/M:predict``. Over gRPC: the bytes as input ``data``
of ``Predictions``. TorchServe describes no tensors, so what a reply must look like is known
only from golden outputs: raw replies are read as the first of them, JSON ones as numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import quote

import numpy as np
from google.protobuf.message import DecodeError

from servebench.protos import TORCHSERVE, TORCHSERVE_SERVICE
from servebench.wire.protocol import EncodedQuery, OutputTensor
from servebench.wire.tensors import Array, TensorSpec, byte_strings, from_blob, from_json, to_blob, to_json

Body = Literal["raw", "multipart", "instances"]

PREDICTIONS = f"/{TORCHSERVE_SERVICE}/Predictions"
#: Random enough not to occur in a payload by accident; the same in every request, so that requests are reproducible.
_BOUNDARY = "servebench-8f1c7e5d2b6a4903"


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
        spec, array = _only(self.inputs, arrays)
        if self.body == "instances":
            values = np.array(to_json(array, spec.datatype), dtype=object).reshape(array.shape).tolist()
            document = json.dumps({"instances": [values]}, separators=(",", ":"))
            return EncodedQuery(document.encode(), [("Content-Type", "application/json")])
        payload = _payload(spec, array)
        if self.body == "raw":
            return EncodedQuery(payload, [("Content-Type", "application/octet-stream")])
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="data"; filename="data"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + payload + f"\r\n--{_BOUNDARY}--\r\n".encode()
        return EncodedQuery(body, [("Content-Type", f"multipart/form-data; boundary={_BOUNDARY}")])

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        return _decode(self.outputs, body, as_json=self.body == "instances")


@dataclass(frozen=True, slots=True)
class TorchServeGrpc:
    """The `servebench.wire.protocol.QueryProtocol` of TorchServe's gRPC Predictions."""

    model: str
    version: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    framing: ClassVar[Literal["grpc"]] = "grpc"
    target: ClassVar[str] = PREDICTIONS

    def encode(self, arrays: Mapping[str, Array]) -> EncodedQuery:
        spec, array = _only(self.inputs, arrays)
        request = TORCHSERVE.PredictionsRequest(model_name=self.model, model_version=self.version or "")
        request.input["data"] = _payload(spec, array)
        return EncodedQuery(request.SerializeToString(deterministic=True), [])

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        try:
            prediction: bytes = TORCHSERVE.PredictionResponse.FromString(body).prediction
        except DecodeError as error:
            raise ValueError(f"not a PredictionResponse: {error}") from None
        return _decode(self.outputs, prediction, as_json=False)


def _only(inputs: tuple[TensorSpec, ...], arrays: Mapping[str, Array]) -> tuple[TensorSpec, Array]:
    if len(inputs) != 1 or set(arrays) != {inputs[0].name}:
        raise ValueError(f"TorchServe takes one input a query, found {sorted(arrays)}")
    return inputs[0], arrays[inputs[0].name]


def _payload(spec: TensorSpec, array: Array) -> bytes:
    """The tensor's bytes; a single string is sent as it is, without KServe's length prefix."""
    if spec.datatype == "BYTES":
        (content,) = byte_strings(array.reshape(1) if array.ndim == 0 else array)
        return content
    return to_blob(array, spec.datatype)


def _decode(outputs: tuple[TensorSpec, ...], body: bytes, *, as_json: bool) -> dict[str, OutputTensor]:
    if not body:
        raise ValueError("the reply is empty")
    if not outputs:
        return {}
    spec = outputs[0]
    if not as_json:
        return {spec.name: OutputTensor(spec.datatype, from_blob(memoryview(body), spec.datatype, spec.shape))}
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the reply is not JSON") from None
    predictions = document.get("predictions") if isinstance(document, dict) else None
    if not isinstance(predictions, list) or len(predictions) != 1:
        raise ValueError('the reply has no list "predictions" of one element')
    return {spec.name: OutputTensor(spec.datatype, from_json(predictions[0], spec.datatype, spec.shape))}
