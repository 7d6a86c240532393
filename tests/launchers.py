"""What tests of the launchers share: the words of a refusal, and the digits' held-out images with their answers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servebench_servers.models.digits import DIGITS

from servebench.errors import LaunchError


def _held_out() -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for name in ("heldout", "golden", "labels"):
        with np.load(DIGITS.folder / f"{name}.npz") as file:
            arrays |= dict(file)
    return arrays


#: IMAGE, what is asked; LOGITS, the network's answers; LABEL, the digits themselves.
HELDOUT = _held_out()


def refusal(call: Callable[[], object]) -> str:
    """The one line with which a launcher refuses."""
    with pytest.raises(LaunchError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
