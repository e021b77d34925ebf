"""Attention over [prompt ; own tokens] in Triton: one online softmax over both, prompts read where they lie.

A forward is 1 launch, or 2 where few rows look at many keys and programs share these; a backward is 2, and a third adds
up what programs that shared a prompt's rows have left. The kernels stand in `attention_forward`,
`attention_query_gradient` and `attention_key_gradients`, what they share in `attention_rows`, `attention_scores` and
`attention_sweep`; `attention_plan` says how work is cut.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs
from softprompt_kernels.kernels.triton.launch import run_all
from softprompt_kernels.kernels.triton.runtime import float32_precision, unsupported_tensor
from softprompt_kernels.kernels.triton.targets import target_of

LARGEST_HEAD = 256
LARGEST_IEEE_HEAD = 128  # of fp32 without tensor cores: beyond it no tile fits the registers


def unsupported(problem: AttentionProblem) -> str | None:
    """It serves fp32, bf16 and fp16 with heads of up to 256, those above 128 in fp32 where products may be in TF32."""
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
    """out [B, Hq, M, Dv] and lse [B, Hq, M]."""
    from softprompt_kernels.kernels.triton.attention.plan import plan_forward

    out, lse, launches = plan_forward(problem, target_of(problem.query.device))
    run_all(launches, problem.query.device)
    return out, lse


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of the inputs named in `needs`; those of prompts are summed in fp32, in the same order at every run."""
    from softprompt_kernels.kernels.triton.attention.plan import plan_backward

    target = target_of(problem.query.device)
    gradients, launches = plan_backward(problem, out, lse, grad_out, grad_lse, needs, target)
    run_all(launches, problem.query.device)
    return gradients
