"""The stub's model, and what it says in KServe's v2 protocol over HTTP/1.1: documents in, whole replies out; no sockets.

The model takes INPUT, FP32 of shape [rows, input_elements], and answers OUTPUT, FP32 of shape
[rows, output_elements], whose every row is 0, 1, 2, ...: it does not compute, it only takes time.
Requests are checked as a real server does, and replies are encoded once per different request
document, so that answering costs next to nothing.

Protocol: KServe's "Predict Protocol - Version 2" and its binary tensor data extension.
"""

from __future__ import annotations

import json
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

INPUT_NAME = "INPUT"
OUTPUT_NAME = "OUTPUT"
VERSION = "1"
MAX_ROWS = 128

DATATYPE = "FP32"
ELEMENT_BYTES = 4

_CACHED_ANSWERS = 256
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Reply(NamedTuple):
    """A whole HTTP reply, and how many of its bytes come before the body."""

    data: bytes
    head_bytes: int


class Answers(NamedTuple):
    """What an inference request may be answered: as it should be, or with an output tensor that carries no data."""

    good: Reply
    empty: Reply


class RequestError(Exception):
    """The request cannot be answered: an HTTP status and a sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def reply(status: int, body: bytes, content_type: str = "application/json", **headers: object) -> Reply:
    """An HTTP/1.1 reply; ``headers`` are written with ``_`` for ``-``."""
    lines = [
        f"HTTP/1.1 {status} {_PHRASES.get(status, 'Error')}",
        f"Content-Type: {content_type}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        f"Content-Length: {len(body)}",
    ]
    head = "\r\n".join([*lines, "\r\n"]).encode("ascii")
    return Reply(head + body, len(head))


def json_reply(document: object, status: int = 200) -> Reply:
    """A reply whose body is ``document`` as JSON."""
    return reply(status, json.dumps(document, separators=(",", ":")).encode())


def error_reply(status: int, message: str) -> Reply:
    """An error as KServe wants it: ``{"error": message}``."""
    return json_reply({"error": message}, status)


def unknown_model(name: str) -> str:
    """What is said of a model that is not there, in Triton's words."""
    return f"Request for unknown model: '{name}' is not found"


