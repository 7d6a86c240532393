"""Commands that test a server which is being served: whole, to be pasted into a shell."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from servebench.launcher import RunningServer
from servebench.profile import bundled_profiles

#: The bundled profile that fits any model whose tensors are described: random samples, modest load.
_FOR_ANY_MODEL = "stub"
_TOKEN = "SERVEBENCH_TOKEN"


def run_lines(launcher: str, server: RunningServer, model: str) -> list[str]:
    """One ``servebench run`` for each protocol of the server: with the bundled profile of this model, if there is one.

    Else, for KServe, with random samples made from the model's metadata. TorchServe describes no
    tensors, so without a profile there is no line for it.
    """
    urls = server.urls
    family = "torchserve" if "management" in urls else "kserve"
    lines = []
    for framing in ("http", "grpc"):
        if framing in urls:
            profile, overrides = _profile_for(launcher, model, f"{family}-{framing}")
            if profile is not None:
                lines.append(_line(profile, {"server": _server(server, framing)} | overrides, server))
    return lines


def _profile_for(launcher: str, model: str, protocol: str) -> tuple[str | None, dict[str, Any]]:
    """A bundled profile and what to override in it."""
    family = protocol.partition("-")[0]
    fitting: dict[str, str] = {}
    for name, path in bundled_profiles().items():
        wanted = _read(path)
        endpoint = wanted["endpoint"]
        spoken = endpoint.get("protocol", "kserve-http")
        if wanted["server"].get("launch") == launcher and endpoint["model"] == model and spoken.startswith(family):
            fitting.setdefault(spoken, name)
    if protocol in fitting:
        return fitting[protocol], {}
    if fitting:
        # The whole section: other keys of it may be those of the other protocol.
        return next(iter(fitting.values())), {"endpoint": {"model": model, "protocol": protocol}}
    if family == "kserve":
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).lstrip("._-") or "served"
        return _FOR_ANY_MODEL, {"name": name, "endpoint": {"model": model, "protocol": protocol}}
    return None, {}


def _server(server: RunningServer, framing: str) -> dict[str, str]:
    section = {"url": server.urls[framing]}
    if "management" in server.urls and not server.tokens:
        section["management_url"] = server.urls["management"]
    return section


def _line(profile: str, overrides: dict[str, Any], server: RunningServer) -> str:
    words = ["servebench", "run", profile]
    if server.tokens:
        overrides |= {"endpoint.bearer_token_env": _TOKEN}
    for key, value in overrides.items():
        words += ["--set", f"{key}={_yaml(value)}"]
    return f"{_token(server)}{shlex.join(words)}"


def _token(server: RunningServer) -> str:
    """How the shell comes by the token, which is never printed: out of the file in which TorchServe keeps it."""
    if not server.tokens:
        return ""
    code = 'import json, sys; print(json.load(open(sys.argv[1]))["inference"]["key"])'
    return f'{_TOKEN}="$(python3 -c {shlex.quote(code)} {shlex.quote(str(server.describe().get("key_file")))})" '


def _yaml(value: str | dict[str, str]) -> str:
    """A value as YAML, without quotation marks where it does without: they are hard to read inside a shell's."""
    plain = value if isinstance(value, str) else f"{{{', '.join(f'{key}: {text}' for key, text in value.items())}}}"
    with contextlib.suppress(yaml.YAMLError):
        if yaml.safe_load(plain) == value:
            return plain
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document
