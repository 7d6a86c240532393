"""The digits network behind TorchServe; each worker is one process that runs this file.

Requests that TorchServe hands over together (``batchSize``) become one forward pass: that is
where batching pays. The section ``handler`` of ``model-config.yaml`` names the weights and the
threads; `messages` says what requests and replies look like.

TorchServe takes the only class of this module for the handler, so no second one can live here.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ts.utils.util import PredictionException  # TorchServe's; there in its workers

from .messages import BadRequestError, Query, parse, render, render_error
from .network import load_network

logger = logging.getLogger(__name__)

_BAD_REQUEST = 400


class DigitsHandler:
    """TorchServe's contract: `initialize` once, `handle` per batch of requests."""

    def initialize(self, context: Any) -> None:
        """Load the weights; an exception here ends the worker, and its text reaches the log."""
        settings = context.model_yaml_config["handler"]
        # torch would take every core in every worker, and they would fight for them.
        torch.set_num_threads(settings["torch_threads"])
        self._network = load_network(Path(context.system_properties["model_dir"]) / settings["weights"])
        model = context.manifest["model"]
        self._names = {"model": model["modelName"], "version": model["modelVersion"]}
        logger.info(
            "%s: torch %s with %d thread(s), numpy %s, Python environment %s",
            model["modelName"],
            torch.__version__,
            settings["torch_threads"],
            np.__version__,
            sys.prefix,
        )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request of a batch; its body is under ``data`` (multipart, gRPC) or ``body``.

        A bad request gets its own 400 and does not harm its neighbours. But over gRPC TorchServe
        drops the status of a single answer, and the client would take the error for a prediction;
        hence, where there is no neighbour to harm, the batch fails as a whole, which gRPC reports.
        """
        queries = [_try_parse(row.get("data", row.get("body"))) for row in data]
        good = [query for query in queries if isinstance(query, Query)]
        if not good:
            raise PredictionException(str(queries[0]), _BAD_REQUEST)
        with torch.inference_mode():
            logits = self._network(torch.from_numpy(np.concatenate([query.images for query in good]))).numpy()
        ends = np.cumsum([len(query.images) for query in good])
        answers = iter(np.split(logits, ends[:-1]))
        replies = []
        for index, query in enumerate(queries):
            if isinstance(query, Query):
                reply, content_type = render(query, next(answers), **self._names)
            else:
                context.set_response_status(_BAD_REQUEST, "Bad Request", index)
                reply, content_type = render_error(query)
            context.set_response_content_type(index, content_type)
            replies.append(reply)
        return replies


def _try_parse(body: Any) -> Query | BadRequestError:
    try:
        return parse(body)
    except BadRequestError as error:
        return error
