"""What a server's processes run, whichever model they host: `model` on Triton's Python backend, `handler` on TorchServe.

These files are copied into the rendered model repository or archive beside the model's own
``network.py``. They import each other relatively and nothing else of servebench, so they also
run where only that folder is.

================  ====================================================================================
file              what it knows
================  ====================================================================================
``settings``      what the launcher tells the process: tensors, weights, device, threads, precision
``batching``      many queries, one call of the model, each query its own answer
``predictor``     the function that answers a batch; torch is imported for models that need it only
``torch_model``   a torch network with weights, on its device, in its precision
``safetensors``   weights in that format
``model``         Triton's contract
``handler``       TorchServe's contract
``messages``      what requests and replies look like on TorchServe, which leaves both to the handler
================  ====================================================================================

A model's ``network.py`` offers ``build(**options)``: a torch module that takes the inputs in
order and gives the output, or, for models without torch, a function of arrays that does.
"""

from __future__ import annotations

_COMMON = ("settings.py", "batching.py", "predictor.py", "torch_model.py", "safetensors.py")

#: What goes into a Triton model's version folder, and into a TorchServe archive's package; the entry point comes first.
TRITON_FILES = ("model.py", *_COMMON)
TORCHSERVE_FILES = ("handler.py", "messages.py", *_COMMON)
