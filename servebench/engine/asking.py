"""Whom a run, or ``servebench serve``, asks about a server: the control plane of its kind.

A control plane is opened for the questions at hand and closed again: while a run measures, nothing but its queries is open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeAlias

from servebench.control.kserve import KServeControl
from servebench.control.torchserve import TorchServeControl
from servebench.engine.dialect import GRPC_EXTRA
from servebench.errors import ProfileError
from servebench.launcher import RunningServer
from servebench.profile import Profile
from servebench.transport.factory import ssl_context

if TYPE_CHECKING:
    from servebench.control.kserve_grpc import KServeGrpcControl

    AnyControl: TypeAlias = KServeControl | KServeGrpcControl | TorchServeControl

Headers = list[tuple[str, str]]


@contextlib.asynccontextmanager
async def control_of_run(
    profile: Profile, url: str, headers: Headers, server: RunningServer | None
) -> AsyncIterator[AnyControl | None]:
    """The control plane of a profile's protocol; None for a TorchServe elsewhere, unless its `management_url` is given.

    `ProfileError` when its token's environment variable is not set.
    """
    control = _choose(profile, url, headers, server)
    try:
        yield control
    finally:
        if control is not None:
            await control.close()


@contextlib.asynccontextmanager
async def control_of_server(server: RunningServer) -> AsyncIterator[AnyControl]:
    """The control plane of a server that we launched, whatever its protocols: see `RunningServer.urls`."""
    urls, metrics_url, tls = server.urls, server.urls.get("metrics"), ssl_context(None, verify=True)
    control: AnyControl
    if "management" in urls:
        token = server.tokens.get("management")
        control = TorchServeControl(urls["management"], token=token, ssl_context=tls, metrics_url=metrics_url)
    elif "http" in urls:
        control = KServeControl(urls["http"], headers={}, ssl_context=tls, metrics_url=metrics_url)
    else:
        control = _over_grpc(urls["grpc"], [], None)
    try:
        yield control
    finally:
        await control.close()


def _choose(profile: Profile, url: str, headers: Headers, server: RunningServer | None) -> AnyControl | None:
    endpoint = profile.endpoint
    ca_file = str(endpoint.ca_file) if endpoint.ca_file else None
    if endpoint.protocol == "kserve-grpc":
        return _over_grpc(url, headers, ca_file)
    tls = ssl_context(ca_file, verify=endpoint.verify_tls)
    if endpoint.protocol == "kserve-http":
        return KServeControl(url, headers=dict(headers), ssl_context=tls)
    if server is not None:
        management_url, token = server.urls.get("management"), server.tokens.get("management")
    else:
        management_url, token = profile.server.management_url, _management_token(profile)
    return None if management_url is None else TorchServeControl(management_url, token=token, ssl_context=tls)


def _management_token(profile: Profile) -> str | None:
    name = profile.server.management_token_env
    if name is None:
        return None
    token = os.environ.get(name)
    if not token:
        raise ProfileError(f"server.management_token_env: the environment variable {name} is not set")
    return token


def _over_grpc(url: str, headers: Headers, ca_file: str | None) -> KServeGrpcControl:
    try:
        from servebench.control.kserve_grpc import KServeGrpcControl
    except ImportError:
        raise ProfileError(f"endpoint.protocol: kserve-grpc {GRPC_EXTRA}") from None
    return KServeGrpcControl(url, metadata=headers, ca_file=ca_file)
