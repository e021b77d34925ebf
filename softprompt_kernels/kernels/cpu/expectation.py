"""What a head's distribution expects of its own weights, with row work and, where they are faster, products in C++.

See `kernels/host/head_expectation.py`.
"""

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.gemm import products
from softprompt_kernels.kernels.cpu.rows import exponentials_
from softprompt_kernels.kernels.host import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem


def unsupported(problem: ExpectationProblem) -> str | None:
    """It serves every head on a CPU that is not computed in float64."""
    return native.unsupported_tensor("hidden states", problem.hidden)


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    return head_expectation.forward(problem, exponentials_, products())
