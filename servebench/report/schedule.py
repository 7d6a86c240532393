"""The preview of a schedule: what would be sent, without sending it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from servebench.judge.wording import say_rate, say_time

_BAR_CHARACTERS = 40


def render_schedule(name: str, document: dict[str, Any], *, console: Console) -> None:
    """Print the preview for people."""
    lines = [Text(f"{name}: {document['planned']:,} queries over {document['last_offset_ns'] / 1e9:,.3f} s", style="bold")]
    rates = f"target {say_rate(document['target_qps'])}, scheduled {say_rate(document['scheduled_qps'])}"
    lines.append(Text(f"{document['arrivals']} arrivals, {rates}, seed {document['seed']}"))
    lines.append(Text(f"sha256 of the arrival times {document['sha256']}"))
    gaps = document["gaps_ns"]
    if gaps["min"] is not None:
        lines.append(Text("gaps: " + ", ".join(f"{kind} {say_time(gaps[kind])}" for kind in ("min", "median", "max"))))
    highest = max(point["qps"] for point in document["rate_over_time"])
    for point in document["rate_over_time"]:
        bar = "█" * round(_BAR_CHARACTERS * point["qps"] / highest) if highest else ""
        lines.append(Text(f"{point['from_s']:10.2f} s {point['qps']:10,.1f}/s {bar}"))
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)  # to be copied whole: a hash is no text to break
