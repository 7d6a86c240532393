"""The peers: load generators that servebench is measured beside, each in an environment of its own.

`PEERS` lists them all; `ready_peers` are those that can run on this machine, set up.
"""

from __future__ import annotations

from benchmarks.peers.asyncio_clients import AIOHTTP, GRPC_AIO
from benchmarks.peers.base import Peer, PeerProtocol, PeerResult, Progress, Target
from benchmarks.peers.h2load import H2Load
from benchmarks.peers.hey import Hey
from benchmarks.peers.locust import Locust
from benchmarks.peers.openai_clients import AIPerf, GuideLLM
from benchmarks.peers.perf_analyzer import PerfAnalyzer
from benchmarks.peers.wrk import Wrk
from servebench.errors import RunError

__all__ = ["PEERS", "Peer", "PeerResult", "Target", "ready_peers"]

PEERS: tuple[Peer, ...] = (Wrk(), H2Load(), Hey(), PerfAnalyzer(), AIOHTTP, GRPC_AIO, Locust(), AIPerf(), GuideLLM())


def ready_peers(protocol: PeerProtocol, progress: Progress) -> list[Peer]:
    """The peers that speak ``protocol``, set up; ``progress`` gets a line on each that is skipped, with the reason."""
    ready = []
    for peer in PEERS:
        if protocol not in peer.protocols:
            continue
        reason = peer.absent()
        if reason is None:
            try:
                peer.set_up(progress)
            except (RunError, OSError) as error:
                reason = str(error)
        if reason is None:
            ready.append(peer)
        else:
            progress(f"{peer.name} is skipped: {reason}")
    return ready
