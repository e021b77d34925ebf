"""Products of hidden states with a head's weight, by the fastest that a backend has for them, and what they take."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """How to multiply.

    Args:
        multiply: `multiply(out, left, right, accumulate)` is out = left right, or out += left right. The right side has
            neighbours in memory in its rows or in its columns.
        narrow: whether the right side may be of 16 bits where the left one is not.
        weight_rows: how many rows of the left side take as long as what a product does with the right side alone.
        columns: of a product at most, None: as many as there are.
        depth: the same of the summed dimension.
        copies_result: whether there is a copy of the product's result in the library's own memory.
        buffer: bytes of the library's own memory beside that.
    """

    multiply: Callable[[Tensor, Tensor, Tensor, bool], object]
    narrow: bool
    weight_rows: int
    columns: int | None
    depth: int | None
    copies_result: bool
    buffer: int


def _multiply(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


# Measured with MKL in fp32, for 24 to 128 rows of d = 576 and 896. It makes a copy of a wide result, which would be as
# large as all logits.
TORCH = Products(
    _multiply, narrow=False, weight_rows=40, columns=2**15, depth=None, copies_result=True, buffer=2 * 2**20
)
