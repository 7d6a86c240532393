"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, overload


@overload
def replacing(path: Path, *, binary: Literal[True]) -> contextlib.AbstractContextManager[IO[bytes]]: ...
@overload
def replacing(path: Path) -> contextlib.AbstractContextManager[IO[str]]: ...
@contextlib.contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a sibling of ``path`` for writing; rename it onto ``path`` when the block ends well, remove it when not."""
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with sibling.open("wb") if binary else sibling.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document, whole or not at all. `ValueError` for numbers that JSON has no word for."""
    with replacing(path) as file:
        json.dump(document, file, indent=2, allow_nan=False)
        file.write("\n")
