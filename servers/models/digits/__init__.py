"""``digits``: which handwritten digit is on an 8x8 grey image. A convolutional network of 38 thousand weights.

Trained on scikit-learn's digits (1797 images, the test part of the UCI "Optical Recognition of
Handwritten Digits" set). Beside this file lie ``weights.pt`` and, for the 360 held-out images
in one order, ``heldout.npz`` (``IMAGE``), ``golden.npz`` (``LOGITS``) and ``labels.npz``
(``LABEL``). All four come from one command::

    python -m servebench_servers.models.digits.train
"""

from __future__ import annotations

from pathlib import Path

from ..hosted import HostedModel, TensorSpec

#: Seed of the split, the initial weights and the order of training images behind the shipped files.
SEED = 2026

#: One image: grey levels 0 (paper) to 1 (ink), scikit-learn's 0-16 divided by 16.
IMAGE = TensorSpec("IMAGE", "FP32", (1, 8, 8))
#: Unnormalised log-probabilities of the digits 0-9.
LOGITS = TensorSpec("LOGITS", "FP32", (10,))

#: Of the shipped weights, beside this file.
WEIGHTS_FILE = "weights.pt"

DIGITS = HostedModel(
    name="digits",
    summary="which handwritten digit is on an 8x8 image: real data, real accuracy, 38 thousand parameters",
    folder=Path(__file__).parent,
    inputs=(IMAGE,),
    output=LOGITS,
    precisions=("fp32", "bf16", "fp16", "int8"),
    weights_file=WEIGHTS_FILE,
    weights_origin=f"shipped, trained on scikit-learn digits, seed {SEED}",
)
