"""What a head's distribution expects of its own weights, row work in Triton. See `device/head_expectation.py`."""

from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses.rows import TritonRows
from softprompt_kernels.kernels.triton.targets import Target, target_of


def unsupported(problem: ExpectationProblem) -> str | None:
    """It serves every head in fp32, bf16 and fp16."""
    return runtime.unsupported_tensor("hidden states", problem.hidden)


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    return head_expectation.forward(problem, TritonRows(target_of(problem.hidden.device)))


def plan(problem: ExpectationProblem, target: Target) -> list[Launch]:
    """The launches for the first tile of the first chunk."""
    return head_expectation.plan(problem, TritonRows(target))
