"""What the hypervisor took of which CPUs."""

import os
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest
from e2e import CLIENT_CPUS, profile_data, run, stub

from servebench.engine import run as engine_run
from servebench.record.environment import CpuTimes

TICKS = os.sysconf("SC_CLK_TCK")
STAT = """cpu  30 0 10 400 0 0 0 60 5 0
cpu0 10 0 10 300 0 0 0 10 5 0
cpu1 15 0 0 60 0 0 0 20 0 0
cpu11 5 0 0 40 0 0 0 30 0 0
intr 12
"""


def test_stolen_and_total_time_of_the_cpus_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: STAT)
    assert CpuTimes.now([0]) == CpuTimes(10, 330)  # guest time is in user time already
    assert CpuTimes.now([1]) == CpuTimes(20, 95)
    assert CpuTimes.now({0, 11}) == CpuTimes(40, 405)
    assert CpuTimes.now() == CpuTimes(60, 500)


@pytest.mark.parametrize("cpus", [None, CLIENT_CPUS], ids=["whole host", "one CPU"])
def test_it_reads_what_psutil_reads(cpus: list[int] | None) -> None:
    fields = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")

    def by_psutil() -> tuple[float, float]:
        times = [psutil.cpu_times()] if cpus is None else [psutil.cpu_times(percpu=True)[cpu] for cpu in cpus]
        return sum(one.steal for one in times), sum(getattr(one, name) for one in times for name in fields)

    before, ours, after = by_psutil(), CpuTimes.now(cpus), by_psutil()
    rounding = 1e-6
    assert before[0] - rounding <= ours.stolen / TICKS <= after[0] + rounding
    assert before[1] - rounding <= ours.total / TICKS <= after[1] + rounding


def test_the_share_between_two_readings() -> None:
    assert CpuTimes(10, 100).stolen_share_until(CpuTimes(13, 200)) == 0.03
    assert CpuTimes(10, 100).stolen_share_until(CpuTimes(10, 100)) == 0


def test_a_run_tells_its_clients_cpus_from_the_whole_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int] | None] = []

    class Stealing(CpuTimes):
        """Each reading of the client's CPUs is 30 of 100 ticks further, and of the host 20 of 200."""

        @classmethod
        def now(cls, cpus: Collection[int] | None = None) -> CpuTimes:
            asked.append(None if cpus is None else list(cpus))
            times = asked.count(asked[-1])
            return CpuTimes(20 * times, 200 * times) if cpus is None else CpuTimes(30 * times, 100 * times)

    monkeypatch.setattr(engine_run, "CpuTimes", Stealing)
    with stub(tmp_path) as server:
        load = {"target_qps": 50, "min_duration_s": 0, "min_query_count": 20}
        document, data = run(profile_data(server.urls["http"], constraints=["p50 <= 1s"], load=load), tmp_path / "run")
    assert asked == [None, CLIENT_CPUS] * 2
    host = data.facts["host_cpu"]
    assert (host["steal_share"], host["client_steal_share"]) == (0.1, 0.3)
    assert document["trust"]["reasons"][-1]["code"] == "cpu_steal"
