"""Who runs where: `client.apart`, and the process that watches."""

import os
import threading
from typing import Any

import pytest

from servebench.engine.cpus import kept_off, with_cpus_named
from servebench.profile import parse_profile


def resolved(monkeypatch: pytest.MonkeyPatch, allowed: set[int], *, url: str | None = None, **client: Any) -> tuple[Any, Any]:
    """The CPUs of the client, and those of the server's options."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: allowed)
    options = client.pop("options", {})
    server = {"url": url} if url else {"launch": "stub", "options": options}
    data = {
        "name": "x",
        "server": server,
        "endpoint": {"model": "stub"},
        "load": {"target_qps": 1},
        "constraints": ["p99 <= 1s"],
    }
    profile = with_cpus_named(parse_profile({**data, "client": {"apart": True, **client}}, source="test"))
    return profile.client.cpus, profile.server.options.get("cpus")


@pytest.mark.parametrize(
    ("allowed", "workers", "client", "server"),
    [
        pytest.param({0, 1}, 1, [1], [0], id="two CPUs"),
        pytest.param({0, 1, 2, 3}, 1, [3], [0, 1, 2], id="the server gets the rest"),
        pytest.param({8, 2, 5, 11}, 2, [8, 11], [2, 5], id="only allowed ones, a CPU for each worker"),
        pytest.param({4}, 1, None, None, id="one CPU is shared"),
        pytest.param({0, 1}, 2, None, None, id="nothing would be left for the server"),
    ],
)
def test_the_last_cpus_are_the_clients(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], workers: int, client: list[int] | None, server: list[int] | None
) -> None:
    assert resolved(monkeypatch, allowed, workers=workers) == (client, server)


def test_cpus_that_the_user_named_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(monkeypatch, {0, 1, 2}, options={"cpus": [1]}) == ([2], [1])
    assert resolved(monkeypatch, {0, 1, 2}, apart=False, cpus=[0]) == ([0], None)
    assert resolved(monkeypatch, {0, 1, 2}, apart=False) == (None, None)
    assert resolved(monkeypatch, {0, 1, 2}, cpus=[1]) == ([1], [0, 2])
    assert resolved(monkeypatch, {0, 1}, cpus=[0, 1]) == ([0, 1], None)


def test_a_server_that_runs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(monkeypatch, {0, 1, 2}, url="http://127.0.0.1:1") == ([2], None)


def test_the_process_that_watches_keeps_off_the_workers_cpus_with_all_its_threads() -> None:
    allowed, last = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(10,))
    thread.start()
    try:
        with kept_off([last]):
            for one in (0, thread.native_id):
                assert one is not None
                assert os.sched_getaffinity(one) == (allowed - {last} or allowed)
        assert os.sched_getaffinity(thread.native_id or 0) == os.sched_getaffinity(0) == allowed
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("cpus", [None, sorted(os.sched_getaffinity(0))], ids=["any CPU", "every CPU"])
def test_it_stays_where_there_is_no_other_cpu(cpus: list[int] | None) -> None:
    allowed = os.sched_getaffinity(0)
    with kept_off(cpus):
        assert os.sched_getaffinity(0) == allowed


def test_what_was_resolved_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory's profile.yaml names the CPUs and still says apart."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    data = {"name": "x", "server": {"launch": "stub"}, "endpoint": {"model": "stub"}, "load": {"target_qps": 1}}
    profile = parse_profile({**data, "constraints": ["p99 <= 1s"], "client": {"apart": True}}, source="test")
    named = with_cpus_named(profile)
    assert with_cpus_named(parse_profile(named.public_dict(), source="again")) == named
