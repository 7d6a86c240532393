"""The function that answers a batch, for whichever model lies beside this file."""

from __future__ import annotations

import importlib
from pathlib import Path

from .batching import Predict
from .settings import Settings


def load_predictor(settings: Settings, folder: Path, device: str, *, package: str) -> tuple[Predict, str]:
    """The model's function, and how it was made, for the log.

    ``folder`` holds the weights, ``package`` is the dotted name of the one that holds
    ``network``. Whatever is wrong with either is raised as it is: the server refuses the model then.
    """
    build = importlib.import_module(f"{package}.network").build
    if not settings.uses_torch:
        return build(**settings.options), "without torch"
    from .torch_model import torch_predictor

    return torch_predictor(build, settings, folder, device)
