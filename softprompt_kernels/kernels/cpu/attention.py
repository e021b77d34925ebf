"""Attention over [prompt ; own tokens] in C++: one online softmax over both segments, and no copy of the prompts.

Arithmetic is fp32, whatever the dtype of the tensors. On processors with a matrix unit (AMX), the GEMMs are as accurate
as fp32; GEMMs of softmax weights with tensors of 16 bits are as accurate as those 16 bits. All features of the op are
supported: banks, ragged and packed sequences, windows, softcap, sinks, a differentiable lse. The kernels are in
`csrc/cpu/attention/forward.cpp` and `backward.cpp`. The sums of dK and dV over the batch are fp32, in an order that
depends on the number of threads alone.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.problems.attention import (
    AttentionProblem,
    Gradients,
    Needs,
    empty_output,
    empty_token_major,
)
from softprompt_kernels.kernels.problems.tensors import DTYPES, unit_stride

View = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides
Vector = tuple[int, int]  # address, length

# For profilers: the one kernel of each pass, and rows and keys of the scores that exist at a time, `kBlockRows` and
# `kTileKeys` in csrc/cpu/attention.
ONLY_KERNEL = {
    "forward": ("attention_forward", 32 if native.instruction_set() == "amx" else 6, 64),
    "backward": ("attention_backward", 96, 64),
}


def unsupported(problem: AttentionProblem) -> str | None:
    """Why the problem is not supported, None if it is: everything on a CPU is, except float64."""
    return native.unsupported_tensor("query", problem.query)


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] in the dtype of the query, and lse [B, Hq, M] in fp32."""
    out = empty_output(problem)
    lse = problem.query.new_empty(problem.query.shape[:3], dtype=torch.float32)
    _kept, native_problem = _problem(problem)
    native_problem.forward(_view(out), _vector(lse))
    return out, lse


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of the inputs named in `needs`. Work that only other gradients need is skipped."""
    _kept, native_problem = _problem(problem)
    out, grad_out = unit_stride(out), unit_stride(grad_out)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    query, key, value = (
        empty_token_major(t, *t.shape) if need else None
        for t, need in ((problem.query, needs.query), (problem.key, needs.key), (problem.value, needs.value))
    )
    prompt_key = problem.prompt_key.new_empty(problem.prompt_key.shape) if needs.prompt_key else None
    prompt_value = problem.prompt_value.new_empty(problem.prompt_value.shape) if needs.prompt_value else None
    sinks = None
    if needs.sinks and problem.sinks is not None:
        sinks = problem.sinks.new_empty(problem.sinks.shape, dtype=torch.float32)
    native_problem.backward(
        _view(out),
        _view(grad_out),
        _vector(lse),
        None if grad_lse is None else _vector(grad_lse),
        *(None if g is None else _view(g) for g in (query, key, value, prompt_key, prompt_value)),
        None if sinks is None else _vector(sinks),
    )
    if sinks is not None and problem.sinks is not None:
        sinks = sinks.to(problem.sinks.dtype)
    return Gradients(query, key, value, prompt_key, prompt_value, sinks)


def _problem(problem: AttentionProblem) -> tuple[list[Tensor | None], Any]:
    """The native problem, and before it the tensors whose memory it points to: keep them as long as the problem."""
    strided = [problem.query, problem.key, problem.value, problem.prompt_key, problem.prompt_value]
    dense = [problem.prompt_index, problem.prompt_lengths, problem.key_lengths, problem.cu_seqlens, problem.sinks]
    views: list[View] = []
    for i, tensor in enumerate(strided):
        view = _view(tensor)
        if view[2][3] != 1 or 0 in view[1]:
            strided[i] = unit_stride(tensor)
            view = _view(strided[i])
        views.append(view)
    vectors: list[Vector | None] = [None] * 5
    for i, vector in enumerate(dense):
        if vector is not None:
            dense[i] = vector = vector.to(torch.float32 if i == 4 else torch.int64).contiguous()
            vectors[i] = _vector(vector)
    native_problem = native.module().AttentionProblem(
        DTYPES[problem.query.dtype],
        *views,
        *vectors,
        problem.causal,
        problem.window,
        problem.softcap,
        problem.scale,
        torch.get_num_threads(),
    )
    return [*strided, *dense], native_problem


def _view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _vector(tensor: Tensor) -> Vector:
    return tensor.data_ptr(), tensor.numel()
