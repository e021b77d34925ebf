"""The GEMM of hidden states with a head's weight on a CPU: which one a backend uses, and its limits and costs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.ranges import kernel_range


@dataclass(frozen=True)
class Gemm:
    """A GEMM implementation.

    Args:
        multiply: `multiply(out, left, right, accumulate)` computes out = left right, or out += left right. One of the
            two strides of `right` is 1.
        mixed: `right` may have 16 bits while `left` has 32.
        weight_cost: reading and packing `right` takes as long as this many rows of `left`.
        max_columns: columns of `out` per call at most; None: no limit.
        max_depth: length of the summed dimension per call at most; None: no limit.
        copies_result: the library keeps a copy of `out` in its own memory.
        workspace: bytes of the library's other memory.
    """

    multiply: Callable[[Tensor, Tensor, Tensor, bool], object]
    mixed: bool
    weight_cost: int
    max_columns: int | None
    max_depth: int | None
    copies_result: bool
    workspace: int


def _multiply(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    with kernel_range("gemm", *out.shape, left.shape[1]):
        if accumulate:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)


# PyTorch's GEMM. Measured with MKL in fp32, for 24 to 128 rows of d = 576 and 896. MKL copies a wide result: without a
# limit on the columns the copy would be as large as all logits.
TORCH = Gemm(
    _multiply,
    mixed=False,
    weight_cost=40,
    max_columns=2**15,
    max_depth=None,
    copies_result=True,
    workspace=2 * 2**20,
)
