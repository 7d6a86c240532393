"""A stand-in for the commands ``docker`` and ``podman``: records its exact arguments, and keeps "containers" as processes.

Like the real ones: ``run`` stays in the foreground, prints the container's output and ends with its exit code;
the container lives on when that command is killed; published ports that are taken, absent images
and an unreachable daemon are refused in the engine's own words and with its exit codes.

State is a folder: ``calls.jsonl`` (one argument list a line), ``images`` (names, one a line), ``pullable``
(names that ``pull`` finds), ``broken`` (if there, every command fails with its text), ``refusal`` (likewise,
only ``run``), and a JSON file per container.

A container is the image's command as it is, with ``@PORT@`` replaced by the host's first published port. Where
``FAKE_ENGINE_IMAGE`` names a Python file, it is run instead, with the command as its arguments and the
published ports and volumes (inside to outside, JSON) in ``PUBLISHED`` and ``VOLUMES``.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ENGINE, STATE = Path(sys.argv[0]).name, Path(os.environ["FAKE_ENGINE_STATE"])
VALUED = {
    *("--name", "--label", "--pull", "--stop-signal", "--publish", "--shm-size", "--gpus", "--device", "--security-opt"),
    *("--volume", "--env", "--cpuset-cpus", "--entrypoint"),
}


def fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def names(file: str) -> list[str]:
    path = STATE / file
    return path.read_text().split() if path.exists() else []


def containers() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(STATE.glob("*.container"))}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def end(name: str, number: signal.Signals, wait_s: float) -> None:
    """As engines do: the first process gets the signal; when it is gone, so are all others."""
    if name not in containers():
        return
    pid = containers()[name]["pid"]
    if is_alive(pid):
        os.kill(pid, number)
    give_up = time.monotonic() + wait_s
    while is_alive(pid) and time.monotonic() < give_up:
        time.sleep(0.01)
    if not is_alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def run(arguments: list[str]) -> int:
    given: dict[str, list[str]] = {}
    while arguments[0].startswith("--"):
        flag = arguments.pop(0)
        if flag == "--rm":
            continue
        if flag not in VALUED:
            return fail(f"unknown flag: {flag}", 125)
        given.setdefault(flag, []).append(arguments.pop(0))
    image, *command = arguments
    if (STATE / "refusal").exists():
        return fail((STATE / "refusal").read_text(), 125)
    if image not in names("images"):
        return fail(f"{ENGINE}: Error response from daemon: No such image: {image}", 125)
    port = ""
    for published in given.get("--publish", []):
        address, outside, _ = published.split(":")
        port = port or outside
        with socket.socket() as probe:
            try:
                probe.bind((address, int(outside)))
            except OSError:
                text = "failed to set up container networking: driver failed programming external connectivity on endpoint x:"
                return fail(f"{ENGINE}: {text} Bind for {address}:{outside} failed: port is already allocated", 125)
    (name,) = given["--name"]
    program = [*given.get("--entrypoint", []), *command]
    program = [part.replace("@PORT@", port) for part in program]
    published = {inside: outside for _, outside, inside in (one.split(":") for one in given.get("--publish", []))}
    volumes = {inside: outside for outside, inside, _ in (one.split(":") for one in given.get("--volume", []))}
    env = {**os.environ, "PUBLISHED": json.dumps(published), "VOLUMES": json.dumps(volumes)}
    if "FAKE_ENGINE_IMAGE" in os.environ:
        program = [sys.executable, os.environ["FAKE_ENGINE_IMAGE"], *program]
    process = subprocess.Popen(program, start_new_session=True, env=env)
    owner = dict(label.split("=", 1) for label in given.get("--label", []))
    (STATE / f"{name}.container").write_text(
        json.dumps({"pid": process.pid, "labels": owner, "stop": given["--stop-signal"][0]})
    )
    signal.signal(signal.SIGINT, lambda *_: os.killpg(process.pid, signal.SIGINT))
    code = process.wait()
    (STATE / f"{name}.container").unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    with (STATE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([ENGINE, *arguments]) + "\n")
    if (STATE / "broken").exists():
        return fail((STATE / "broken").read_text(), 1)
    verb, *rest = arguments
    if verb in ("version", "info"):
        print("28.2.2")
    elif verb == "run":
        return run(rest)
    elif verb == "image":
        if rest[-1] not in names("images"):
            return fail(f"Error response from daemon: No such image: {rest[-1]}", 1)
        print("sha256:0123")
    elif verb == "pull":
        if rest[-1] not in names("pullable"):
            return fail(f"Error response from daemon: manifest for {rest[-1]} not found: manifest unknown: manifest unknown", 1)
        (STATE / "images").write_text("\n".join([*names("images"), rest[-1]]))
    elif verb == "ps":
        wanted = rest[rest.index("--filter") + 1].removeprefix("label=")
        print("\n".join(name for name, one in containers().items() if wanted in one["labels"]))
    elif verb == "inspect":
        label = rest[rest.index("--format") + 1].split('"')[1]
        print("\n".join(containers()[name]["labels"][label] for name in rest[rest.index("--format") + 2 :]))
    elif verb in ("stop", "rm"):
        name = rest[-1]
        if name not in containers():
            return fail(f"Error response from daemon: No such container: {name}", 1)
        if verb == "stop":
            end(name, signal.Signals[containers()[name]["stop"]], float(rest[rest.index("-t") + 1]))
        end(name, signal.SIGKILL, 5.0)
        (STATE / f"{name}.container").unlink(missing_ok=True)
    else:
        return fail(f"{ENGINE}: unknown command: {ENGINE} {verb}", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
