"""What a model computes must be finite. In 16 bits the activations of some models are not."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError


def check_finite(model: PreTrainedModel, what: str, numbers: Tensor) -> None:
    """Raise a SoftPromptError unless all numbers are finite. Waits for the device.

    Args:
        model: that computed them.
        what: their name, in the plural.
        numbers: of any shape.
    """
    if not bool(numbers.isfinite().all()):
        raise not_finite(model, what)


def not_finite(model: PreTrainedModel, what: str) -> SoftPromptError:
    """The error of a model whose `what` are not finite. It names the dtype, and what to do."""
    name = str(model.dtype).removeprefix("torch.")
    advice = "check its weights and the prefix"
    if model.dtype == torch.float16:
        advice = "float16 ends at 65504, and this model needs larger numbers; load it in bfloat16 or float32"
    return SoftPromptError(f"model: its {what} in {name} are not finite, accepted are finite numbers: {advice}")
