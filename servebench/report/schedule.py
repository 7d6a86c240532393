"""The preview of a schedule: what would be sent, without sending it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

_BAR_CHARACTERS = 40


def render_schedule(name: str, document: dict[str, Any], *, console: Console) -> None:
    """Print the preview for people."""
    console.print(Text(f"{name}: {document['planned']:,} queries over {document['last_offset_ns'] / 1e9:.3f} s", style="bold"))
    console.print(
        Text(
            f"{document['arrivals']} arrivals, target {document['target_qps']:g}/s, "
            f"scheduled {document['scheduled_qps']:.6g}/s, seed {document['seed']}"
        )
    )
    console.print(Text(f"sha256 of the arrival times {document['sha256']}"))
    gaps = document["gaps_ns"]
    if gaps["min"] is not None:
        console.print(
            Text(f"gaps: min {gaps['min'] / 1e6:.3f} ms, median {gaps['median'] / 1e6:.3f} ms, max {gaps['max'] / 1e6:.3f} ms")
        )
    highest = max(point["qps"] for point in document["rate_over_time"])
    for point in document["rate_over_time"]:
        bar = "█" * round(_BAR_CHARACTERS * point["qps"] / highest) if highest else ""
        console.print(Text(f"{point['from_s']:10.2f} s {point['qps']:10.1f}/s {bar}"))
