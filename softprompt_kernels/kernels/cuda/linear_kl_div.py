"""Divergence between the logits of two heads, row work in CUDA C++. See `kernels/device/chunked_logits.py`."""

from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Runner
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import chunked_logits
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem


class LinearKlDiv:
    """By one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._rows = CudaRows(runner)

    def unsupported(self, problem: HeadProblem) -> str | None:
        """It serves every divergence of fp32, bf16 and fp16 students; the teacher's side may have any dtype."""
        return self._runner.unsupported_tensor("student_hidden", problem.student)

    def forward(self, problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed, in the dtype it is kept in."""
        return chunked_logits.forward(problem, need_gradient, self._rows)

    def backward(self, problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
        """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias, each in its input's dtype."""
        return chunked_logits.backward(problem, row_scale, needs, self._rows)
