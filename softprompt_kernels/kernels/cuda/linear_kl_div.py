"""Divergence between the logits of two heads, with CUDA C++ row kernels.

The driver is `kernels/device/chunked_logits.py`, the row kernel `csrc/cuda/losses/kl_rows.cu`.
"""

from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Launcher
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import chunked_logits
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem


class LinearKlDiv:
    """The CUDA C++ kernels of one module: on a GPU (`_native`) or on the host (`_simt`)."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._rows = CudaRows(launcher)

    def unsupported(self, problem: HeadProblem) -> str | None:
        """Why a problem cannot be served, None if it can. The student must be fp32, bf16 or fp16."""
        return self._launcher.unsupported_tensor("student_hidden", problem.student)

    def forward(self, problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Loss of each row [N] and, if needed, ∂ loss[n] / ∂ student[n] [N, d] in the dtype that it is stored in."""
        return chunked_logits.forward(problem, need_gradient, self._rows)

    def backward(self, problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
        """Gradients of Σ_n row_scale[n] · loss[n] for hidden states, weight and bias, each in its input's dtype."""
        return chunked_logits.backward(problem, row_scale, needs, self._rows)
