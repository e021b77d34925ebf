"""The expectation of a head's weights under its own distribution, with CUDA C++ row kernels.

The driver is `kernels/device/head_expectation.py`, the row kernel `csrc/cuda/losses/expectation_rows.cu`.
"""

from softprompt_kernels.kernels.cuda.native import Launcher
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem


class HeadExpectation:
    """The CUDA C++ kernels of one module: on a GPU (`_native`) or on the host (`_simt`)."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._rows = CudaRows(launcher)

    def unsupported(self, problem: ExpectationProblem) -> str | None:
        """Why a problem cannot be served, None if it can: every head in fp32, bf16 and fp16 can."""
        return self._launcher.unsupported_tensor("hidden states", problem.hidden)

    def forward(self, problem: ExpectationProblem) -> Expectation:
        """For each row: lse(z) in float64, z of the label, E_p[W] and E_p[bias]."""
        return head_expectation.forward(problem, self._rows)
