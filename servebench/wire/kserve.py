"""The KServe v2 inference protocol over HTTP, as pure bytes: metadata in, requests out, replies in.

Two tensor formats (https://github.com/kserve/open-inference-protocol and Triton's binary
tensor data extension). *json*: the body is one JSON object with the numbers in it. *binary*:
the JSON object is followed by each tensor's raw bytes in the order of the list; its own length
travels in the Inference-Header-Content-Length header, and each tensor's size in its
``binary_data_size`` parameter.

Replies are not trusted: a server can answer 200 and yet send tensors that are empty, cut short
or of another size than their shape says. `decode_infer` either returns whole tensors or raises
`ValueError` with one bounded line that says what is wrong.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from servebench.wire.protocol import EncodedQuery, OutputTensor
from servebench.wire.tensors import DATATYPES, Array, ModelMetadata, TensorSpec, from_blob, from_json, to_blob, to_json

Parameter = str | int | float | bool
TensorFormat = Literal["binary", "json"]

HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY_OUTPUT = "binary_data_output"
_BINARY_SIZE = "binary_data_size"
_ERROR_TEXT_CHARS = 300
_MAX_AXES = 32  # numpy's limit until 2.0

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def model_path(model: str, version: str | None = None) -> str:
    """``/v2/models/M[/versions/V]``, percent-encoded; metadata is there, ``/config``, ``/stats``, ``/ready`` below it."""
    parts = [model] if version is None else [model, version]
    for part in parts:
        if not part.strip("."):  # empty, or a dot segment that proxies resolve away
            raise ValueError(f"{part!r} cannot be part of a path")
    return "/v2/models/" + "/versions/".join(quote(part, safe="") for part in parts)


def infer_path(model: str, version: str | None = None) -> str:
    """Where inference requests are posted."""
    return model_path(model, version) + "/infer"


@dataclass(frozen=True, slots=True)
class KServeHttp:
    """The `servebench.wire.protocol.QueryProtocol` of KServe v2 over HTTP."""

    model: str
    version: str | None
    inputs: tuple[TensorSpec, ...]
    tensor_format: TensorFormat
    parameters: Mapping[str, Parameter]
    framing: ClassVar[Literal["http1"]] = "http1"

    @property
    def target(self) -> str:
        return infer_path(self.model, self.version)

    def encode(self, arrays: Mapping[str, Array]) -> EncodedQuery:
        return EncodedQuery(*encode_infer(self.inputs, arrays, tensor_format=self.tensor_format, parameters=self.parameters))

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        return decode_outputs(status, headers, body)


def parse_metadata(metadata: bytes, config: bytes | None = None) -> ModelMetadata:
    """Read the body of ``GET model_path`` and, where the server has it (Triton), of ``GET model_path/config``.

    Inputs and outputs that the server leaves out are empty. `ValueError` says what is malformed.
    """
    document = _object(_parse(metadata, "model metadata"), "model metadata")
    name = document.get("name")
    if not isinstance(name, str):
        raise ValueError(f"model metadata: name is {_show(name)}, expected a string")
    versions = document.get("versions") or []
    if not isinstance(versions, list):
        raise ValueError(f"model metadata: versions is {_show(versions)}, expected a list")
    return ModelMetadata(
        name=name,
        versions=tuple(str(version) for version in versions),
        platform=str(document.get("platform") or ""),
        inputs=_parse_specs(document, "inputs"),
        outputs=_parse_specs(document, "outputs"),
        max_batch_size=None if config is None else _parse_max_batch_size(config),
    )


def encode_infer(
    inputs: Sequence[TensorSpec],
    arrays: Mapping[str, Array],
    *,
    tensor_format: TensorFormat = "binary",
    parameters: Mapping[str, Parameter] | None = None,
) -> tuple[bytes, list[tuple[str, str]]]:
    """Body and headers (without Content-Length) of one query: every input of the model, in ``inputs``' order.

    The shape sent is the array's own. ``parameters`` are the request's (``priority``,
    ``timeout``, the model's own). The reply is asked for in the same format. `ValueError` when
    an array is missing, unknown, of another dtype, or cannot be written in ``tensor_format``.
    """
    names = [spec.name for spec in inputs]
    if set(arrays) != set(names):
        raise ValueError(f"arrays are given for {sorted(arrays)}, but the model's inputs are {sorted(names)}")
    request_parameters: dict[str, Parameter] = dict(parameters or {})
    if _BINARY_OUTPUT in request_parameters:
        raise ValueError(f"parameter {_BINARY_OUTPUT!r} is set by the tensor format")
    for name, value in request_parameters.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"parameter {name!r} is {value}, which JSON cannot carry")
    tensors: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for spec in inputs:
        array = arrays[spec.name]
        tensor: dict[str, Any] = {"name": spec.name, "shape": list(array.shape), "datatype": spec.datatype}
        try:
            if tensor_format == "binary":
                blobs.append(to_blob(array, spec.datatype))
                tensor["parameters"] = {_BINARY_SIZE: len(blobs[-1])}
            else:
                tensor["data"] = to_json(array, spec.datatype)
        except ValueError as error:
            raise ValueError(f"input {spec.name!r}: {error}") from None
        tensors.append(tensor)
    if tensor_format == "binary":
        request_parameters[_BINARY_OUTPUT] = True
    request: dict[str, Any] = {"inputs": tensors}
    if request_parameters:
        request["parameters"] = request_parameters
    header = json.dumps(request, separators=(",", ":"), ensure_ascii=False).encode()
    if tensor_format == "json":
        return header, [("Content-Type", "application/json")]
    return b"".join([header, *blobs]), [("Content-Type", "application/octet-stream"), (HEADER_LENGTH, str(len(header)))]


def decode_infer(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Array]:
    """The outputs of a reply by name; see `decode_outputs`."""
    return {name: output.array for name, output in decode_outputs(status, headers, body).items()}


def decode_outputs(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
    """The outputs of a reply by name, with the datatypes the server gave them.

    Header names are matched in any case. Fixed-size tensors are read-only views of ``body``.
    Every reply that is not HTTP 200 with complete, consistent tensors is a `ValueError`.
    """
    if status != 200:
        raise ValueError(f"HTTP status {status}: {error_text(body)}")
    fields = {name.lower(): value for name, value in headers.items()}
    encoding = fields.get("content-encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"the body has Content-Encoding {_show(encoding)}, which was not asked for")
    json_length = _header_length(fields.get(HEADER_LENGTH.lower()), len(body))
    document = _object(_parse(body[:json_length], "the reply"), "the reply")
    if "error" in document:
        raise ValueError(f"HTTP status 200, but an error: {error_text(body[:json_length])}")
    listed = document.get("outputs")
    if not isinstance(listed, list):
        raise ValueError(f"the reply's outputs are {_show(listed)}, expected a list")
    blobs = _Blobs(memoryview(body)[len(body) if json_length is None else json_length :], framed=json_length is not None)
    outputs: dict[str, OutputTensor] = {}
    for tensor in listed:
        spec = _parse_spec(tensor, "output", smallest=0)
        if spec.name in outputs:
            raise ValueError(f"output {_show(spec.name)} comes twice")
        try:
            outputs[spec.name] = OutputTensor(spec.datatype, _decode_tensor(tensor, spec, blobs))
        except ValueError as error:
            raise ValueError(f"output {_show(spec.name)}: {error}") from None
    blobs.require_empty()
    return outputs


def error_text(body: bytes) -> str:
    """A server's error message out of an error body: one line of at most 300 printable characters."""
    text = body[: 16 * _ERROR_TEXT_CHARS].decode("utf-8", "replace")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("error"), str):
        text = document["error"]
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(line) > _ERROR_TEXT_CHARS:
        line = line[: _ERROR_TEXT_CHARS - 1] + "…"
    return line or "(empty body)"


