"""The digits network behind Triton's Python backend; each instance is one process that runs this file.

Requests that Triton's dynamic batcher hands over together become one forward pass: that is
where batching pays. The configuration's parameters name the weights and the threads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # exists only inside a Python backend process

from .network import load_network


class TritonPythonModel:
    """Triton's contract: `initialize` once, `execute` per batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights; an exception here makes Triton refuse the model, and its text reaches the log."""
        if int(np.__version__.split(".", maxsplit=1)[0]) >= 2:
            # Checked again here because only this process knows which environment it got.
            raise RuntimeError(f"numpy {np.__version__} corrupts this backend's tensors; it needs numpy<2 in {sys.prefix}")
        parameters = json.loads(args["model_config"])["parameters"]
        threads = int(parameters["torch_threads"]["string_value"])
        # torch would take every core in every instance, and they would fight for them.
        torch.set_num_threads(threads)
        here = Path(args["model_repository"]) / args["model_version"]
        self._network = load_network(here / parameters["weights"]["string_value"])
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: torch {torch.__version__} with {threads} thread(s), "
            f"numpy {np.__version__}, Python environment {sys.prefix}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request (``IMAGE`` ``[n, 1, 8, 8]``) with its own ``LOGITS`` ``[n, 10]``."""
        images = [pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy() for request in requests]
        with torch.inference_mode():
            logits = self._network(torch.from_numpy(np.concatenate(images))).numpy()
        ends = np.cumsum([len(rows) for rows in images])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("LOGITS", rows)]) for rows in np.split(logits, ends[:-1], axis=0)]
