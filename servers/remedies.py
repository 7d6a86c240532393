"""What to do about a launch that failed, by what the server, Python, torch, Java or the kernel said of the cause.

Pure text. Each pattern is the words of the program that failed, on Triton and TorchServe alike;
`explain` adds the remedy to a cause, and says so where the kernel ended a process for want of
memory, which leaves no words at all.
"""

from __future__ import annotations

import re

from servebench.errors import LaunchError

_MORE_MEMORY = "give the host (or its container) more memory, or host a smaller model or fewer processes of it"

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"(?:CUDA|HIP|XPU) out of memory",
        "out of GPU memory: end what else is on the GPU, or host a smaller model, fewer processes of it, or a lower precision",
    ),
    (r"OutOfMemoryError", "Java ran out of memory: raise heap_mib"),
    (
        r"Could not reserve enough space|Invalid maximum heap size|insufficient memory for the Java",
        f"lower heap_mib, or {_MORE_MEMORY}",
    ),
    (
        r"can't allocate memory|[Cc]annot allocate memory|bad_alloc|MemoryError|not enough memory",
        f"out of memory: {_MORE_MEMORY}",
    ),
    (r"does not hold the \S+ network's weights", "give weights a file with weights of this network, or omit it"),
    (
        r"[Aa]ddress already in use|already in use|Failed to bind",
        "another program took the port; choose another, or 0 for a free one",
    ),
    (r"cannot run on CPUs", "choose CPUs that this process may use (taskset -p $$ lists them) in cpus"),
    (
        r"No module named",
        "install it in the Python that runs the server: servebench's own, that of option python, or the container's image",
    ),
)
_TOO_SLOW = "was not ready within"
# How a Triton instance or a TorchServe worker that ended without a word is reported, and a server itself.
_ENDED = re.compile(r"Stub process \S+ is not healthy|Worker died|Backend stream closed|\(SIGKILL\)")


def explain(error: LaunchError, *, killed_for_memory: bool) -> LaunchError:
    """The error with its remedy, where one is known. ``killed_for_memory``: the kernel did so to a process meanwhile."""
    remedy = remedy_of(str(error), killed_for_memory=killed_for_memory)
    return error if remedy is None else LaunchError(f"{error}; {remedy}", log_tail=error.log_tail)


def remedy_of(cause: str, *, killed_for_memory: bool) -> str | None:
    """What to do about a cause; None where nobody knows."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, cause):
            return remedy
    if _ENDED.search(cause) and killed_for_memory:
        return f"out of memory: the kernel killed a process meanwhile (see dmesg); {_MORE_MEMORY}"
    if _ENDED.search(cause):
        return "it was killed or crashed without a word; see its last lines in the log, and dmesg"
    return "raise startup_timeout_s" if _TOO_SLOW in cause else None
