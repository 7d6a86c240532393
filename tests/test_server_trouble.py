"""Real servers in trouble: a Triton that goes away, a TorchServe that is full, wants another token, or gets too much."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e import Quiet, assert_books_balance, run
from scripted_peers import End, Tape
from scripted_peers import run as run_async

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.launcher import RunningServer, find_launcher
from servebench.profile import load_profile
from servebench.record.outcome import Outcome
from servebench.record.progress import Snapshot
from servebench.record.rundata import RunData
from servebench.transport.grpc import GrpcTransport
from servebench.wire.grpc import call_headers, frame_message


def launch(name: str, tmp_path: Path, **options: Any) -> RunningServer:
    launcher = find_launcher(name)
    return launcher.launch("digits", launcher.Options.model_validate(options), tmp_path)


def settings(profile: str, url: str, **load: Any) -> dict[str, Any]:
    data = load_profile(profile).model_dump(mode="json")
    data["server"] = {"url": url}
    data["load"] |= {"warmup_s": 0, "min_query_count": 100, "drain_timeout_s": 3, "timeout_s": 3, **load}
    data["constraints"] = ["p99 <= 800ms", "errors < 1%"]
    return data


def run_until_triton_goes(
    tmp_path: Path, server: RunningServer, framing: str, number: signal.Signals, **load: Any
) -> tuple[dict[str, Any], RunData, int]:
    """A run whose Triton gets a signal after a second: its judged document, its records, and when (`now_ns`) that was."""
    sent_ns: list[int] = []

    def stop(snapshot: Snapshot) -> None:
        if not sent_ns and snapshot.elapsed_s > 1:
            sent_ns.append(now_ns())
            os.kill(server.describe()["pid"], number)

    document, data = run(settings(f"digits-triton-{framing}", server.urls[framing], **load), tmp_path / "run", Quiet(stop))
    assert sent_ns
    assert document["verdict"] == "FAIL", document["trust"]["reasons"]
    assert_books_balance(document, tmp_path / "run")
    return document, data, sent_ns[0]


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[RunningServer]:
    (tmp_path / "triton").mkdir()
    server = launch("triton", tmp_path / "triton")
    yield server
    server.stop()


@pytest.mark.triton
def test_a_triton_that_is_killed_mid_run(tmp_path: Path, triton: RunningServer) -> None:
    document, _, _ = run_until_triton_goes(tmp_path, triton, "http", signal.SIGKILL, target_qps=100, min_duration_s=6)
    assert document["counts"]["ok"] > 50
    kinds = {error["kind"] for error in document["errors"]}
    assert "connect" in kinds, "most of the rest was refused"
    # What it drops without a word is stale or reset; nothing is garbage.
    assert kinds <= {"connect", "reset", "stale"}


@pytest.mark.triton
def test_a_triton_that_is_stopped_mid_run(tmp_path: Path, triton: RunningServer) -> None:
    """Triton 2.51 unloads its models for some seconds, in which it refuses with a status; then come GOAWAY and the end.

    SIGINT does the same. (Over HTTP it goes on serving busy connections for half a minute.)
    """
    load = {"target_qps": 100, "min_duration_s": 8}
    document, data, sent_ns = run_until_triton_goes(tmp_path, triton, "grpc", signal.SIGTERM, **load)
    before = (data.issued_ns > 0) & (data.issued_ns + data.facts["start_ns"] < sent_ns)
    assert before.sum() > 50 and (data.outcome[before] == Outcome.OK).all(), "what was under way is answered"
    assert {error["kind"] for error in document["errors"]} == {"status", "connect"}
    assert {error["detail"] for error in document["errors"] if error["kind"] == "connect"} == {"connect: Connection refused"}


@pytest.mark.triton
def test_no_call_is_lost_to_the_goaway_of_a_triton(triton: RunningServer) -> None:
    """Many calls are under way when it comes: each is answered, if only that the server exits, and those after find nobody."""
    netloc = triton.urls["grpc"].removeprefix("grpc://")
    block = call_headers(netloc, "/inference.GRPCInferenceService/ServerLive", tls=False, timeout_ns=None)
    callers = 32

    async def test() -> None:
        async def call(row: int) -> End:
            """Calls one after the other until one gets no reply; its end."""
            while True:
                transport.issue(row, frame_message(b""))
                end = await tape.of(row)
                if end.outcome not in (Outcome.OK, Outcome.STATUS):
                    return end
                row += callers

        tape = Tape(keep=False)
        transport = GrpcTransport(triton.urls["grpc"], tape, block, channels=2)
        await transport.open(1)
        os.kill(triton.describe()["pid"], signal.SIGTERM)
        failed = await asyncio.gather(*map(call, range(callers)))
        await transport.close()
        assert {end.detail for end in failed} == {"connect: Connection refused"}
        assert len(tape.order) > 10 * callers

    run_async(test())


@pytest.fixture(scope="module")
def full_torchserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = launch("torchserve", tmp_path_factory.mktemp("torchserve"), job_queue_size=1, token_auth=True)
    yield server
    server.stop()


@pytest.mark.torchserve
@pytest.mark.parametrize(
    ("framing", "words"),
    [
        pytest.param("http", "HTTP 503: ", id="HTTP says 503"),
        pytest.param("grpc", "INTERNAL: ", id="gRPC says INTERNAL"),
    ],
)
def test_a_full_job_queue_is_an_error_status(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch, framing: str, words: str
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", full_torchserve.tokens["inference"])
    data = settings(f"digits-torchserve-{framing}", full_torchserve.urls[framing], target_qps=3_000, min_duration_s=1)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    data["constraints"] = ["p99 <= 3s", "errors < 1%"]
    document, _ = run(data, tmp_path / "run")
    assert_books_balance(document, tmp_path / "run")
    refused = [error for error in document["errors"] if error["kind"] == "status"]
    assert refused, document["errors"]
    assert all(error["detail"].startswith(words) for error in refused)
    assert sum(error["count"] for error in refused) > 20
    assert document["counts"]["ok"] > 20
    assert document["verdict"] in ("FAIL", "INVALID")
    assert [item["result"] for item in document["constraints"] if item["text"] == "errors < 1%"] == ["FAIL"]
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert full_torchserve.tokens["inference"].encode() not in file.read_bytes()


@pytest.mark.torchserve
@pytest.mark.parametrize("framing", ["http", "grpc"])
def test_a_wrong_token_is_found_before_any_load(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", "wrong")
    data = settings(f"digits-torchserve-{framing}", full_torchserve.urls[framing], target_qps=10)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    with pytest.raises(TransportError, match=r"refuses the first sample: (HTTP 400|PERMISSION_DENIED)"):
        run(data, tmp_path / "run")


@pytest.mark.torchserve
def test_a_body_that_is_too_large_is_found_before_any_load(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", full_torchserve.tokens["inference"])
    (tmp_path / "bodies").mkdir()
    (tmp_path / "bodies" / "large.bin").write_bytes(bytes(68 << 20))  # it is told to take 64 MiB
    data = settings("digits-torchserve-http", full_torchserve.urls["http"], target_qps=10)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    data["samples"] = {"source": "files", "path": str(tmp_path / "bodies")}
    data["output_check"] = {}
    with pytest.raises(TransportError, match=r"refuses the first sample: HTTP 413"):
        run(data, tmp_path / "run")
