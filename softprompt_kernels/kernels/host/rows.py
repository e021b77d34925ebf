"""What a CPU backend supplies to the drivers of this package: row kernels, workspace and a GEMM.

The drivers cut problems into chunks and tiles and call the GEMM. What happens to a row of logits is the backend's part,
in PyTorch (`composed`) or in C++ (`cpu`). Arguments of row kernels are passed by position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState

Allocate = Callable[[int, int, torch.dtype], Tensor]  # an uninitialised workspace [rows, columns], used for one loss


class DivergenceKernel(Protocol):
    """Loss [n] of whole rows, without the factor T².

    `student` and `teacher` [n, V] are W h of the scaled hidden states, before the activations. Both are overwritten.
    With `need_gradient`, `student` becomes the gradient by W h of the student, without the factor of a softcap (but
    with its tanh').
    """

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_activation: Activation,
        teacher_activation: Activation,
        divergence: Divergence,
        need_gradient: bool,
        /,
    ) -> Tensor: ...


class KlColumn(IntEnum):
    """The columns of `KlTileState.scalars`, in the order of the fields of the C++ struct in csrc/cpu/losses/kl.h.

    `streamed_vocabulary.py` defines the letters.
    """

    P_MAX = 0  # m
    CENTRE = 1  # c
    P_SUM = 2  # S
    Q_SUM = 3  # R
    EXPM1_SUM = 4  # C
    EXCESS_SUM = 5  # X
    DIFFERENCE_SUM = 6  # Y
    NEEDS_FALLBACK = 7  # 1: the tiles cannot give the divergence of this row; else 0


@dataclass(frozen=True)
class KlTileState:
    """What is known of the n tokens of a chunk after some tiles of the vocabulary."""

    scalars: Tensor  # [n, len(KlColumn)] float64, 0 before the first tile
    sums: Tensor | None  # [2 n, d] U, then T; None: no gradient


class DivergenceTileKernel(Protocol):
    """Adds a tile of columns to the scalars of a state. It does not add to U and T: it only rescales them.

    `student` and `teacher` [n, columns] are as in `DivergenceKernel`. If the state has U and T, `student` becomes the
    weights of the rows of W in U, and `teacher` those in T, both with the tanh' of a softcap.
    """

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_activation: Activation,
        teacher_activation: Activation,
        divergence: Divergence,
        state: KlTileState,
        /,
    ) -> None: ...


class ExponentialsKernel(Protocol):
    """Turns a tile of logits z [n, columns] into e = exp(z − m) and updates a state. It only rescales the mean.

    The tile starts at vocabulary entry `first`. Adds `scale` · `bias` [columns] to `logits` before; a bias of −inf
    removes an entry.
    """

    def __call__(
        self, logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState, /
    ) -> None: ...


@dataclass(frozen=True)
class HostKernels:
    """What a backend supplies for the divergence of two heads."""

    gemm: Gemm
    allocate: Allocate
    divergence: DivergenceKernel
    divergence_tile: DivergenceTileKernel | None  # None: it cannot stream the vocabulary
