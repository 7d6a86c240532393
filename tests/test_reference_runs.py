"""Our own clients against ordinary ones (aiohttp, grpcio) on real servers: the same queries and answers, less of ourselves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e import CPUS, assert_books_balance, run
from witness import Witness

from servebench.launcher import RunningServer, find_launcher
from servebench.profile import load_profile
from servebench.record.outcome import Outcome

REFERENCE = {"http": "aiohttp", "grpc": "grpcio"}
#: The service times of so many rounds are compared, each of both clients; so many are made to have them from a machine ...
ROUNDS, MAX_ROUNDS = 3, 7
#: ... whose CPUs stood still for no more than this: what a client adds to some ms of a server's time is a few percent of it.
MAX_PAUSED_SHARE = 0.02


@pytest.fixture(
    scope="module",
    params=[pytest.param("triton", marks=pytest.mark.triton), pytest.param("torchserve", marks=pytest.mark.torchserve)],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunningServer]]:
    launcher = find_launcher(request.param)
    work = tmp_path_factory.mktemp(request.param)
    running = launcher.launch("digits", launcher.Options(), work)
    yield request.param, running
    running.stop()


@pytest.mark.parametrize("framing", ["http", "grpc"])
def test_same_counts_same_replies_and_no_slower(tmp_path: Path, server: tuple[str, RunningServer], framing: str) -> None:
    name, running = server
    found: dict[str, list[dict[str, Any]]] = {"wire": [], REFERENCE[framing]: []}
    quiet: list[int] = []
    for attempt in range(MAX_ROUNDS):
        with Witness(CPUS) as witness:
            for transport, runs in found.items():
                runs.append(one_run(name, framing, running, transport, tmp_path / f"{transport}-{attempt}"))
        if witness.paused_share() <= MAX_PAUSED_SHARE:
            quiet.append(attempt)
        if len(quiet) == ROUNDS:
            break
    first, *others = (one for runs in found.values() for one in runs)
    for one in others:
        assert one["document"]["schedule"]["sha256"] == first["document"]["schedule"]["sha256"]
        assert np.array_equal(one["records"].sample, first["records"].sample)
    if len(quiet) < ROUNDS:
        pytest.skip(
            f"counts and replies are the same; a CPU stood still too much in all but {len(quiet)} of {MAX_ROUNDS} rounds"
        )
    wire, reference = (
        [runs[attempt]["document"]["service_time"]["percentiles"]["50"] for attempt in quiet] for runs in found.values()
    )
    assert min(wire) <= min(reference), f"the wire client adds more of itself than the reference does: {wire}, {reference}"


def one_run(name: str, framing: str, running: RunningServer, transport: str, out: Path) -> dict[str, Any]:
    """360 queries in which nothing is wrong: the run's document and records."""
    data = load_profile(f"digits-{name}-{framing}").model_dump(mode="json")
    data["server"] = {"url": running.urls[framing]}
    data["load"] |= {"target_qps": 200, "min_duration_s": 2, "min_query_count": 360, "warmup_s": 1}
    data["client"]["transport"] = transport
    data["constraints"] = ["p90 <= 1s"]
    data["output_check"]["replies"] = 360
    document, records = run(data, out)
    assert (records.outcome == Outcome.OK).all(), document["errors"]
    assert_books_balance(document, out)
    assert document["output_check"]["checked"] == 360
    assert document["output_check"]["wrong"] == 0, "every kept reply equals the golden outputs"
    assert (records.issued_ns <= records.first_byte_ns).all()
    assert (records.first_byte_ns <= records.completed_ns).all()
    return {"document": document, "records": records}
