"""Attention over [prompt ; own tokens] in Triton: one online softmax over both; prompts are read in place.

A forward is 1 launch, or 2 where few rows see many keys and several programs share these (split-KV). A backward is 2
launches, or 3 where programs have to add up partial sums of prompt gradients. The kernels are in `forward.py`,
`backward_dq.py` and `backward_dkdv.py`; what they share is in `addressing.py`, `scores.py` and `key_loop.py`; `plan.py`
cuts the work into tiles and builds the launches.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs
from softprompt_kernels.kernels.triton.launch import run_all
from softprompt_kernels.kernels.triton.runtime import float32_precision, unsupported_tensor
from softprompt_kernels.kernels.triton.targets import target_of

LARGEST_HEAD = 256
LARGEST_IEEE_HEAD = 128  # in fp32 without TF32: no tile of a larger head fits the registers


def unsupported(problem: AttentionProblem) -> str | None:
    """It serves fp32, bf16 and fp16 with head sizes up to 256; in fp32 those above 128 only where TF32 is allowed."""
    size = max(problem.query.shape[3], problem.value.shape[3])
    if size > LARGEST_HEAD:
        return f"the head size is {size}, and it serves up to {LARGEST_HEAD}"
    if size > LARGEST_IEEE_HEAD and problem.query.dtype == torch.float32 and float32_precision() == "ieee":
        return (
            f"the head size is {size} in float32, and it serves up to {LARGEST_IEEE_HEAD} there "
            f"({LARGEST_HEAD} with torch.backends.cuda.matmul.allow_tf32)"
        )
    return unsupported_tensor("query", problem.query)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] in query's dtype, and lse [B, Hq, M] in fp32."""
    from softprompt_kernels.kernels.triton.attention.plan import plan_forward

    out, lse, launches = plan_forward(problem, target_of(problem.query.device))
    run_all(launches, problem.query.device)
    return out, lse


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """The gradients named in `needs`. Those of prompts are summed in fp32, in the same order in every run."""
    from softprompt_kernels.kernels.triton.attention.plan import plan_backward

    target = target_of(problem.query.device)
    gradients, launches = plan_backward(problem, out, lse, grad_out, grad_lse, needs, target)
    run_all(launches, problem.query.device)
    return gradients
