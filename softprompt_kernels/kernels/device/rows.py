"""The row kernels of the losses on a GPU: the interface between the drivers of this package and a backend.

The drivers cut problems into chunks and call the GEMMs. What happens to a row of logits is the backend's part, in
Triton or in CUDA C++.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState

STATISTICS = 5  # numbers per row, from which a later launch can compute the gradient


@dataclass(frozen=True)
class Logits:
    """Student and teacher [n, V], and how logits over T follow from them.

    scale · (x + bias), or scale · tanh(inner · (x + bias)) where `inner` is given.
    """

    student: Tensor
    teacher: Tensor
    student_bias: Tensor | None = None  # [V] fp32
    teacher_bias: Tensor | None = None
    scale: float = 1.0
    inner: float | None = None


@dataclass(frozen=True)
class Gradient:
    """Where the gradient by `Logits.student` is written, times `scale` and `row_scale`; 0 in columns from V on."""

    out: Tensor  # [n, V or more]; may be Logits.student itself
    row_scale: Tensor | None = None  # [n] fp32
    scale: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Where e = exp(z − m) is written: rounded to the dtype of `high`; its rounding error to `low`, if there is one."""

    high: Tensor | None = None  # [n, columns]; None: e is not written
    low: Tensor | None = None
    scale: float = 1.0  # a power of 2 that multiplies both


Launch = TypeVar("Launch")  # a backend's own type: one kernel with its arguments


class RowKernels(Protocol[Launch]):
    """A backend's row kernels. A launch holds its tensors, and accesses their memory only when it is run."""

    def divergence(
        self,
        logits: Logits,
        vocab: int,
        divergence: Divergence,
        weights: Tensor | None,
        *,
        loss: Tensor | None = None,
        loss_scale: float = 1.0,
        statistics: Tensor | None = None,
        gradient: Gradient | None = None,
    ) -> Launch:
        """With `loss` [n]: writes the losses, and the rows' statistics where given. With `gradient`: writes that.

        Without `loss`, the gradient is computed from the statistics that an earlier launch wrote.
        """

    def exponentials(
        self,
        product: Tensor,  # [n, columns] fp32, h Wᵀ
        bias: Tensor | None,  # [columns] fp32
        scale: float,  # logits z are scale · (product + bias)
        first: int,  # the first vocabulary entry of the tile
        weights: Tensor | None,  # [n]
        state: ExpectationState,
        parts: Parts,
        /,
    ) -> Launch:
        """Writes e = exp(z − m) of a tile, and updates the state; the mean is only rescaled."""

    def run(self, launches: Iterable[Launch], device: torch.device) -> None:
        """Runs launches in order on the current stream of `device`, which need not be the current device."""


def device_rows(tensor: Tensor | None) -> Tensor | None:
    """[n] in fp32 and contiguous, or None."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
