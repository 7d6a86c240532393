"""The load generator that an application's author writes with asyncio in an afternoon: over aiohttp, or over grpc.aio.

It runs in its peer's own environment: ``python asyncio_load.py CLIENT < settings.json``, both made by
`benchmarks.peers.asyncio_clients`; one line of JSON is the answer. Latency is counted from the send,
as nearly everybody does; uvloop is used, because that is the faster loop.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

Send = Callable[[], Awaitable[None]]


async def measure(send: Send, settings: dict[str, Any]) -> dict[str, Any]:
    times_ns: list[int] = []
    errors = 0

    async def query() -> None:
        nonlocal errors
        sent_ns = time.monotonic_ns()
        try:
            await send()
        except Exception:  # whatever the client library raises is one failed query
            errors += 1
        else:
            times_ns.append(time.monotonic_ns() - sent_ns)

    async def in_turns(end_ns: int) -> None:
        while time.monotonic_ns() < end_ns:
            await query()

    await query()
    times_ns.clear()
    cpu_s, begin_ns = time.process_time(), time.monotonic_ns()
    end_ns = begin_ns + round(settings["duration_s"] * 1e9)
    if settings["arrivals"] == "closed":
        await asyncio.gather(*(in_turns(end_ns) for _ in range(settings["connections"])))
    else:
        await on_schedule(query, begin_ns, end_ns, settings)
    return {
        "times_ns": times_ns,
        "errors": errors,
        "duration_s": (time.monotonic_ns() - begin_ns) / 1e9,
        "cpu_s": time.process_time() - cpu_s,
    }


async def on_schedule(query: Send, begin_ns: int, end_ns: int, settings: dict[str, Any]) -> None:
    rng, mean_gap_ns = random.Random(0), 1e9 / settings["rate_qps"]
    poisson = settings["arrivals"] == "poisson"
    due_ns = float(begin_ns)
    tasks: set[asyncio.Task[None]] = set()
    while due_ns < end_ns:
        wait_ns = due_ns - time.monotonic_ns()
        # Overdue queries are sent at once, but replies must be read in between.
        await asyncio.sleep(max(wait_ns, 0) / 1e9)
        task = asyncio.create_task(query())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due_ns += rng.expovariate(1) * mean_gap_ns if poisson else mean_gap_ns
    await asyncio.gather(*tasks)


async def over_aiohttp(settings: dict[str, Any]) -> dict[str, Any]:
    import aiohttp

    url, body, headers = settings["url"] + settings["path"], bytes.fromhex(settings["body"]), dict(settings["headers"])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send() -> None:
            async with session.post(url, data=body, headers=headers) as reply:
                await reply.read()
                reply.raise_for_status()

        return await measure(send, settings)


async def over_grpc(settings: dict[str, Any]) -> dict[str, Any]:
    import grpc

    body = bytes.fromhex(settings["body"])
    async with grpc.aio.insecure_channel(settings["url"].rpartition("//")[2]) as channel:
        call = channel.unary_unary(settings["path"])

        async def send() -> None:
            await call(body)

        return await measure(send, settings)


if __name__ == "__main__":
    client = {"aiohttp": over_aiohttp, "grpc.aio": over_grpc}[sys.argv[1]]
    json.dump(uvloop.run(client(json.load(sys.stdin))), sys.stdout)
