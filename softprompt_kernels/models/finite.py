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


def fitting_cast(numbers: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """`numbers` in `dtype`; None: as they are.

    Args:
        numbers: finite, of any shape.
        dtype: of the result.
        name: of the setting that asks for it, for the error.

    Raises:
        SoftPromptError: they do not fit. Only float16 ends so early that this is looked at.
    """
    if dtype is None or dtype == numbers.dtype:
        return numbers
    cast = numbers.to(dtype)
    if dtype == torch.float16 and not bool(cast.isfinite().all()):
        raise SoftPromptError(
            f"{name}: got float16, which ends at 65504, for larger keys or values; accepted are bfloat16 and float32"
        )
    return cast
