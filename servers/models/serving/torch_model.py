"""A torch network as a server needs it: weights from a file or a seed, on its device, in its precision.

Precision is that of weights and arithmetic; tensors travel as the model declares them. ``int8``
quantises the weights of linear layers, and their inputs as they come (torch's dynamic quantisation).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .batching import Predict
from .safetensors import read_safetensors
from .settings import Array, Settings

#: Of the arithmetic, by precision.
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


def torch_predictor(build: Callable[..., nn.Module], settings: Settings, folder: Path, device: str) -> tuple[Predict, str]:
    """The function that answers a batch, and a line about it for the log."""
    # torch would take every core in every process, and they would fight for them.
    torch.set_num_threads(settings.torch_threads)
    if settings.device_plugin is not None:
        importlib.import_module(settings.device_plugin)
    network = load_network(build, settings, folder)
    check = getattr(network, "check_inputs", None)
    network = in_precision(network, settings.precision).to(device)
    dtype = TORCH_DTYPES[settings.precision]

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

    Weight files are read as tensors only, never as pickled code, under the names that the
    network's ``rename_weight`` gives published ones. `ValueError` for one that does not hold this
    network's state dict, all of it and nothing else; it names what differs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build(**settings.options)
    if settings.weights is not None:
        path = folder / settings.weights
        refusal = f"{path.name} does not hold the {settings.model} network's weights"
        try:
            state = _published_state(network, path)
        # torch raises nearly anything for a file that is not one of its own.
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(f"{refusal} ({reason})") from error
        if differences := _differences(network.state_dict(), state):
            raise ValueError(f"{refusal}: {'; '.join(differences)}")
        network.load_state_dict(state)
    return network.eval()


def _published_state(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors under the network's own names, without those that have no influence on its output."""
    read = read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    rename: Callable[[str], str] = getattr(network, "rename_weight", str)
    unused: tuple[str, ...] = getattr(network, "unused_weights", ())
    for name, tensor in read.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is no tensor but {type(tensor).__name__}")
    return {rename(name): tensor for name, tensor in read.items() if not name.startswith(unused)}


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Where a state dict is not that of the network: ``"missing fc.bias"``, a line for each kind of difference."""
    # A count that only training reads; torch fills it in.
    missing = [name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} of shape {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "unexpected": list(state.keys() - own.keys()), "found": shapes}
    return [f"{kind} {_first(names)}" for kind, names in kinds.items() if names]


def _first(names: list[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{min(names)}{others}"


def in_precision(network: nn.Module, precision: str) -> nn.Module:
    """The network with weights and arithmetic in ``fp32``, ``bf16``, ``fp16`` or ``int8``; it may be changed in place."""
    if precision == "int8":
        with warnings.catch_warnings():
            # Deprecated for a package of its own (torchao); what torch itself has still does what it says.
            warnings.simplefilter("ignore")
            quantize: Callable[..., nn.Module] = torch.ao.quantization.quantize_dynamic
            return quantize(network, {nn.Linear}, dtype=torch.qint8)
    return network.to(TORCH_DTYPES[precision])
