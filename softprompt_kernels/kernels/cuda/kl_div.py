"""Divergence between given logits, row work in CUDA C++. See `device/given_logits.py`, `cuda/losses/kl_rows.cu`."""

from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Runner
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import given_logits
from softprompt_kernels.kernels.device.rows import STATISTICS
from softprompt_kernels.kernels.problems.loss import LogitsProblem


class KlDiv:
    """By one runner."""

    STATISTICS = STATISTICS

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._rows = CudaRows(runner)

    def unsupported(self, problem: LogitsProblem) -> str | None:
        """It serves every divergence of fp32, bf16 and fp16 logits."""
        return self._runner.unsupported_tensor("student_logits", problem.student) or self._runner.unsupported_tensor(
            "teacher_logits", problem.teacher
        )

    def forward(self, problem: LogitsProblem) -> tuple[Tensor, Tensor]:
        """Loss of each row [N], and what the backward needs to know of it [N, STATISTICS]."""
        return given_logits.forward(problem, self._rows)

    def backward(self, problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
        """Σ_n row_scale[n] · loss[n], derived by the student's logits; 0 in vocabulary rows that are cut."""
        return given_logits.backward(problem, row_scale, statistics, self._rows)
