"""``bert``: where in a text the answer to a question begins and ends. Sequences of any length up to 512 tokens.

BERT (Devlin et al. 2018) with a question-answering head. ``model_options: {size: base}`` has
108,893,186 parameters, ``large`` 334,094,338: that is the one of MLPerf's natural language
benchmark. Parameter names are those of ``transformers``' BertForQuestionAnswering, so its state
dicts load as ``weights``.

``LOGITS`` has a row for each token: how well the answer begins there, and how well it ends there.
Queries of different lengths share a batch; tokens with attention mask 0 (the padding among them)
are not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..hosted import HostedModel, ModelOptions, TensorSpec


class BertOptions(ModelOptions):
    """``model_options`` of ``bert``."""

    size: Literal["base", "large"] = "base"
    """`base`: 12 layers of width 768; `large`: 24 layers of width 1024."""


BERT = HostedModel(
    name="bert",
    summary="question answering encoder: BERT base or large, 109 or 334 million parameters, variable length",
    folder=Path(__file__).parent,
    inputs=(
        TensorSpec("INPUT_IDS", "INT64", (-1,)),
        TensorSpec("ATTENTION_MASK", "INT64", (-1,)),
        TensorSpec("TOKEN_TYPE_IDS", "INT64", (-1,)),
    ),
    output=TensorSpec("LOGITS", "FP32", (-1, 2)),
    options=BertOptions,
    pads=True,
    traced_size=8,
    precisions=("fp32", "bf16", "fp16", "int8"),
)
