"""Everything between a profile and the first query: samples, plan, encoded requests, column files.

All of it happens before the clock starts, so that nothing is computed while measuring.
"""

from __future__ import annotations

import os
import resource
import ssl
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servebench.engine.dialect import declared_model, query_protocol
from servebench.engine.output_check import OutputCheck, load_golden
from servebench.engine.worker import WorkerSettings
from servebench.errors import ProfileError, RunError
from servebench.load.library import SampleLibrary, build_library
from servebench.load.scenario import Plan, plan_server, warmup_offsets_ns
from servebench.load.undeclared import files_library
from servebench.profile import Endpoint, Profile
from servebench.record.columns import Columns, file_bytes
from servebench.record.rundir import RunDirectory
from servebench.transport.factory import TransportSettings, ssl_context
from servebench.wire.http1 import encode_request
from servebench.wire.protocol import QueryProtocol
from servebench.wire.tensors import ModelMetadata


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a run is made of, ready to start."""

    protocol: QueryProtocol
    library: SampleLibrary
    plan: Plan
    check: OutputCheck
    keep_queries: list[int]


def query_headers(profile: Profile, server_token: str | None = None) -> list[tuple[str, str]]:
    """The profile's own headers and its bearer token, or else that of the server we launched.

    `ProfileError` when the token's environment variable is not set, or a header cannot be sent.
    """
    endpoint = profile.endpoint
    headers, token = list(endpoint.headers.items()), server_token
    if endpoint.bearer_token_env is not None:
        token = os.environ.get(endpoint.bearer_token_env)
        if not token:
            raise ProfileError(f"endpoint.bearer_token_env: the environment variable {endpoint.bearer_token_env} is not set")
    if token:
        headers.append(("Authorization", f"Bearer {token}"))
    _check_headers(endpoint, headers)
    return headers


def _check_headers(endpoint: Endpoint, headers: list[tuple[str, str]]) -> None:
    """Let those who will write them say what is wrong with them, before anything is started."""
    try:
        if endpoint.framing == "http":
            encode_request("POST", "/", "host", headers, b"")
            return
        try:
            from servebench.wire.grpc import call_headers
        except ImportError:
            return  # said later, with its install line
        call_headers("host", "/", tls=False, timeout_ns=None, metadata=headers)
    except ValueError as error:
        where = "endpoint.headers" if endpoint.bearer_token_env is None else "endpoint.headers or the token"
        raise ProfileError(f"{where}: {error}") from None


def check_ca_file(endpoint: Endpoint) -> None:
    """`ProfileError` where ``ca_file`` holds no certificates."""
    if endpoint.ca_file is not None:
        try:
            ssl_context(str(endpoint.ca_file), verify=True)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or error
            raise ProfileError(f"endpoint.ca_file: {endpoint.ca_file}: no PEM file of certificates: {reason}") from None


def prepare(profile: Profile, model: ModelMetadata) -> Preparation:
    """Samples, plan and output check for a model as the server describes it; `ProfileError` for what doesn't fit."""
    model = declared_model(profile, model)
    if profile.samples.source == "files":
        library = files_library(profile.samples)
    else:
        library = build_library(profile.samples, model.inputs, model.max_batch_size, model.outputs)
    plan = plan_server(profile.load, profile.samples, len(library))
    settings = profile.output_check
    golden = library.golden
    if settings.golden is not None:
        golden = load_golden(settings.golden, model.outputs, library.rows, batched=model.batched)
    protocol = query_protocol(profile.endpoint, model)
    check = OutputCheck(protocol.decode, model.outputs, library.batch_size, golden, rtol=settings.rtol, atol=settings.atol)
    return Preparation(protocol, library, plan, check, _evenly(plan.planned, settings.replies))


def create_columns(profile: Profile, preparation: Preparation, directory: RunDirectory) -> list[int]:
    """Make every worker's column files, with due times (relative to t=0) and samples filled in; returns rows per worker.

    `RunError` when the disk has no room for them.
    """
    workers = profile.client.workers
    plan, samples = preparation.plan, len(preparation.library)
    warmup_ns = warmup_offsets_ns(profile.load)
    phases = {
        "columns": (plan.offsets_ns, plan.sample_index),
        "warmup": (warmup_ns, np.arange(len(warmup_ns), dtype=np.int64) % samples),
    }
    for phase, (offsets_ns, sample_index) in phases.items():
        for worker in range(workers):
            share = offsets_ns[worker::workers]
            path = directory.columns_path(worker, phase)
            try:
                columns = Columns.create(path, rows=len(share), worker=worker, workers=workers)
            except OSError as error:
                needed = sum(file_bytes(len(one[0])) for one in phases.values())
                raise RunError(f"{path}: cannot reserve the records ({needed:,} bytes): {error.strerror}") from None
            columns.array("scheduled_ns")[:] = share
            columns.array("sample")[:] = sample_index[worker::workers]
            columns.release(0, len(share))
    return [len(plan.offsets_ns[worker::workers]) for worker in range(workers)]


def transport_settings(
    profile: Profile, preparation: Preparation, url: str, headers: list[tuple[str, str]]
) -> TransportSettings:
    """How queries reach the server."""
    client, endpoint = profile.client, profile.endpoint
    return TransportSettings(
        client=client.transport,
        url=url,
        target=preparation.protocol.target,
        metadata=headers,
        max_connections=client.max_connections,
        channels=client.channels,
        timeout_ns=round(profile.load.timeout_s * 1e9),
        ca_file=str(endpoint.ca_file) if endpoint.ca_file else None,
        verify_tls=endpoint.verify_tls,
    )


def worker_settings(
    profile: Profile,
    preparation: Preparation,
    directory: RunDirectory,
    url: str,
    headers: list[tuple[str, str]],
    requests_fd: int,
) -> list[WorkerSettings]:
    """What each worker is told."""
    client, load = profile.client, profile.load
    transport = transport_settings(profile, preparation, url, headers)
    return [
        WorkerSettings(
            transport=transport,
            requests_fd=requests_fd,
            columns=str(directory.columns_path(worker)),
            warmup_columns=str(directory.columns_path(worker, "warmup")),
            replies=str(replies_path(directory, worker)),
            keep_rows=[query // client.workers for query in preparation.keep_queries if query % client.workers == worker],
            pacing=client.pacing,
            warm_connections=client.warm_connections,
            max_outstanding=client.max_outstanding,
            drain_timeout_ns=round(load.drain_timeout_s * 1e9),
            cpus=client.cpus,
        )
        for worker in range(client.workers)
    ]


def replies_path(directory: RunDirectory, worker: int) -> Path:
    """Where a worker leaves the raw replies it kept."""
    return directory.path / f"replies-{worker}.npz"


def raise_open_files_limit() -> None:
    """Allow as many open files as the host permits: every connection is one, and workers inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _evenly(planned: int, wanted: int) -> list[int]:
    """``wanted`` different query numbers spread evenly over the run."""
    count = min(planned, wanted)
    return [planned * i // count for i in range(count)] if count else []
