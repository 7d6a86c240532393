"""What requests to the digits model and its replies look like on TorchServe, which leaves both to the handler.

Three forms; a reply has the form of its request. ``n`` images are one request and one reply of
``n`` rows; TorchServe's ``batchSize`` counts requests, not images.

=============  ============================================  ==========================================
form           request body                                  reply body
=============  ============================================  ==========================================
``raw``        ``n`` x 64 little-endian FP32 (``IMAGE``)     ``n`` x 10 little-endian FP32 (``LOGITS``)
``instances``  ``{"instances": [n x [1, 8, 8]]}``            ``{"predictions": [n x [10]]}``
``inputs``     KServe v2: one input ``IMAGE`` of datatype    KServe v2: one output ``LOGITS`` of shape
               FP32 and shape ``[n, 1, 8, 8]``, as JSON      ``[n, 10]``, and the request's id if it has one
=============  ============================================  ==========================================

The form follows from the body, not from the path: TorchServe hands JSON over decoded
(``Content-Type: application/json``), anything else as bytes. So `raw` also is the content of a
multipart field ``data`` and of gRPC's input ``data``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

INPUT, OUTPUT = "IMAGE", "LOGITS"
IMAGE_SHAPE = (1, 8, 8)
_RAW = np.dtype("<f4")
_IMAGE_BYTES = math.prod(IMAGE_SHAPE) * _RAW.itemsize


class BadRequestError(ValueError):
    """A request that is not of one of the three forms; its text is for the client."""


@dataclass(frozen=True, slots=True)
class Query:
    """A request: images ``[n, 1, 8, 8]`` and the form that its reply has to have."""

    images: NDArray[np.float32]
    form: Literal["raw", "instances", "inputs"]
    request_id: str | None = None  #: KServe's ``id``


def parse(body: Any) -> Query:
    """The query in a body as TorchServe hands it over: bytes, or decoded JSON. `BadRequestError` says what is wrong."""
    if isinstance(body, bytes | bytearray):
        if not body or len(body) % _IMAGE_BYTES:
            raise BadRequestError(f"{len(body)} bytes are no images of {_IMAGE_BYTES} bytes (FP32 {list(IMAGE_SHAPE)}) each")
        return Query(np.frombuffer(body, _RAW).reshape(-1, *IMAGE_SHAPE), "raw")
    if isinstance(body, dict) and "instances" in body:
        return Query(_images("instances", body["instances"]), "instances")
    if isinstance(body, dict) and "inputs" in body:
        return Query(_v2_images(body["inputs"]), "inputs", body.get("id"))
    raise BadRequestError('send FP32 bytes as application/octet-stream, or a JSON object with "instances" or "inputs"')


def render(query: Query, logits: NDArray[np.float32], *, model: str, version: str) -> tuple[bytes, str]:
    """The reply to a query, and its content type. ``logits`` is ``[n, 10]``."""
    if query.form == "raw":
        return logits.astype(_RAW, copy=False).tobytes(), "application/octet-stream"
    document: dict[str, Any]
    if query.form == "instances":
        document = {"predictions": logits.tolist()}
    else:
        output = {"name": OUTPUT, "datatype": "FP32", "shape": list(logits.shape), "data": logits.ravel().tolist()}
        document = {"model_name": model, "model_version": version, "outputs": [output]}
        if query.request_id is not None:
            document["id"] = query.request_id
    return json.dumps(document, separators=(",", ":")).encode(), "application/json"


def render_error(error: BadRequestError) -> tuple[bytes, str]:
    """The reply to a request that is none (KServe's form), and its content type."""
    return json.dumps({"error": str(error)}).encode(), "application/json"


def _v2_images(inputs: Any) -> NDArray[np.float32]:
    match inputs:
        case [{"name": "IMAGE", "datatype": "FP32", "shape": [*_] as shape, "data": data}]:
            return _images(INPUT, data, shape)
    raise BadRequestError(f'"inputs" has to hold one input: name {INPUT}, datatype FP32, shape, and data as JSON numbers')


def _images(what: str, numbers: Any, shape: list[Any] | None = None) -> NDArray[np.float32]:
    try:
        images = np.asarray(numbers, dtype=np.float32)
        images = images if shape is None else images.reshape(shape)
    except (ValueError, TypeError):  # ragged, not numbers, not as many as the shape says
        raise BadRequestError(f"{what}: not an array of numbers{'' if shape is None else f' of shape {shape}'}") from None
    if images.shape[1:] != IMAGE_SHAPE or not len(images):
        raise BadRequestError(f"{what}: has shape {list(images.shape)}, not [n, {', '.join(map(str, IMAGE_SHAPE))}]")
    return images
