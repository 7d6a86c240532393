"""Judges a finished run: pure functions from its records to ``run.json``, with no clock and no I/O."""

from servebench.judge.verdict import exit_code, judge

__all__ = ["exit_code", "judge"]
