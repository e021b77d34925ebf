"""Row work of the losses on a GPU, as the drivers of this package ask a backend for it.

The drivers make matrix products and cut problems into chunks; what happens to a row of logits is the backend's, in
Triton or in CUDA C++.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState

STATISTICS = 5  # numbers of a row that a gradient can be computed from


@dataclass(frozen=True)
class Logits:
    """Both sides [n, V], and what makes logits over T of them.

    scale · (side + bias), or scale · tanh(inner · (side + bias)) where `inner` is given.
    """

    student: Tensor
    teacher: Tensor
    student_bias: Tensor | None = None  # [V] fp32
    teacher_bias: Tensor | None = None
    scale: float = 1.0
    inner: float | None = None


@dataclass(frozen=True)
class Gradient:
    """Where gradients by the sides' student go, [n, V or more]; 0 after V. It may be the student itself."""

    out: Tensor
    row_scale: Tensor | None = None  # [n] fp32
    scale: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Where e goes, if anywhere: rounded to the matrix's dtype, and what that lost if there is a second matrix."""

    high: Tensor | None = None  # [n, columns]
    low: Tensor | None = None
    scale: float = 1.0  # a power of 2 that both are multiplied by


Launch = TypeVar("Launch")  # a backend's own: one kernel with its arguments


class RowWork(Protocol[Launch]):
    """A backend's row work. Launches hold tensors, and touch them when they are run."""

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
        """With `loss` [n], measures the rows (into `statistics` where given); with `gradient`, writes that.

        A gradient without a loss is computed from the statistics that an earlier launch left.
        """

    def exponentials(
        self,
        products: Tensor,  # [n, columns] fp32
        bias: Tensor | None,  # [columns] fp32
        scale: float,  # logits are scale · (products + bias)
        first: int,  # the tile's first word
        weights: Tensor | None,  # [n]
        state: ExpectationState,
        parts: Parts,
    ) -> Launch:
        """e = exp(z − the largest z so far) of a tile, and the state after it, its mean only rescaled."""

    def run(self, launches: Iterable[Launch], device: torch.device) -> None:
        """Runs launches one after the other on a device's current stream, whichever device is the current one."""


def device_rows(tensor: Tensor | None) -> Tensor | None:
    """[n] in fp32 and in one piece, or None."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()
