"""Raw replies kept for the output check: from a worker to the coordinator, through one file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_replies(path: Path, replies: Mapping[int, bytes]) -> None:
    """Write row -> raw reply. `OSError` when the disk does not take it."""
    packed = io.BytesIO()  # a ZipFile that met a full disk fails once more in its finalizer, with a traceback
    np.savez(
        packed,
        rows=np.fromiter(replies.keys(), dtype=np.int64, count=len(replies)),
        ends=np.cumsum([len(reply) for reply in replies.values()], dtype=np.int64),
        data=np.frombuffer(b"".join(replies.values()), dtype=np.uint8),
    )
    path.write_bytes(packed.getbuffer())


def read_replies(path: Path) -> dict[int, bytes]:
    """Read what `write_replies` wrote; empty when a killed worker left nothing readable."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            data, ends = stored["data"].tobytes(), stored["ends"].tolist()
            rows = stored["rows"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return {row: data[start:end] for row, start, end in zip(rows, [0, *ends], ends, strict=False)}
