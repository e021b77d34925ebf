"""E_p[W] of a language-model head, p its softmax; row kernels in Triton. The driver is `device/head_expectation.py`."""

from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses.plan import TritonRows
from softprompt_kernels.kernels.triton.targets import Target, target_of


def unsupported(problem: ExpectationProblem) -> str | None:
    """It serves every head, with hidden states in fp32, bf16 and fp16."""
    return runtime.unsupported_tensor("hidden states", problem.hidden)


def forward(problem: ExpectationProblem) -> Expectation:
    """For each row lse(z) in float64, z of the label, E_p[W] and E_p[bias]."""
    return head_expectation.forward(problem, TritonRows(target_of(problem.hidden.device)))


def plan(problem: ExpectationProblem, target: Target) -> list[Launch]:
    """The launches for the first tile of the first chunk."""
    return head_expectation.plan(problem, TritonRows(target))
