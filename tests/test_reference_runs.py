"""Our own clients against ordinary ones (aiohttp, grpcio) on real servers: the same queries and answers, less of ourselves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e import assert_books_balance, run

from servebench.launcher import RunningServer, find_launcher
from servebench.profile import load_profile
from servebench.record.outcome import Outcome

REFERENCE = {"http": "aiohttp", "grpc": "grpcio"}
#: What a client adds is seen in its quietest run: on a busy machine, of some ms of a server's time, only by the best of many.
MIN_ROUNDS, MAX_ROUNDS = 2, 8


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
    while True:
        for transport, runs in found.items():  # interleaved, so that a noisy spell hits both
            data = load_profile(f"digits-{name}-{framing}").model_dump(mode="json")
            data["server"] = {"url": running.urls[framing]}
            data["load"] |= {"target_qps": 200, "min_duration_s": 2, "min_query_count": 360, "warmup_s": 1}
            data["client"]["transport"] = transport
            data["constraints"] = ["p90 <= 1s"]
            data["output_check"]["replies"] = 360
            out = tmp_path / f"{transport}-{len(runs)}"
            document, records = run(data, out)
            assert (records.outcome == Outcome.OK).all(), document["errors"]
            assert_books_balance(document, out)
            assert document["output_check"]["checked"] == 360
            assert document["output_check"]["wrong"] == 0, "every kept reply equals the golden outputs"
            assert (records.issued_ns <= records.first_byte_ns).all()
            assert (records.first_byte_ns <= records.completed_ns).all()
            runs.append({"document": document, "records": records})
        wire, reference = ([one["document"]["service_time"]["percentiles"]["50"] for one in runs] for runs in found.values())
        if len(wire) >= MIN_ROUNDS and min(wire) <= min(reference):
            break
        assert len(wire) < MAX_ROUNDS, f"the wire client adds more of itself than the reference does: {wire}, {reference}"
    first, *others = (one for runs in found.values() for one in runs)
    for one in others:
        assert one["document"]["schedule"]["sha256"] == first["document"]["schedule"]["sha256"]
        assert np.array_equal(one["records"].sample, first["records"].sample)
