"""Protobuf messages of the protocols we speak: KServe v2 (`inference`) and TorchServe's gRPC.

Only what is used, with the field numbers of the published ``.proto`` files; fields that are
left out here are kept as unknown ones and do no harm. The messages are built from
descriptors at import, in a pool of their own: no generated code that needs the right
protobuf version, and no clash with a client library that registers the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TYPES = {
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "double": descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    "float": descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
    "uint64": descriptor_pb2.FieldDescriptorProto.TYPE_UINT64,
}

#: message -> {field: "number type"}; a type is a scalar, a message of the same package, `repeated T`,
#: `map<string,T>` or `oneof T` (one group a message).
_KSERVE = {
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": "1 string", "version": "2 string", "extensions": "3 repeated string"},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": "1 bool"},
    "ModelReadyRequest": {"name": "1 string", "version": "2 string"},
    "ModelReadyResponse": {"ready": "1 bool"},
    "ModelMetadataRequest": {"name": "1 string", "version": "2 string"},
    "TensorMetadata": {"name": "1 string", "datatype": "2 string", "shape": "3 repeated int64"},
    "ModelMetadataResponse": {
        "name": "1 string",
        "versions": "2 repeated string",
        "platform": "3 string",
        "inputs": "4 repeated TensorMetadata",
        "outputs": "5 repeated TensorMetadata",
    },
    "ModelConfigRequest": {"name": "1 string", "version": "2 string"},
    "ModelConfig": {"name": "1 string", "platform": "2 string", "max_batch_size": "4 int32"},
    "ModelConfigResponse": {"config": "1 ModelConfig"},
    "RepositoryIndexRequest": {"repository_name": "1 string", "ready": "2 bool"},
    "ModelIndex": {"name": "1 string", "version": "2 string", "state": "3 string", "reason": "4 string"},
    "RepositoryIndexResponse": {"models": "1 repeated ModelIndex"},
    "InferParameter": {
        "bool_param": "1 oneof bool",
        "int64_param": "2 oneof int64",
        "string_param": "3 oneof string",
        "double_param": "4 oneof double",
        "uint64_param": "5 oneof uint64",
    },
    "InferTensorContents": {
        "bool_contents": "1 repeated bool",
        "int_contents": "2 repeated int32",
        "int64_contents": "3 repeated int64",
        "uint_contents": "4 repeated uint32",
        "uint64_contents": "5 repeated uint64",
        "fp32_contents": "6 repeated float",
        "fp64_contents": "7 repeated double",
        "bytes_contents": "8 repeated bytes",
    },
    "InferTensor": {
        "name": "1 string",
        "datatype": "2 string",
        "shape": "3 repeated int64",
        "parameters": "4 map<string,InferParameter>",
        "contents": "5 InferTensorContents",
    },
    "ModelInferRequest": {
        "model_name": "1 string",
        "model_version": "2 string",
        "id": "3 string",
        "parameters": "4 map<string,InferParameter>",
        "inputs": "5 repeated InferTensor",
        "raw_input_contents": "7 repeated bytes",
    },
    "ModelInferResponse": {
        "model_name": "1 string",
        "model_version": "2 string",
        "id": "3 string",
        "parameters": "4 map<string,InferParameter>",
        "outputs": "5 repeated InferTensor",
        "raw_output_contents": "6 repeated bytes",
    },
}

_TORCHSERVE = {
    "PredictionsRequest": {"model_name": "1 string", "model_version": "2 string", "input": "3 map<string,bytes>"},
    "PredictionResponse": {"prediction": "1 bytes"},
    "TorchServeHealthResponse": {"health": "1 string"},
    "Empty": {},
}


class Messages:
    """The message classes of one package, as attributes."""

    def __init__(self, package: str, messages: dict[str, dict[str, str]]) -> None:
        file = descriptor_pb2.FileDescriptorProto(name=f"servebench/{package}.proto", package=package, syntax="proto3")
        for name, fields in messages.items():
            message = file.message_type.add(name=name)
            for field, spec in fields.items():
                _add_field(message, package, field, spec)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        self._classes = {
            name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self._classes[name]
        except KeyError:
            raise AttributeError(name) from None


def _add_field(message: descriptor_pb2.DescriptorProto, package: str, name: str, spec: str) -> None:
    number, _, kind = spec.partition(" ")
    field = message.field.add(name=name, number=int(number), label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL)
    if kind.startswith("map<string,"):
        entry = message.nested_type.add(name=f"{''.join(part.capitalize() for part in name.split('_'))}Entry")
        entry.options.map_entry = True
        _add_field(entry, package, "key", "1 string")
        _add_field(entry, package, "value", f"2 {kind.removeprefix('map<string,').removesuffix('>')}")
        kind = f"repeated {message.name}.{entry.name}"
    if kind.startswith("oneof "):
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
        kind = kind.removeprefix("oneof ")
    if kind.startswith("repeated "):
        field.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
        kind = kind.removeprefix("repeated ")
    if kind in _TYPES:
        field.type = _TYPES[kind]
    else:
        field.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{package}.{kind}"


KSERVE = Messages("inference", _KSERVE)
KSERVE_SERVICE = "inference.GRPCInferenceService"
TORCHSERVE = Messages("org.pytorch.serve.grpc.inference", _TORCHSERVE)
TORCHSERVE_SERVICE = "org.pytorch.serve.grpc.inference.InferenceAPIsService"
