"""A locustfile for `benchmarks.peers.locust`: users of FastHttpUser that post one body, back to back or at a rate.

Settings come as JSON in ``PEER_SETTINGS``; the CPU time of the test without Locust's start goes to stderr.
"""

import json
import os
import sys
import time
from typing import Any

from locust import FastHttpUser, constant_throughput, events, task

SETTINGS = json.loads(os.environ["PEER_SETTINGS"])
BODY = bytes.fromhex(SETTINGS["body"])
HEADERS = dict(SETTINGS["headers"])


class Poster(FastHttpUser):
    """One user."""

    if SETTINGS["rate_qps"] is not None:
        wait_time = constant_throughput(SETTINGS["rate_qps"] / SETTINGS["connections"])

    @task
    def post(self) -> None:
        self.client.post(SETTINGS["path"], data=BODY, headers=HEADERS)


@events.test_start.add_listener
def _begin(**_: Any) -> None:
    SETTINGS["cpu_s"] = time.process_time()


@events.test_stop.add_listener
def _end(**_: Any) -> None:
    print(f"CPU {time.process_time() - SETTINGS['cpu_s']}", file=sys.stderr, flush=True)
