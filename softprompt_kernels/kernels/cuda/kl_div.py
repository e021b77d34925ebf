"""Divergence between given logits in CUDA C++. See `csrc/cuda/kl_rows.cu` for the row work.

The forward reads both logits once (twice for jsd) and keeps 5 numbers a row; the backward reads them once more and
writes the gradient. Logits are read in their own dtype and with their own strides. One launch each, nothing allocated
but what is returned.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Runner
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device.rows import STATISTICS, Gradient, Logits, device_rows
from softprompt_kernels.kernels.loss_problem import LogitsProblem


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
        loss = problem.student.new_empty(problem.student.shape[0], dtype=torch.float32)
        statistics = loss.new_empty(loss.shape[0], STATISTICS)
        launch = self._rows.divergence(
            _logits(problem),
            problem.vocab,
            problem.divergence,
            device_rows(problem.weights),
            loss=loss,
            loss_scale=problem.divergence.temperature**2,
            statistics=statistics,
        )
        self._rows.run([launch], loss.device)
        return loss, statistics

    def backward(self, problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
        """Σ_n row_scale[n] · loss[n], derived by the student's logits; 0 in vocabulary rows that are cut."""
        student = problem.student
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        launch = self._rows.divergence(
            _logits(problem),
            problem.vocab,
            problem.divergence,
            device_rows(problem.weights),
            statistics=statistics,
            gradient=Gradient(gradient, device_rows(row_scale), problem.divergence.temperature),
        )
        self._rows.run([launch], student.device)
        return gradient


def _logits(problem: LogitsProblem) -> Logits:
    return Logits(problem.student, problem.teacher, scale=1 / problem.divergence.temperature)
