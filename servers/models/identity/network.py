"""The function that changes nothing. Servers import a copy of this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def build() -> Callable[[Sequence[Any]], Any]:
    """A function of the batch's inputs that gives back the only one."""
    return lambda inputs: inputs[0]
