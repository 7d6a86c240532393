"""``identity``: answers with what it was sent. Shows what a server costs when the model costs nothing."""

from __future__ import annotations

from pathlib import Path

from ..hosted import HostedModel, TensorSpec

IDENTITY = HostedModel(
    name="identity",
    summary="answers with what it was sent: the cost of the server itself",
    folder=Path(__file__).parent,
    inputs=(TensorSpec("INPUT", "FP32", (-1,)),),
    output=TensorSpec("OUTPUT", "FP32", (-1,)),
    uses_torch=False,
    pads=True,
)
