"""This machine, as launchers need to know it: its loopback address, ports and who answers there, and what is installed."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from servebench.errors import LaunchError

#: Launched servers are reachable from this machine alone.
HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago (another process may take it before it is used)."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def choose_ports(wanted: Mapping[str, int]) -> dict[str, int]:
    """A port for each endpoint: the wanted one if it is free (else `LaunchError`), a free one where 0 is wanted."""
    for endpoint, port in wanted.items():
        if port and _port_taken(port):
            raise LaunchError(f"{endpoint}_port: {HOST}:{port} is in use; choose another, or 0 for a free one")
    ports = {endpoint: port for endpoint, port in wanted.items() if port}
    for endpoint in wanted.keys() - ports.keys():
        while (port := free_port()) in ports.values():
            pass
        ports[endpoint] = port
    return ports


def get(port: int, path: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """``GET`` from 127.0.0.1:``port``: status and body. `OSError` or `http.client.HTTPException` without an answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_file(name: str) -> Path | None:
    """``__init__.py`` of an installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory, on this machine, since boot; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(encoding="ascii"), flags=re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _port_taken(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of an earlier server may still be closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
        return False
