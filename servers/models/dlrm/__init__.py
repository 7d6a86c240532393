"""``dlrm``: how likely is a click, from 13 numbers and 26 categories.

The recommendation model of MLPerf Inference v0.7 to v2.1 (Naumov et al. 2019, trained on Criteo's
Terabyte click logs): embeddings of width 128, interacting pairwise. Its tables have 187,767,399 rows, 96 GB in fp32; the
default caps each at 10,000 rows (``model_options: {max_rows: 10000}``), which keeps the
arithmetic and gives up the memory traffic of the real thing: 149,660 rows, 21,525,377 parameters in all.
``max_rows: 40000000`` is the full model. As there, a category beyond its table wraps around.
Parameter names are those of the reference implementation (``dlrm_s_pytorch``).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..hosted import HostedModel, ModelOptions, TensorSpec


class DlrmOptions(ModelOptions):
    """``model_options`` of ``dlrm``."""

    max_rows: int = Field(default=10_000, ge=1, le=40_000_000)
    """Most rows an embedding table has; 40,000,000 is MLPerf's model and takes 96 GB in fp32."""


DLRM = HostedModel(
    name="dlrm",
    summary="recommendation: MLPerf's DLRM, 13 dense and 26 sparse features, small tables unless told otherwise",
    folder=Path(__file__).parent,
    inputs=(TensorSpec("DENSE", "FP32", (13,)), TensorSpec("SPARSE", "INT64", (26,))),
    output=TensorSpec("CLICK", "FP32", (1,)),
    options=DlrmOptions,
    precisions=("fp32", "bf16", "fp16", "int8"),
)
