"""After the last reply: what the workers say went wrong, put together, and the check of the kept replies."""

from __future__ import annotations

from typing import Any

from servebench.engine.dialect import split_reply
from servebench.engine.fleet import WorkerEnd
from servebench.engine.preparation import Preparation
from servebench.engine.redaction import Redaction
from servebench.record.columns import Columns
from servebench.record.outcome import Outcome
from servebench.wire.faults import ProtocolFault
from servebench.wire.http1 import parse_reply
from servebench.wire.kserve import error_text


def merge_errors(ends: list[WorkerEnd], workers: int, redacted: Redaction) -> list[dict[str, Any]]:
    """All workers' errors by kind and detail, most frequent first, no secret in them; ``example`` is a query number."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for end in ends:
        for error in end.errors:
            detail = error["detail"]
            if error["example_reply"]:
                detail = f"{detail}: {server_words(error['example_reply'].encode('latin-1'))}"
            entry = merged.setdefault(
                (error["kind"], error["detail"]),
                {
                    "kind": error["kind"],
                    "detail": redacted(detail),
                    "count": 0,
                    "example": error["example_row"] * workers + end.worker,
                },
            )
            entry["count"] += error["count"]
    return sorted(merged.values(), key=lambda entry: -entry["count"])


def server_words(reply: bytes) -> str:
    """The error message in a raw HTTP reply, or in what is left of one; one line."""
    try:
        _, _, body = parse_reply(reply)
    except ProtocolFault:
        body = reply
    return error_text(body)


def check_outputs(
    preparation: Preparation,
    kept: dict[int, bytes],
    columns: list[Columns],
    errors: list[dict[str, Any]],
    redacted: Redaction,
) -> dict[str, Any]:
    """Check the kept replies of ok queries; a wrong one's record becomes OUTPUT, and an error."""
    workers = len(columns)
    checked = 0
    wrong: list[tuple[int, str]] = []
    for query, raw in sorted(kept.items()):
        one, row = columns[query % workers], query // workers
        if one.array("outcome")[row] != Outcome.OK:
            continue
        checked += 1
        try:
            status, headers, body = split_reply(preparation.protocol, raw)
            problem = preparation.check.check(int(one.array("sample")[row]), status, headers, body)
        except ProtocolFault as fault:
            problem = str(fault)
        if problem is not None:
            one.array("outcome")[row] = Outcome.OUTPUT
            wrong.append((query, redacted(problem)))
    if wrong:
        query, detail = wrong[0]
        errors.append({"kind": Outcome.OUTPUT.kind, "detail": detail, "count": len(wrong), "example": query})
    return {
        "kept": len(kept),
        "checked": checked,
        "wrong": len(wrong),
        "first_wrong": {"query": wrong[0][0], "detail": wrong[0][1]} if wrong else None,
    }
