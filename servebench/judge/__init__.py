"""Judges a finished run: pure functions from its records to ``run.json``, with no clock and no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servebench.judge.verdict import exit_code, judge

__all__ = ["exit_code", "judge"]


def __getattr__(name: str) -> Any:
    """Load what judges when it is asked for: scipy takes a tenth of a second, and a run begins without it."""
    if name in __all__:
        from servebench.judge import verdict

        return getattr(verdict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