class _Blobs:
    """The bytes behind the JSON part, handed out in order."""

    def __init__(self, data: memoryview, *, framed: bool) -> None:
        self._data = data
        self._framed = framed
        self._offset = 0

    def take(self, size: int) -> memoryview:
        # Triton leaves the length header out when all tensors are empty: no blobs is not a fault in itself.
        if size and not self._framed:
            raise ValueError(f"{_BINARY_SIZE} is {size}, but the reply has no {HEADER_LENGTH} header")
        left = len(self._data) - self._offset
        if size > left:
            raise ValueError(f"{_BINARY_SIZE} is {size}, but only {left} bytes of the body are left")
        self._offset += size
        return self._data[self._offset - size : self._offset]

    def require_empty(self) -> None:
        if self._offset != len(self._data):
            raise ValueError(f"{len(self._data) - self._offset} bytes left over after the last output")


def _decode_tensor(tensor: dict[str, Any], spec: TensorSpec, blobs: _Blobs) -> Array:
    parameters = tensor.get("parameters")
    size = _object(parameters, "parameters").get(_BINARY_SIZE) if parameters is not None else None
    if size is None:
        if "data" not in tensor:
            raise ValueError("has no data")
        return from_json(tensor["data"], spec.datatype, spec.shape)
    if "data" in tensor:
        raise ValueError("has both JSON and binary data")
    if type(size) is not int or size < 0:
        raise ValueError(f"{_BINARY_SIZE} is {_show(size)}, expected a number of bytes")
    return from_blob(blobs.take(size), spec.datatype, spec.shape)


