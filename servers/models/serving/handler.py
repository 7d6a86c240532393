"""A bundled model behind TorchServe; each worker is one process that runs this file.

Requests that TorchServe hands over together (``batchSize``) become one call of the model: that is
where batching pays. The section ``handler`` of ``model-config.yaml`` holds the `Settings`;
`messages` says what requests and replies look like.

TorchServe takes the only class of this module for the handler, so no second one can live here.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ts.utils.util import PredictionException  # TorchServe's; there in its workers

from .batching import answer_all
from .messages import BadRequestError, Request, parse, render, render_error
from .predictor import load_predictor
from .settings import Settings

logger = logging.getLogger(__name__)

_BAD_REQUEST = 400


class ModelHandler:
    """TorchServe's contract: `initialize` once, `handle` per batch of requests."""

    def initialize(self, context: Any) -> None:
        """Load the model; an exception here ends the worker, and its text reaches the log."""
        self._settings = Settings.from_json(context.model_yaml_config["handler"]["serving"])
        folder = Path(context.system_properties["model_dir"])
        device = worker_device(self._settings.devices, context.system_properties.get("gpu_id"))
        self._predict, about = load_predictor(self._settings, folder, device, package=str(__package__))
        model = context.manifest["model"]
        self._names = {"model": model["modelName"], "version": model["modelVersion"]}
        logger.info("%s: %s, numpy %s, Python environment %s", model["modelName"], about, np.__version__, sys.prefix)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request of a batch.

        A bad request gets its own 400 and does not harm its neighbours. But over gRPC TorchServe
        drops the status of a single answer, and the client would take the error for a prediction;
        hence, where there is no neighbour to harm, the batch fails as a whole, which gRPC reports.
        """
        requests = [_try_parse(row, self._settings) for row in data]
        good = [request for request in requests if isinstance(request, Request)]
        answers = iter(answer_all([request.arrays for request in good], self._predict, self._settings))
        outcomes = [next(answers) if isinstance(request, Request) else request for request in requests]
        if all(isinstance(outcome, ValueError) for outcome in outcomes):
            raise PredictionException(str(outcomes[0]), _BAD_REQUEST)
        replies = []
        for index, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
            if isinstance(request, Request) and not isinstance(outcome, ValueError):
                reply, content_type = render(request, outcome, self._settings.output, **self._names)
            else:
                context.set_response_status(_BAD_REQUEST, "Bad Request", index)
                reply, content_type = render_error(str(outcome))
            context.set_response_content_type(index, content_type)
            replies.append(reply)
        return replies


def worker_device(devices: tuple[str, ...], gpu_id: int | None) -> str:
    """torch's name of this worker's device: TorchServe hands out numbers of GPUs, and knows no other devices."""
    kind, numbered, _ = devices[0].partition(":")
    return f"{kind}:{gpu_id}" if numbered and gpu_id is not None else devices[0]


def _try_parse(row: dict[str, Any], settings: Settings) -> Request | BadRequestError:
    try:
        return parse(row, settings.inputs)
    except BadRequestError as error:
        return error
