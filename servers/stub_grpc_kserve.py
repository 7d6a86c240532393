"""What the stub's model says in KServe's v2 protocol over gRPC: messages in, messages out; no sockets.

Messages are taken and given as they travel in HTTP/2's DATA: behind a prefix of a byte that
tells of compression and four of length. A reply to an inference is encoded once per number of
rows; the id of a request is put behind it, for protobuf reads joined messages as merged ones.

Protocol: KServe's "Predict Protocol - Version 2", gRPC; Triton's repository index and model configuration.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from servebench.protos import KSERVE, KSERVE_SERVICE

from .stub_kserve import DATATYPE, OUTPUT_NAME, VERSION, RequestError, StubModel, unknown_model

INFER_PATH = f"/{KSERVE_SERVICE}/ModelInfer"

_PREFIX = struct.Struct(">BL")


class Status(IntEnum):
    """gRPC's status codes, those that are used."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    UNIMPLEMENTED = 12
    UNAVAILABLE = 14


class CallError(Exception):
    """The call fails: a status, and a sentence for the client."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Inference(NamedTuple):
    """What matters of an inference request."""

    rows: int
    id: str


class GrpcModel:
    """The methods of KServe's gRPC service, for the stub's model."""

    def __init__(self, model: StubModel) -> None:
        self._model = model
        self._output = lru_cache(maxsize=None)(self._encode_output)  # two for each number of rows
        #: Path -> type of the request, and what makes the reply of one.
        self._methods: dict[str, tuple[Any, Callable[[Any], Any]]] = {
            f"/{KSERVE_SERVICE}/{name}": (request, answer)
            for name, request, answer in (
                # ServerLive's messages are ServerReady's but for their names, and those do not travel.
                ("ServerLive", KSERVE.ServerReadyRequest, lambda _: KSERVE.ServerReadyResponse(ready=True)),
                ("ServerReady", KSERVE.ServerReadyRequest, lambda _: KSERVE.ServerReadyResponse(ready=True)),
                ("ServerMetadata", KSERVE.ServerMetadataRequest, self._server_metadata),
                ("ModelReady", KSERVE.ModelReadyRequest, self._model_ready),
                ("ModelMetadata", KSERVE.ModelMetadataRequest, self._model_metadata),
                ("ModelConfig", KSERVE.ModelConfigRequest, self._model_config),
                ("RepositoryIndex", KSERVE.RepositoryIndexRequest, self._repository_index),
            )
        }

    def answer(self, path: str, data: bytes) -> bytes:
        """Reply to a call that is no inference. Raises `CallError`."""
        if path not in self._methods:
            raise CallError(Status.UNIMPLEMENTED, f"there is no method {path}")
        request, answer = self._methods[path]
        return _frame([answer(_parse(request, data)).SerializeToString()])

    def read(self, data: bytes) -> Inference:
        """Check an inference request. Raises `CallError`."""
        request = _parse(KSERVE.ModelInferRequest, data)
        self._find(request.model_name, request.model_version)
        try:
            return Inference(self._check_tensors(request), request.id)
        except RequestError as error:
            raise CallError(Status.INVALID_ARGUMENT, str(error)) from None

    def reply(self, inference: Inference, *, empty: bool = False) -> bytes:
        """Reply to an inference; ``empty``: with an output tensor that carries no data."""
        id_field = KSERVE.ModelInferResponse(id=inference.id).SerializeToString()
        return _frame([self._output(inference.rows, empty), id_field])

    def _encode_output(self, rows: int, empty: bool) -> bytes:
        values = self._model.output_values(rows)
        response = KSERVE.ModelInferResponse(
            model_name=self._model.name,
            model_version=VERSION,
            outputs=[{"name": OUTPUT_NAME, "datatype": DATATYPE, "shape": values.shape}],
            raw_output_contents=[b"" if empty else values.tobytes()],
        )
        data: bytes = response.SerializeToString()
        return data

    def _check_tensors(self, request: Any) -> int:
        if len(request.inputs) != 1:
            raise RequestError(400, f"expected 1 input for model '{self._model.name}', got {len(request.inputs)}")
        tensor, raw = request.inputs[0], request.raw_input_contents
        rows = self._model.check_input(tensor.name, tensor.datatype, list(tensor.shape))
        if not raw:
            self._model.check_size(rows, len(tensor.contents.fp32_contents), "numbers")
        elif tensor.HasField("contents") or len(raw) != 1:
            raise RequestError(400, f"{len(raw)} raw_input_contents for 1 input, or contents besides them")
        else:
            self._model.check_size(rows, len(raw[0]), "bytes")
        return rows

    def _find(self, name: str, wanted: str) -> None:
        if name != self._model.name:
            raise CallError(Status.NOT_FOUND, unknown_model(name))
        if wanted not in ("", VERSION):
            raise CallError(Status.NOT_FOUND, f"model '{name}' has no version {wanted}, only {VERSION}")

    def _server_metadata(self, _request: Any) -> Any:
        return KSERVE.ServerMetadataResponse(name="stub", version=version("servebench"))

    def _model_ready(self, request: Any) -> Any:
        ready = request.name == self._model.name and request.version in ("", VERSION)
        return KSERVE.ModelReadyResponse(ready=ready)  # Triton, too, calls an unknown model not ready

    def _model_metadata(self, request: Any) -> Any:
        self._find(request.name, request.version)
        return KSERVE.ModelMetadataResponse(**self._model.metadata())

    def _model_config(self, request: Any) -> Any:
        self._find(request.name, request.version)
        config = self._model.config()
        return KSERVE.ModelConfigResponse(config={key: config[key] for key in ("name", "platform", "max_batch_size")})

    def _repository_index(self, _request: Any) -> Any:
        return KSERVE.RepositoryIndexResponse(models=[{"name": self._model.name, "version": VERSION, "state": "READY"}])


def _frame(parts: Iterable[bytes]) -> bytes:
    message = b"".join(parts)
    return _PREFIX.pack(0, len(message)) + message


def _parse(kind: Any, data: bytes) -> Any:
    if len(data) < _PREFIX.size:
        raise CallError(Status.INVALID_ARGUMENT, f"{len(data)} bytes are no message")
    compressed, length = _PREFIX.unpack_from(data)
    if compressed:
        raise CallError(Status.UNIMPLEMENTED, "compressed messages are not understood")
    if len(data) != _PREFIX.size + length:
        raise CallError(Status.INVALID_ARGUMENT, f"a message of {length} bytes came with {len(data) - _PREFIX.size}")
    try:
        return kind.FromString(data[_PREFIX.size :])
    except DecodeError:
        raise CallError(Status.INVALID_ARGUMENT, f"the message is no {kind.DESCRIPTOR.name}") from None
