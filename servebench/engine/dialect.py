"""What a profile's protocol means for a run: how samples become requests, and raw replies outputs.

One place knows all protocols. Those that need an extra import it here, when they are asked
for; a missing one is a `ProfileError` with its install line.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from servebench.errors import ProfileError
from servebench.load.library import SampleLibrary
from servebench.load.undeclared import input_specs, launched_specs, specs_of_file
from servebench.profile import Endpoint, Profile
from servebench.wire.http1 import encode_request, parse_reply
from servebench.wire.kserve import KServeHttp
from servebench.wire.protocol import QueryProtocol
from servebench.wire.tensors import ModelMetadata
from servebench.wire.torchserve import TorchServeHttp

GRPC_EXTRA = "needs grpcio, hpack and protobuf; install them with: pip install 'servebench[grpc]'"


class Reply(NamedTuple):
    """The parts of a reply; over gRPC the status is 0 and there are no headers."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def launched_model(model: ModelMetadata, described: Mapping[str, Any]) -> ModelMetadata:
    """``model``, with its tensors declared by its launcher where the server does not describe them.

    ``described`` is `RunningServer.describe`'s. `LaunchError` for declarations that are none.
    """
    if model.inputs:
        return model
    inputs, outputs = launched_specs(described)
    return replace(model, inputs=inputs, outputs=outputs, max_batch_size=0)


def declared_model(profile: Profile, model: ModelMetadata) -> ModelMetadata:
    """``model``, with its tensors declared by the profile's files where nobody else does.

    Files that are whole bodies are no tensors, whatever the model takes; and they may hold several rows, so that
    the size of a reply is anyone's guess. `ProfileError` where the samples do not tell what the inputs are.
    """
    if profile.samples.source == "files":
        model = replace(model, inputs=(), outputs=())
    if not model.inputs:
        model = replace(model, inputs=input_specs(profile.samples), max_batch_size=0)
    if not model.outputs and profile.output_check.golden is not None:
        model = replace(model, outputs=specs_of_file(profile.output_check.golden))
    return model


def query_protocol(endpoint: Endpoint, model: ModelMetadata) -> QueryProtocol:
    """The protocol of an endpoint, for a model whose tensors are known."""
    if endpoint.protocol == "kserve-http":
        return KServeHttp(endpoint.model, endpoint.version, model.inputs, endpoint.tensor_format, endpoint.parameters)
    if endpoint.protocol == "torchserve-http":
        return TorchServeHttp(endpoint.model, endpoint.version, model.inputs, model.outputs, endpoint.body)
    require_packages(endpoint)
    from servebench.wire.kserve_grpc import KServeGrpc
    from servebench.wire.torchserve_grpc import TorchServeGrpc

    if endpoint.protocol == "kserve-grpc":
        return KServeGrpc(endpoint.model, endpoint.version, model.inputs, endpoint.parameters)
    return TorchServeGrpc(endpoint.model, endpoint.version, model.inputs, model.outputs)


def require_packages(endpoint: Endpoint) -> None:
    """`ProfileError` where a protocol over gRPC lacks its packages: before a server is started for nothing."""
    needed = {"kserve-grpc": ("grpc", "hpack", "google.protobuf"), "torchserve-grpc": ("hpack", "google.protobuf")}
    for module in needed.get(endpoint.protocol, ()):
        try:
            importlib.import_module(module)
        except ImportError:
            raise ProfileError(f"endpoint.protocol: {endpoint.protocol} {GRPC_EXTRA}") from None


def http_target(url: str, protocol: QueryProtocol) -> str:
    """The path that queries are posted to, below the server's base URL."""
    return urlsplit(url).path.rstrip("/") + protocol.target


def encode_library(
    protocol: QueryProtocol, library: SampleLibrary, url: str, headers: list[tuple[str, str]]
) -> Iterator[bytes]:
    """Every sample's request as the transport sends it: whole HTTP requests, or framed gRPC messages. `ProfileError`."""
    try:
        if protocol.framing == "grpc":
            from servebench.wire.grpc import call_headers, frame_message

            # For its ValueError: the workers build the real block.
            call_headers(urlsplit(url).netloc, protocol.target, tls=False, timeout_ns=None, metadata=headers)
            for index in range(len(library)):
                yield frame_message(protocol.encode(library.arrays(index)).body)
            return
        target, host = http_target(url, protocol), urlsplit(url).netloc
        for index in range(len(library)):
            query = protocol.encode(library.arrays(index))
            yield encode_request("POST", target, host, [*query.headers, *headers], query.body)
    except ValueError as error:
        raise ProfileError(f"endpoint: {error}") from None


def split_reply(protocol: QueryProtocol, raw: bytes) -> Reply:
    """A kept reply as the transport gave it. `ProtocolFault` when it is not one."""
    if protocol.framing == "grpc":
        from servebench.wire.grpc import unframe_message

        return Reply(0, {}, unframe_message(raw))
    return Reply(*parse_reply(raw))