class StubModel:
    """A model called ``name`` with ``input_elements`` numbers per row in and ``output_elements`` out."""

    def __init__(self, name: str, input_elements: int, output_elements: int) -> None:
        self.name = name
        self._input_elements = input_elements
        self._output_elements = output_elements
        self.answers = lru_cache(maxsize=_CACHED_ANSWERS)(self._answers)

    def metadata(self) -> dict[str, Any]:
        """Body of ``GET /v2/models/NAME``."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "servebench_stub",
            "inputs": [{"name": INPUT_NAME, "datatype": DATATYPE, "shape": [-1, self._input_elements]}],
            "outputs": [{"name": OUTPUT_NAME, "datatype": DATATYPE, "shape": [-1, self._output_elements]}],
        }

    def config(self) -> dict[str, Any]:
        """Body of ``GET /v2/models/NAME/config``, the part of Triton's model configuration that applies."""
        return {
            "name": self.name,
            "platform": "servebench_stub",
            "max_batch_size": MAX_ROWS,
            "input": [{"name": INPUT_NAME, "data_type": f"TYPE_{DATATYPE}", "dims": [self._input_elements]}],
            "output": [{"name": OUTPUT_NAME, "data_type": f"TYPE_{DATATYPE}", "dims": [self._output_elements]}],
        }

    def check_input(self, name: object, datatype: object, shape: object) -> int:
        """Rows of the one input tensor, whatever the protocol it came by. Raises `RequestError`."""
        if name != INPUT_NAME:
            raise RequestError(400, f"unexpected inference input {name!r} for model '{self.name}'")
        if datatype != DATATYPE:
            raise RequestError(400, f"input {INPUT_NAME} is {DATATYPE}, got {datatype!r}")
        expected = f"[1..{MAX_ROWS},{self._input_elements}]"
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int for size in shape):
            raise RequestError(400, f"unexpected shape for input {INPUT_NAME}: expected {expected}, got {shape!r}")
        rows, elements = shape
        if elements != self._input_elements or not 1 <= rows <= MAX_ROWS:
            raise RequestError(400, f"unexpected shape for input {INPUT_NAME}: expected {expected}, got {shape!r}")
        return int(rows)

    def check_size(self, rows: int, found: int, unit: Literal["numbers", "bytes"]) -> None:
        """Raises `RequestError` unless ``rows`` rows came with as much data as they need."""
        needed = rows * self._input_elements * (ELEMENT_BYTES if unit == "bytes" else 1)
        if found != needed:
            raise RequestError(400, f"input {INPUT_NAME} got {found} {unit}, expected {needed}")

    def output_values(self, rows: int) -> npt.NDArray[np.float32]:
        """The output tensor, shape (rows, output_elements), little-endian."""
        return np.tile(np.arange(self._output_elements, dtype="<f4"), (rows, 1))

    def _answers(self, document: bytes, raw_bytes: int) -> Answers:
        """Answers to an inference request: its JSON part, and how many bytes of raw tensors follow. Raises `RequestError`."""
        request = _parse(document)
        rows = self._check_tensors(request, raw_bytes)
        binary = self._wants_binary(request)
        return Answers(self._encode(request, rows, binary, empty=False), self._encode(request, rows, binary, empty=True))

    def _check_tensors(self, request: dict[str, Any], raw_bytes: int) -> int:
        tensors = request.get("inputs")
        if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
            raise RequestError(400, f"expected 1 input for model '{self.name}': {INPUT_NAME}")
        tensor = tensors[0]
        rows = self.check_input(tensor.get("name"), tensor.get("datatype"), tensor.get("shape"))
        if "data" in tensor:
            if raw_bytes:
                raise RequestError(400, f"{raw_bytes} bytes follow a request whose tensors are in its JSON")
            self.check_size(rows, _count_numbers(tensor["data"]), "numbers")
        else:
            announced = _parameters(tensor).get("binary_data_size")
            if announced != raw_bytes:
                raise RequestError(400, f"input {INPUT_NAME} has binary_data_size {announced}, but {raw_bytes} bytes follow")
            self.check_size(rows, raw_bytes, "bytes")
        return rows

    def _wants_binary(self, request: dict[str, Any]) -> bool:
        binary = bool(_parameters(request).get("binary_data_output", False))
        outputs = request.get("outputs") or []
        if not isinstance(outputs, list):
            raise RequestError(400, "outputs must be a list")
        for output in outputs:
            if not isinstance(output, dict) or output.get("name") != OUTPUT_NAME:
                raise RequestError(400, f"unexpected inference output for model '{self.name}': it has only {OUTPUT_NAME}")
            binary = bool(_parameters(output).get("binary_data", binary))
        return binary

    def _encode(self, request: dict[str, Any], rows: int, binary: bool, *, empty: bool) -> Reply:
        values = self.output_values(rows)
        output: dict[str, Any] = {"name": OUTPUT_NAME, "datatype": DATATYPE, "shape": list(values.shape)}
        document = {"model_name": self.name, "model_version": VERSION, "outputs": [output]}
        if "id" in request:
            document["id"] = request["id"]
        if not binary:
            output["data"] = [] if empty else values.ravel().tolist()
            return json_reply(document)
        raw = b"" if empty else values.tobytes()
        output["parameters"] = {"binary_data_size": len(raw)}
        head = json.dumps(document, separators=(",", ":")).encode()
        return reply(200, head + raw, "application/octet-stream", Inference_Header_Content_Length=len(head))


def _parse(document: bytes) -> dict[str, Any]:
    try:
        request = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"failed to parse the request JSON: {error}") from None
    if not isinstance(request, dict):
        raise RequestError(400, "the request JSON must be an object")
    return request


def _parameters(part: dict[str, Any]) -> dict[str, Any]:
    parameters = part.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, "parameters must be an object")
    return parameters


def _count_numbers(data: object) -> int:
    try:
        return np.asarray(data, dtype="<f4").size
    except (TypeError, ValueError):
        raise RequestError(400, f"data of input {INPUT_NAME} must be numbers") from None
