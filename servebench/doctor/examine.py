"""All checks of this host, in the order of the report, and the verdicts that follow.

The client is examined first and alone, as its timer is measured; then the devices and every
installed launcher that can tell (`ChecksHost`), at the same time, since they mostly wait for other programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import servebench
from servebench.hostcheck import CheckGroup, ChecksHost, HostCheck, State
from servebench.launcher import find_launcher, launcher_names

from . import client, devices

SCHEMA = "servebench.doctor/1"


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found; ``groups`` in the order to show them, the client's first."""

    groups: tuple[CheckGroup, ...]

    @property
    def client_works(self) -> bool:
        """Whether no check of the client failed."""
        return all(check.state is not State.FAIL for check in self.groups[0].checks)

    @property
    def ways(self) -> list[CheckGroup]:
        """The groups that decide about a way to launch."""
        return [group for group in self.groups if group.way is not None]

    @property
    def passed(self) -> bool:
        """The client works, and at least one way to launch does."""
        return self.client_works and any(group.obstacle is None for group in self.ways)

    def document(self) -> dict[str, Any]:
        """The whole as JSON-able values, schema `SCHEMA`."""
        return {
            "schema": SCHEMA,
            "version": servebench.__version__,
            "passed": self.passed,
            "client_works": self.client_works,
            "ways": [
                {
                    "way": group.way,
                    "can_launch": group.obstacle is None,
                    "obstacle": None if group.obstacle is None else group.obstacle.name,
                }
                for group in self.ways
            ],
            "groups": [
                {"title": group.title, "way": group.way, "checks": [_check_document(check) for check in group.checks]}
                for group in self.groups
            ],
        }


def examine() -> Examination:
    """Examine this host; takes a second or two, twenty at most when tools hang. Starts no server, changes nothing."""
    facts = client.collect()
    environment = facts.environment
    with ThreadPoolExecutor() as pool:
        device_facts = pool.submit(devices.collect, environment["cpu_model"], len(environment["cpus_allowed"]))
        launchers = list(pool.map(ask_launcher, launcher_names()))
        return Examination(
            (
                client.client_group(facts),
                *merged(group for groups in launchers for group in groups),
                devices.device_group(device_facts.result()),
            )
        )


def ask_launcher(name: str) -> Sequence[CheckGroup]:
    """What a launcher says of this host; nothing when it cannot tell, a failed check when it cannot even be loaded."""
    try:
        launcher = find_launcher(name)
        return launcher.check_host() if isinstance(launcher, ChecksHost) else ()
    except Exception as error:  # somebody else's code: one broken launcher must not hide what the others say
        found = f"{type(error).__name__}: {error}"
        check = HostCheck(name, State.FAIL, found, "this launcher cannot be used", "repair or uninstall the package it is in")
        return [CheckGroup(f"Launcher {name}", (check,), way=name)]


def merged(groups: Iterable[CheckGroup]) -> list[CheckGroup]:
    """The groups in their order, those that ways share (one title: one container engine, say) behind the others and once."""
    seen: dict[str, list[CheckGroup]] = {}
    for group in groups:
        seen.setdefault(group.title, []).append(group)
    once = [same[0] for same in seen.values() if len(same) == 1]
    return once + [same[0] for same in seen.values() if len(same) > 1]


def _check_document(check: HostCheck) -> dict[str, Any]:
    return {
        "name": check.name,
        "state": check.state.value,
        "found": check.found,
        "meaning": check.meaning,
        "fix": check.fix,
    }
