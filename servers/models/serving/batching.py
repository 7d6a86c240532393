"""Many queries, one call of the model: that is where batching pays.

Queries of one shape are stacked. Where the model can tell padding from data (``pads``), all are,
each padded with zeros at the end of its open axes, and its answer is cut back to its own size.
A query that the model refuses must not harm its neighbours: a batch that fails is tried again
one query at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .settings import Array, Settings, TensorSpec

#: The inputs of one query, in the model's order, each ``[rows, ...]``.
Query = Sequence[Array]
#: A batch's inputs to its output; `ValueError` for what the model cannot take.
Predict = Callable[[Sequence[Array]], Array]


def answer_all(queries: Sequence[Query], predict: Predict, settings: Settings) -> list[Array | ValueError]:
    """The output of every query, ``[rows, ...]`` each, or why it has none."""
    answers: list[Array | ValueError] = [ValueError("not answered")] * len(queries)
    for members in _batches(queries, pads=settings.pads):
        outputs = _answer([queries[index] for index in members], predict, settings)
        for index, output in zip(members, outputs, strict=True):
            answers[index] = output
    return answers


def _batches(queries: Sequence[Query], *, pads: bool) -> list[list[int]]:
    """Indices of the queries that go together, all in the order of their first."""
    if pads:
        return [list(range(len(queries)))]
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, query in enumerate(queries):
        groups.setdefault(tuple(array.shape[1:] for array in query), []).append(index)
    return list(groups.values())


def _answer(queries: Sequence[Query], predict: Predict, settings: Settings) -> list[Array | ValueError]:
    try:
        output = predict([_stacked(tensors) for tensors in zip(*queries, strict=True)])
    except ValueError as error:
        if len(queries) == 1:
            return [error]
        return [answer for query in queries for answer in _answer([query], predict, settings)]
    ends = np.cumsum([len(query[0]) for query in queries])
    rows = np.split(output, ends[:-1])
    if not settings.pads:
        return list(rows)
    sizes = [_open_size(query, settings.inputs) for query in queries]
    return [part[_cut(settings.output, size)] for part, size in zip(rows, sizes, strict=True)]


def _stacked(tensors: Sequence[Array]) -> Array:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return np.concatenate(tensors)
    largest = np.max([tensor.shape[1:] for tensor in tensors], axis=0)
    stacked = np.zeros((sum(len(tensor) for tensor in tensors), *largest), tensors[0].dtype)
    row = 0
    for tensor in tensors:
        stacked[(slice(row, row + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        row += len(tensor)
    return stacked


def _open_size(query: Query, inputs: Sequence[TensorSpec]) -> int:
    """The size of a query's open axes. A model that pads has one such size; `ValueError` where its inputs disagree."""
    sizes = {
        size
        for array, spec in zip(query, inputs, strict=True)
        for size, declared in zip(array.shape[1:], spec.dims, strict=True)
        if declared == -1
    }
    return max(sizes, default=0)


def _cut(output: TensorSpec, size: int) -> tuple[slice, ...]:
    return (slice(None), *(slice(size) if declared == -1 else slice(None) for declared in output.dims))
