"""What a head's distribution expects of its own weights, row work in CUDA C++. See `device/head_expectation.py`."""

from softprompt_kernels.kernels.cuda.native import Runner
from softprompt_kernels.kernels.cuda.rows import CudaRows
from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem


class HeadExpectation:
    """By one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._rows = CudaRows(runner)

    def unsupported(self, problem: ExpectationProblem) -> str | None:
        """It serves every head in fp32, bf16 and fp16."""
        return self._runner.unsupported_tensor("hidden states", problem.hidden)

    def forward(self, problem: ExpectationProblem) -> Expectation:
        """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
        return head_expectation.forward(problem, self._rows)
