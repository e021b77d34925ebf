"""Weights that accelerate keeps elsewhere, in the memory of the CPU or on the disk, and loads for each run of a module.

Between two runs such a module has parameters on the meta device, which have a shape and no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's own parameters for each of its runs."""
    if not hasattr(module, "_hf_hook"):
        return False
    from accelerate.utils import has_offloaded_params  # accelerate has made the hook, so it is installed

    return has_offloaded_params(module)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Within the context, the module's own parameters are on the device where it runs.

    A parameter that is taken out of the module in the context keeps its numbers after it.
    """
    if not is_offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def input_device(model: Any) -> torch.device:
    """The device where a transformers model takes its token ids: that of its embedding."""
    embedding = model.get_input_embeddings()
    for module in embedding.modules():  # more than one if an adapter wraps it
        if is_offloaded(module):
            return torch.device(module._hf_hook.execution_device)
    device: torch.device = embedding.weight.device
    return device
