"""What a run asks the server before it starts: what the model takes, and whether it answers at all."""

from __future__ import annotations

from servebench.engine.dialect import GRPC_EXTRA, http_target
from servebench.engine.preparation import Preparation
from servebench.errors import ProfileError, TransportError
from servebench.launcher import RunningServer
from servebench.profile import Profile
from servebench.transport.control import Discovery, discover
from servebench.transport.control_torchserve import discover_torchserve, probe
from servebench.transport.factory import ssl_context

Headers = list[tuple[str, str]]


async def discover_model(profile: Profile, url: str, headers: Headers, server: RunningServer | None) -> Discovery:
    """The server's and the model's description, over the profile's protocol. `TransportError` when there is none."""
    endpoint = profile.endpoint
    ca_file = str(endpoint.ca_file) if endpoint.ca_file else None
    if endpoint.protocol == "kserve-http":
        tls = ssl_context(ca_file, verify=endpoint.verify_tls)
        return await discover(url, endpoint.model, endpoint.version, headers=dict(headers), ssl_context=tls)
    if endpoint.protocol == "kserve-grpc":
        try:
            from servebench.transport.control_grpc import discover_grpc
        except ImportError:
            raise ProfileError(f"endpoint.protocol: {endpoint.protocol} {GRPC_EXTRA}") from None
        return await discover_grpc(url, endpoint.model, endpoint.version, metadata=headers, ca_file=ca_file)
    management_url = server.urls.get("management") if server is not None else None
    token = server.tokens.get("management") if server is not None else None
    return await discover_torchserve(management_url, endpoint.model, endpoint.version, token=token)


async def probe_model(profile: Profile, preparation: Preparation, url: str, headers: Headers) -> None:
    """Send the first sample once where the server could not be asked about the model; `TransportError` if it is refused."""
    endpoint, protocol = profile.endpoint, preparation.protocol
    if not endpoint.protocol.startswith("torchserve"):
        return
    try:
        query = protocol.encode(preparation.library.arrays(0))
    except ValueError as error:
        raise ProfileError(f"samples: {error}") from None
    ca_file = str(endpoint.ca_file) if endpoint.ca_file else None
    if protocol.framing == "http1":
        tls = ssl_context(ca_file, verify=endpoint.verify_tls)
        await probe(url, http_target(url, protocol), query.body, dict([*query.headers, *headers]), tls)
        return
    import grpc

    from servebench.transport.control_grpc import call, grpc_channel

    async with grpc_channel(url, ca_file) as channel:
        try:
            await call(channel, protocol.target, query.body, headers)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise TransportError(f"{url}: cannot be reached: {error.details()}") from None
            if code in (
                grpc.StatusCode.NOT_FOUND,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.UNIMPLEMENTED,
            ):
                refusal = f"{code.name}: {error.details()}"
                raise TransportError(f"endpoint: the server at {url} refuses the first sample: {refusal}") from None
