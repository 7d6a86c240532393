"""What a plan looks like, without sending it."""

from __future__ import annotations

from typing import Any

import numpy as np

from servebench.errors import ProfileError
from servebench.load.library import build_library
from servebench.load.scenario import Plan
from servebench.load.undeclared import files_library, input_specs
from servebench.profile import Samples
from servebench.wire.tensors import TensorSpec

_INTERVALS = 20


def count_samples(samples: Samples) -> int:
    """The size of the library that a run would make, without its server. `ProfileError` where a file does not tell."""
    if samples.path is None:
        return samples.count
    if samples.source == "files":
        return len(files_library(samples))
    if samples.source == "perf-analyzer":
        raise ProfileError("samples.source: 'perf-analyzer' cannot be counted without the model; give the size (--samples)")
    # Batches of the client's need a model with a batch axis; one row a sample is the same with and without.
    inputs = [TensorSpec(spec.name, spec.datatype, (-1, *spec.shape)) for spec in input_specs(samples)]
    return len(build_library(samples.model_copy(update={"shapes": {}}), inputs, None))


def describe_schedule(plan: Plan) -> dict[str, Any]:
    """JSON-able facts of a plan: counts, duration, hash, gaps (ns), and arrivals over twenty equal intervals."""
    gaps_ns = np.diff(plan.offsets_ns)
    last_ns = int(plan.offsets_ns[-1])
    counts, edges_ns = np.histogram(plan.offsets_ns, bins=_INTERVALS, range=(0, max(last_ns, 1)))
    width_s = (edges_ns[1] - edges_ns[0]) / 1e9
    return {
        "arrivals": plan.arrivals,
        "target_qps": plan.target_qps,
        "scheduled_qps": plan.scheduled_qps,
        "seed": plan.seed,
        "planned": plan.planned,
        "last_offset_ns": last_ns,
        "generated_duration_ns": plan.generated_duration_ns,
        "sha256": plan.sha256,
        "gaps_ns": {
            "min": int(gaps_ns.min()) if len(gaps_ns) else None,
            "median": int(np.median(gaps_ns)) if len(gaps_ns) else None,
            "max": int(gaps_ns.max()) if len(gaps_ns) else None,
        },
        "rate_over_time": [
            {"from_s": float(start / 1e9), "qps": float(count / width_s)}
            for start, count in zip(edges_ns, counts, strict=False)
        ],
        "distinct_samples": len(np.unique(plan.sample_index)),
    }
