"""What the registered ops share around their kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.attention_problem import accumulate_dtype

NO_SECOND_DERIVATIVE = "{} has no second derivative: its backward cannot be differentiated"


def run_kernel(device: torch.device, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a kernel with autocast off: the op has already chosen its dtypes."""
    with torch.autocast(device.type, enabled=False):
        return kernel(*arguments)


def forbid_double_backward(backward_op: Any, name: str) -> None:
    """Makes a derivative of the op's backward an error that says so."""

    def raise_error(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(name))

    backward_op.register_autograd(raise_error)


def row_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that row gradients wait in between forward and backward.

    That of the hidden states, except fp16: before they are multiplied by a loss scale, small gradients leave its range.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("softprompt_kernels::scale_rows", mutates_args=())
def _scale_rows(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    return (stored * scale[:, None].to(accumulate_dtype(stored.dtype))).to(hidden.dtype)


@_scale_rows.register_fake
def _(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    return stored.new_empty(stored.shape, dtype=hidden.dtype)


def scale_rows(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    """stored [N, d] times scale [N] in hidden's dtype, in a new tensor: a second backward finds the first one's input.

    An op of its own that also takes the hidden states, so that a second derivative by either is an error rather than
    one that takes the stored gradient for a constant.
    """
    scaled: Tensor = _scale_rows(stored, scale, hidden, op)
    return scaled


def _setup_scale_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.op = inputs[3]


def _backward_scale_rows(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE.format(ctx.op))


_scale_rows.register_autograd(_backward_scale_rows, setup_context=_setup_scale_rows)
