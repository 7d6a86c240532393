"""``delay``: takes ``a_ms + b_ms * n`` for a batch of n rows, asleep. A stand-in for an accelerator.

A device that works while the CPU waits serves a batch hardly slower than a single row: with
``a_ms`` large against ``b_ms`` one instance answers ``1 / (a + b)`` queries a second alone,
but ``n / (a + b * n)`` in batches of n. So what batching is worth can be studied on any machine.
It answers with what it was sent.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..hosted import HostedModel, ModelOptions, TensorSpec


class DelayOptions(ModelOptions):
    """``model_options`` of ``delay``."""

    a_ms: float = Field(default=5.0, ge=0, le=60_000)
    """What a batch takes however small it is, in milliseconds."""
    b_ms: float = Field(default=0.5, ge=0, le=60_000)
    """What each row of it takes on top, in milliseconds."""


DELAY = HostedModel(
    name="delay",
    summary="takes a_ms + b_ms * n for a batch of n, without CPU use: an accelerator stand-in",
    folder=Path(__file__).parent,
    inputs=(TensorSpec("INPUT", "FP32", (4,)),),
    output=TensorSpec("OUTPUT", "FP32", (4,)),
    options=DelayOptions,
    uses_torch=False,
)
