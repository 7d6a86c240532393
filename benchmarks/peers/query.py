"""The query that all parties send, made by servebench's own encoders, so that all move the same bytes."""

from __future__ import annotations

import numpy as np

from benchmarks.nginx import BINARY_MODEL, INFER_PATH, INPUT, MODEL
from benchmarks.peers.base import Target
from servebench.wire.kserve import encode_infer
from servebench.wire.kserve_grpc import INFER, KServeGrpc

_ARRAYS = {INPUT.name: np.zeros((1, 4), dtype=np.float32)}

BODY, HEADERS = encode_infer([INPUT], _ARRAYS, tensor_format="json")
MESSAGE = KServeGrpc(MODEL, None, (INPUT,), {}).encode(_ARRAYS).body


def http_target(url: str) -> Target:
    """The null model at an HTTP server."""
    return Target(url=url, model=MODEL, path=INFER_PATH, body=BODY, headers=tuple(HEADERS), binary_model=BINARY_MODEL)


def grpc_target(url: str) -> Target:
    """The null model at a gRPC server (``grpc://``)."""
    return Target(url=url, model=MODEL, path=INFER, body=MESSAGE)
