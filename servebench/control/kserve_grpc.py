"""The control plane of a KServe v2 server over gRPC, with Triton's extensions, through grpcio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read at the import. Whoever uses this forks to start programs and nothing else; grpc would say at each that it cannot help.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc

from servebench.control.base import (
    ANSWER_TIMEOUT_S,
    CHANGE_TIMEOUT_S,
    NOBODY_LISTENS,
    Activity,
    ControlPlane,
    Discovery,
    ModelRepository,
    RefusedError,
    absent,
    load_refused,
    not_kserve,
    until_unloaded,
)
from servebench.errors import TransportError
from servebench.protos import KSERVE, KSERVE_SERVICE, Messages
from servebench.record.outcome import Outcome
from servebench.transport.grpcio_client import read_error
from servebench.wire.kserve_grpc import metadata_of

#: Triton's extensions that only the control plane speaks; as in `servebench.protos`, the fields that are used.
TRITON = Messages(
    "inference",
    {
        "RepositoryModelLoadRequest": {"repository_name": "1 string", "model_name": "2 string"},
        "RepositoryModelLoadResponse": {},
        "RepositoryModelUnloadRequest": {"repository_name": "1 string", "model_name": "2 string"},
        "RepositoryModelUnloadResponse": {},
        "ModelStatisticsRequest": {"name": "1 string", "version": "2 string"},
        "StatisticDuration": {"count": "1 uint64", "ns": "2 uint64"},
        "InferStatistics": {"success": "1 StatisticDuration", "fail": "2 StatisticDuration", "queue": "3 StatisticDuration"},
        "ModelStatistics": {
            "name": "1 string",
            "version": "2 string",
            "inference_count": "4 uint64",
            "execution_count": "5 uint64",
            "inference_stats": "6 InferStatistics",
        },
        "ModelStatisticsResponse": {"model_stats": "1 repeated ModelStatistics"},
    },
)


class KServeGrpcControl:
    """Asks over gRPC, at a ``grpc://`` or ``grpcs://`` address."""

    def __init__(self, url: str, *, metadata: Sequence[tuple[str, str]], ca_file: str | None) -> None:
        self._url = url
        self._metadata = [(name.lower(), value) for name, value in metadata]
        self._channel = _channel(url, ca_file)

    async def ready(self) -> bool:
        """``ServerReady``."""
        return bool((await self._ask("ServerReady", KSERVE.ServerReadyRequest(), KSERVE.ServerReadyResponse)).ready)

    async def model_ready(self, model: str, version: str | None = None) -> bool:
        """``ModelReady``."""
        request = KSERVE.ModelReadyRequest(name=model, version=version or "")
        try:
            return bool((await self._ask("ModelReady", request, KSERVE.ModelReadyResponse)).ready)
        except RefusedError:  # how Triton says it of a model that was never loaded
            return False

    async def discover(self, model: str, version: str | None = None) -> Discovery:
        """The metadata of server and model; ``config`` holds what we understand of it."""
        target = {"name": model, "version": version or ""}
        try:
            described = await self._ask("ModelMetadata", KSERVE.ModelMetadataRequest(**target), KSERVE.ModelMetadataResponse)
        except RefusedError as error:
            if str(error).startswith("UNIMPLEMENTED"):
                raise not_kserve(self._url, str(error), "torchserve-grpc") from None
            raise absent(model, self._url, str(error), [one.name for one in await self._index()]) from None
        config = server = None
        try:
            config = await self._ask("ModelConfig", KSERVE.ModelConfigRequest(**target), KSERVE.ModelConfigResponse)
            server = await self._ask("ServerMetadata", KSERVE.ServerMetadataRequest(), KSERVE.ServerMetadataResponse)
        except RefusedError:
            pass  # an extension of Triton's, and a courtesy: other servers may have neither
        about = {"name": server.name, "version": server.version, "extensions": list(server.extensions)} if server else {}
        known = None if config is None else {"name": config.config.name, "max_batch_size": config.config.max_batch_size}
        return Discovery(about, metadata_of(described, config), known)

    async def activity(self, model: str, version: str | None = None) -> Activity:
        """Triton's statistics of the model."""
        ready = await self.model_ready(model, version)
        request = TRITON.ModelStatisticsRequest(name=model, version=version or "")
        try:
            found = (await self._ask("ModelStatistics", request, TRITON.ModelStatisticsResponse)).model_stats
        except RefusedError:
            return Activity(ready)
        failed = sum(one.inference_stats.fail.count for one in found)
        return Activity(
            ready,
            requests=failed + sum(one.inference_stats.success.count for one in found),
            failed=failed,
            inferences=sum(one.inference_count for one in found),
            executions=sum(one.execution_count for one in found),
            queued=sum(one.inference_stats.queue.count for one in found),
            queue_ns=sum(one.inference_stats.queue.ns for one in found),
        )

    async def load(self, model: str) -> None:
        """``RepositoryModelLoad``, and whether the model is ready afterwards."""
        request = TRITON.RepositoryModelLoadRequest(model_name=model)
        try:
            await self._ask("RepositoryModelLoad", request, TRITON.RepositoryModelLoadResponse, CHANGE_TIMEOUT_S)
        except RefusedError as error:
            raise load_refused(model, self._url, str(error)) from None
        if not await self.model_ready(model):
            raise RefusedError(f"{self._url}: says that it loaded {model!r}, but the model is not ready")

    async def unload(self, model: str) -> None:
        """``RepositoryModelUnload``, and the end of its instances."""
        request = TRITON.RepositoryModelUnloadRequest(model_name=model)
        try:
            await self._ask("RepositoryModelUnload", request, TRITON.RepositoryModelUnloadResponse, CHANGE_TIMEOUT_S)
        except RefusedError as error:
            raise RefusedError(f"{self._url}: cannot unload {model!r} ({error})") from None

        async def states() -> set[str]:
            return {one.state for one in await self._index() if one.name == model}

        await until_unloaded(states, model, self._url)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def _index(self) -> Sequence[Any]:
        try:
            reply = await self._ask("RepositoryIndex", KSERVE.RepositoryIndexRequest(), KSERVE.RepositoryIndexResponse)
        except RefusedError:
            return []
        models: Sequence[Any] = reply.models
        return models

    async def _ask(self, name: str, request: Any, reply: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """One unary call. `RefusedError` has the status and the server's words, and nothing else."""
        call = self._channel.unary_unary(f"/{KSERVE_SERVICE}/{name}")
        try:
            return reply.FromString(await call(request.SerializeToString(), metadata=self._metadata, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            # A status may be grpcio's own, or an answer: UNAVAILABLE is also what Triton says of what it does not allow.
            outcome, words = read_error(error.code().name, error.details() or "")
            words = " ".join(words.split())
            if outcome is not Outcome.STATUS:
                why = _remedy(words, self._url) if outcome is Outcome.CONNECT else words
                raise TransportError(f"{self._url}: cannot be reached: {why}") from None
            raise RefusedError(words) from None


def _remedy(words: str, url: str) -> str:
    """grpcio's words of a connection that does not come about; where they tell of a wrong address, in ours, with the remedy."""
    if "Connection refused" in words:
        return NOBODY_LISTENS
    if "WRONG_VERSION_NUMBER" in words or "Handshake read failed (Socket closed)" in words:
        return "does not answer TLS; is it grpc://?"
    if "http1.x" in words or "HTTP/2" in words:
        found = "does not speak gRPC"
    elif words.endswith("Socket closed"):  # how Triton's HTTP port takes it
        found = "ended the connection before it spoke gRPC"
    else:
        return words
    tls = "" if url.startswith("grpcs:") else ", or behind TLS (grpcs://)"
    return f"{found}; is this the port of HTTP (http://, with the endpoint.protocol that ends in -http){tls}?"


def _channel(url: str, ca_file: str | None) -> grpc.aio.Channel:
    scheme, _, authority = url.partition("://")
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    if scheme == "grpcs":
        roots = Path(ca_file).read_bytes() if ca_file else None
        return grpc.aio.secure_channel(authority.rstrip("/"), grpc.ssl_channel_credentials(roots), options=options)
    return grpc.aio.insecure_channel(authority.rstrip("/"), options=options)


if TYPE_CHECKING:
    _control: type[ControlPlane] = KServeGrpcControl
    _repository: type[ModelRepository] = KServeGrpcControl
