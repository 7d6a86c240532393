"""KServe v2 over gRPC: ModelInfer with raw tensor contents, and the messages that describe a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from google.protobuf.message import DecodeError

from servebench.protos import KSERVE, KSERVE_SERVICE
from servebench.wire.kserve import Parameter
from servebench.wire.protocol import EncodedQuery, OutputTensor
from servebench.wire.tensors import DATATYPES, Array, ModelMetadata, TensorSpec, from_blob, from_values, to_blob

INFER = f"/{KSERVE_SERVICE}/ModelInfer"
_MAX_AXES = 32
#: Where the typed contents of a datatype are, for servers that do not send raw ones.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


@dataclass(frozen=True, slots=True)
class KServeGrpc:
    """The `servebench.wire.protocol.QueryProtocol` of KServe v2 over gRPC."""

    model: str
    version: str | None
    inputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, Parameter]
    framing: ClassVar[Literal["grpc"]] = "grpc"
    target: ClassVar[str] = INFER

    def encode(self, arrays: Mapping[str, Array]) -> EncodedQuery:
        names = [spec.name for spec in self.inputs]
        if set(arrays) != set(names):
            raise ValueError(f"arrays are given for {sorted(arrays)}, but the model's inputs are {sorted(names)}")
        request = KSERVE.ModelInferRequest(model_name=self.model, model_version=self.version or "")
        for name, value in self.parameters.items():
            _set_parameter(request.parameters[name], value)
        for spec in self.inputs:
            array = arrays[spec.name]
            try:
                request.raw_input_contents.append(to_blob(array, spec.datatype))
            except ValueError as error:
                raise ValueError(f"input {spec.name!r}: {error}") from None
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        return EncodedQuery(request.SerializeToString(deterministic=True), [])

    def decode(self, status: int, headers: Mapping[str, str], body: bytes) -> dict[str, OutputTensor]:
        try:
            reply = KSERVE.ModelInferResponse.FromString(body)
        except DecodeError as error:
            raise ValueError(f"not a ModelInferResponse: {error}") from None
        raw = reply.raw_output_contents
        if raw and len(raw) != len(reply.outputs):
            raise ValueError(f"{len(reply.outputs)} outputs, but {len(raw)} raw contents")
        outputs: dict[str, OutputTensor] = {}
        for number, output in enumerate(reply.outputs):
            try:
                if output.name in outputs:
                    raise ValueError("is there twice")
                array = _decode_tensor(output, memoryview(raw[number]) if raw else None)
            except ValueError as error:
                raise ValueError(f"output {output.name[:80]!r}: {error}") from None
            outputs[output.name] = OutputTensor(output.datatype, array)
        return outputs


def metadata_of(reply: Any, config: Any | None) -> ModelMetadata:
    """Model metadata out of a ModelMetadataResponse and, where there is one, a ModelConfigResponse."""
    return ModelMetadata(
        name=reply.name,
        versions=tuple(reply.versions),
        platform=reply.platform,
        inputs=tuple(TensorSpec(one.name, one.datatype, tuple(one.shape)) for one in reply.inputs),
        outputs=tuple(TensorSpec(one.name, one.datatype, tuple(one.shape)) for one in reply.outputs),
        max_batch_size=None if config is None else config.config.max_batch_size,
    )


def _decode_tensor(output: Any, raw: memoryview | None) -> Array:
    shape = tuple(output.shape)
    if output.datatype not in DATATYPES:
        raise ValueError(f"unknown datatype {output.datatype[:40]!r}")
    if len(shape) > _MAX_AXES or any(size < 0 for size in shape):
        raise ValueError(f"impossible shape {list(shape)[:_MAX_AXES]}")
    if raw is not None:
        return from_blob(raw, output.datatype, shape)
    if output.datatype == "BYTES":
        return from_blob(memoryview(_framed(output.contents.bytes_contents)), "BYTES", shape)
    if output.datatype not in _CONTENTS:
        raise ValueError(f"no raw contents, and {output.datatype} has no others")
    return from_values(list(getattr(output.contents, _CONTENTS[output.datatype])), output.datatype, shape)


def _framed(items: Any) -> bytes:
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)


def _set_parameter(parameter: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        try:
            parameter.int64_param = value
        except ValueError:
            raise ValueError(f"parameter {value} does not fit in 64 bits") from None
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value
