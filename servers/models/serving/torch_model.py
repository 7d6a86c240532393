"""A torch network as a server needs it: weights from a file or a seed, on its device, in its precision.

Precision is that of weights and arithmetic; tensors travel as the model declares them. ``int8``
quantises the weights of linear layers, and their inputs as they come (torch's dynamic quantisation).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .batching import Predict
from .settings import Array, Settings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


def torch_predictor(build: Callable[..., nn.Module], settings: Settings, folder: Path, device: str) -> tuple[Predict, str]:
    """The function that answers a batch, and a line about it for the log."""
    # torch would take every core in every process, and they would fight for them.
    torch.set_num_threads(settings.torch_threads)
    if settings.device_plugin is not None:
        importlib.import_module(settings.device_plugin)
    network = load_network(build, settings, folder)
    check = getattr(network, "check_inputs", None)
    network = in_precision(network, settings.precision).to(device)
    dtype = _DTYPES[settings.precision]

    def predict(inputs: Sequence[Array]) -> Array:
        if check is not None:
            check(*inputs)
        with torch.inference_mode():
            tensors = [torch.from_numpy(array) for array in inputs]
            output = network(*(one.to(device, dtype if one.is_floating_point() else None) for one in tensors))
            answer: Array = output.float().cpu().numpy()
            return answer

    about = f"torch {torch.__version__} on {device} in {settings.precision} with {settings.torch_threads} thread(s)"
    return predict, about


def load_network(build: Callable[..., nn.Module], settings: Settings, folder: Path) -> nn.Module:
    """The network in fp32 on the CPU, ready for inference; the same seed gives the same weights.

    Weight files are read as tensors only, never as pickled code. `ValueError` for one that does
    not hold this network's state dict.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build(**settings.options)
    if settings.weights is not None:
        path = folder / settings.weights
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            unused: tuple[str, ...] = getattr(network, "unused_weights", ())
            network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(unused)})
        # torch raises nearly anything for a file that is not one of its own.
        except Exception as error:
            raise ValueError(
                f"{path.name} does not hold the {settings.model} network's weights ({type(error).__name__})"
            ) from error
    return network.eval()


def in_precision(network: nn.Module, precision: str) -> nn.Module:
    """The network with weights and arithmetic in ``fp32``, ``bf16``, ``fp16`` or ``int8``; it may be changed in place."""
    if precision == "int8":
        with warnings.catch_warnings():
            # Deprecated for a package of its own (torchao); what torch itself has still does what it says.
            warnings.simplefilter("ignore")
            quantize: Callable[..., nn.Module] = torch.ao.quantization.quantize_dynamic
            return quantize(network, {nn.Linear}, dtype=torch.qint8)
    return network.to(_DTYPES[precision])
