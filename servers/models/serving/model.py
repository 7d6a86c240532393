"""A bundled model behind Triton's Python backend; each instance is one process that runs this file.

Requests that Triton's dynamic batcher hands over together become one call of the model. The
configuration's parameter ``serving`` holds the `Settings`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # exists only inside a Python backend process

from .batching import answer_all
from .predictor import load_predictor
from .settings import Settings


class TritonPythonModel:
    """Triton's contract: `initialize` once, `execute` per batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; an exception here makes Triton refuse it, and its text reaches the log."""
        if int(np.__version__.split(".", maxsplit=1)[0]) >= 2:
            # Checked again here because only this process knows which environment it got.
            raise RuntimeError(f"numpy {np.__version__} corrupts this backend's tensors; it needs numpy<2 in {sys.prefix}")
        self._settings = Settings.from_json(json.loads(args["model_config"])["parameters"]["serving"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        device = instance_device(self._settings.devices, args)
        self._predict, about = load_predictor(self._settings, folder, device, package=str(__package__))
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {about}, numpy {np.__version__}, Python environment {sys.prefix}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with an output of its own, or with an error of its own."""
        queries = [
            [pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in self._settings.inputs]
            for request in requests
        ]
        name = self._settings.output.name
        return [
            pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), pb_utils.TritonError.INVALID_ARG))
            if isinstance(answer, ValueError)
            else pb_utils.InferenceResponse([pb_utils.Tensor(name, answer)])
            for answer in answer_all(queries, self._predict, self._settings)
        ]


def instance_device(devices: tuple[str, ...], args: dict[str, str]) -> str:
    """torch's name of this instance's device.

    Triton hands out CUDA devices itself. Others it does not know: there each device has an instance
    group, in order, and the group's number is in the instance's name (``bert_1_0``: group 1, instance 0).
    """
    if args["model_instance_kind"] == "GPU":
        return f"cuda:{args['model_instance_device_id']}"
    group = re.search(r"_(\d+)_\d+$", args["model_instance_name"])
    return devices[int(group[1]) if group and len(devices) > 1 else 0]
