"""Divergence between given logits, with CUDA C++ row kernels.

The driver is `kernels/device/given_logits.py`, the row kernel `csrc/cuda/losses/kl_rows.cu`.
"""

from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Launcher
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import given_logits
from softprompt_kernels.kernels.device.rows import STATISTICS
from softprompt_kernels.kernels.problems.loss import LogitsProblem


class KlDiv:
    """The CUDA C++ kernels of one module: on a GPU (`_native`) or on the host (`_simt`)."""

    STATISTICS = STATISTICS

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._rows = CudaRows(launcher)

    def unsupported(self, problem: LogitsProblem) -> str | None:
        """Why a problem cannot be served, None if it can: every divergence of fp32, bf16 and fp16 logits can."""
        return self._launcher.unsupported_tensor(
            "student_logits", problem.student
        ) or self._launcher.unsupported_tensor("teacher_logits", problem.teacher)

    def forward(self, problem: LogitsProblem) -> tuple[Tensor, Tensor]:
        """Loss of each row [N], and the statistics that the backward needs [N, STATISTICS]."""
        return given_logits.forward(problem, self._rows)

    def backward(self, problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
        """Gradient of Σ_n row_scale[n] · loss[n] with respect to the student's logits, 0 in columns beyond `vocab`."""
        return given_logits.backward(problem, row_scale, statistics, self._rows)