def _header_length(text: str | None, body_length: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{HEADER_LENGTH} is {_show(text)}, expected a number of bytes")
    if int(text) > body_length:
        raise ValueError(f"{HEADER_LENGTH} is {text}, but the body has only {body_length} bytes")
    return int(text)


def _parse_max_batch_size(config: bytes) -> int:
    value = _object(_parse(config, "model config"), "model config").get("max_batch_size", 0)  # protobuf's default
    if type(value) is not int or value < 0:
        raise ValueError(f"model config: max_batch_size is {_show(value)}, expected a number from 0")
    return value


def _parse_specs(document: dict[str, Any], key: str) -> tuple[TensorSpec, ...]:
    listed = document.get(key) or []
    if not isinstance(listed, list):
        raise ValueError(f"model metadata: {key} is {_show(listed)}, expected a list")
    try:
        specs = tuple(_parse_spec(tensor, key[:-1], smallest=-1) for tensor in listed)
    except ValueError as error:
        raise ValueError(f"model metadata: {error}") from None
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError(f"model metadata: two {key} have the same name")
    return specs


def _parse_spec(tensor: object, what: str, *, smallest: int) -> TensorSpec:
    """Name, datatype and shape of a tensor; ``smallest`` is -1 where sizes may be open."""
    fields = _object(tensor, f"an {what}")
    name, datatype, shape = fields.get("name"), fields.get("datatype"), fields.get("shape")
    if not isinstance(name, str) or not name:
        raise ValueError(f"an {what}'s name is {_show(name)}, expected a string")
    where = f"{what} {_show(name)}"
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise ValueError(f"{where}: datatype is {_show(datatype)}, known are {', '.join(DATATYPES)}")
    if not isinstance(shape, list) or any(type(size) is not int or not smallest <= size < 2**63 for size in shape):
        raise ValueError(f"{where}: shape is {_show(shape)}, expected a list of integers from {smallest}")
    if len(shape) > _MAX_AXES:
        raise ValueError(f"{where}: shape has {len(shape)} axes, more than {_MAX_AXES}")
    return TensorSpec(name, datatype, tuple(shape))


def _parse(text: bytes, what: str) -> object:
    try:
        document: object = json.loads(text.decode())  # strictly UTF-8: given bytes, loads would guess
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 JSON") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    return document


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_show(value)}, expected an object")
    return value


def _show(value: object) -> str:
    """``value`` in bounded form on one line, whatever the server sent."""
    return _REPR.repr(value)
