"""Models that servebench can host: real networks, small enough to ship and to serve from one CPU core.

Each sits in a folder of its own: ``network`` (what it computes), ``train`` (the command that
made the shipped weights), ``model`` (what the server's process runs), and as data the weights,
held-out inputs to send, and golden outputs to check replies against.
"""

from __future__ import annotations

from .digits import DIGITS
from .hosted import HostedModel, TensorSpec

#: Every model a launcher can host, by name.
MODELS: dict[str, HostedModel] = {model.name: model for model in (DIGITS,)}

__all__ = ["MODELS", "HostedModel", "TensorSpec"]
