"""Models that servebench can host, each in a folder of its own.

Beside ``network.py`` (what it computes: all that the server's processes import) a folder may hold
samples to send, and where weights ship, those, how they were made, and golden outputs to check replies against.
What surrounds a model in a server's process is the same for all and lies in `serving`.
"""

from __future__ import annotations

from .bert import BERT
from .delay import DELAY
from .digits import DIGITS
from .dlrm import DLRM
from .hosted import HostedModel, TensorSpec
from .identity import IDENTITY
from .resnet50 import RESNET50
from .unet import UNET

#: Every model a launcher can host, by name.
MODELS: dict[str, HostedModel] = {model.name: model for model in (IDENTITY, DELAY, DIGITS, RESNET50, BERT, DLRM, UNET)}

__all__ = ["MODELS", "HostedModel", "TensorSpec"]
