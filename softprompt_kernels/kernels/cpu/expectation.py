"""The mean of a head's own weights under its distribution: row kernels in C++, and its GEMM where that is faster.

The driver, with the formula and the cost, is `kernels/host/head_expectation.py`.
"""

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.gemm import fastest_gemm
from softprompt_kernels.kernels.cpu.rows import exponentials_
from softprompt_kernels.kernels.host import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem


def unsupported(problem: ExpectationProblem) -> str | None:
    """Why the problem is not supported, None if it is: all heads on a CPU are, except in float64."""
    return native.unsupported_tensor("hidden states", problem.hidden)


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    return head_expectation.forward(problem, exponentials_, fastest_gemm())
