"""What the registered ops share around their kernels."""

from collections.abc import Callable
from typing import Any

import torch


def run_kernel(device: torch.device, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a kernel with autocast off: the op has already chosen its dtypes."""
    with torch.autocast(device.type, enabled=False):
        return kernel(*arguments)


def forbid_double_backward(backward_op: Any, name: str) -> None:
    """Makes a derivative of the op's backward an error that says so."""

    def raise_error(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{name} has no second derivative: its backward cannot be differentiated")

    backward_op.register_autograd(raise_error)
