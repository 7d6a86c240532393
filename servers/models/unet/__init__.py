"""``unet``: which of two classes each pixel of a grey image belongs to.

The U-Net of the 2015 paper (Ronneberger, Fischer, Brox), 31,030,658 parameters: its convolutions
are not padded, so a tile of ``n`` x ``n`` pixels gives a map of ``n - 184``; the paper's own has 572
and gives 388. Sizes are 188 and every 16 pixels beyond it.
"""

from __future__ import annotations

from pathlib import Path

from ..hosted import HostedModel, TensorSpec

UNET = HostedModel(
    name="unet",
    summary="image segmentation: the U-Net of 2015, 31 million parameters, tiles of any size",
    folder=Path(__file__).parent,
    inputs=(TensorSpec("IMAGE", "FP32", (1, -1, -1)),),
    output=TensorSpec("LOGITS", "FP32", (2, -1, -1)),
    precisions=("fp32", "bf16", "fp16"),
    traced_size=188,
)
