"""TorchServe's gRPC ``Predictions``: the fields of `servebench.wire.torchserve` as a map of bytes. Needs protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from google.protobuf.message import DecodeError

from servebench.protos import TORCHSERVE, TORCHSERVE_SERVICE
from servebench.wire.protocol import EncodedQuery, OutputTensor
from servebench.wire.tensors import Array, TensorSpec
from servebench.wire.torchserve import decode_prediction, named_fields

PREDICTIONS = f"/{TORCHSERVE_SERVICE}/Predictions"


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
        fields = named_fields(self.inputs, arrays)
        request = TORCHSERVE.PredictionsRequest(model_name=self.model, model_version=self.version or "", input=fields)
        return EncodedQuery(request.SerializeToString(deterministic=True), [])

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        try:
            prediction: bytes = TORCHSERVE.PredictionResponse.FromString(body).prediction
        except DecodeError as error:
            raise ValueError(f"not a PredictionResponse: {error}") from None
        return decode_prediction(self.outputs, prediction, as_json=False)
