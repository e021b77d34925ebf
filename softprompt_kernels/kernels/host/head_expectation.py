"""Expectations of a head's weights under its own distribution: one pass over tiles of the vocabulary.

As in flash attention, let m be the largest logit of the tiles so far. A tile costs one GEMM for its logits z, a row
kernel that turns them into e = exp(z − m) and rescales the sums when m grows, and one GEMM that adds e W to the mean:

    A = m + log Σ e,        E_p[W] = Σ e W / Σ e

All tokens of a chunk use a tile while it is in the cache. The logits of the whole vocabulary never exist. The backend
supplies the row kernel and the GEMM.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.chunks import chunk_size, kept_tokens, token_chunks, weight_parts
from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.host.rows import ExponentialsKernel
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, ExpectationState

_TILE = 4096  # vocabulary entries; all sizes from 1024 to 8192 take the same time within 5 %, at d = 576 and 896


def forward(problem: ExpectationProblem, row_kernel: ExponentialsKernel, gemm: Gemm) -> Expectation:
    """For each row: lse(z) in float64, z of the label, E_p[W] and E_p[bias].

    Raises:
        ValueError: a label is not below the vocabulary's size.
    """
    head, dtype = problem.head, problem.compute_dtype
    tokens, size = problem.hidden.shape
    scale = head.logit_scale / problem.temperature
    bias = None if head.bias is None else head.bias.to(dtype).contiguous()
    if problem.labels is not None and bool((problem.labels >= head.weight.shape[0]).any()):
        largest = int(problem.labels.max())
        raise ValueError(f"labels must be below the vocabulary's size {head.weight.shape[0]}; got {largest}")
    log_partition = torch.zeros(tokens, dtype=torch.float64)
    label_logit = None if problem.labels is None else torch.zeros(tokens, dtype=dtype)
    mean = torch.zeros(tokens, size, dtype=dtype) if problem.need_mean else None
    bias_mean = None if bias is None else torch.zeros(tokens, dtype=dtype)

    tile = min(_TILE, head.weight.shape[0])
    elements = tile * (2 if gemm.copies_result else 1) + 2 * size
    chunk = chunk_size(tokens, problem.chunk_tokens, elements, [head.weight], dtype, gemm)
    workspace = torch.empty(chunk * tile, dtype=dtype)
    for rows in token_chunks(tokens, kept_tokens(problem.weights), chunk):
        hidden = problem.hidden[rows].to(dtype).contiguous()
        state = _initial_state(problem, hidden, bias, rows, mean)
        hidden = hidden if scale == 1 else hidden * scale
        for columns, (weight,) in weight_parts([head.weight], dtype, gemm, tile):
            logits = workspace[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
            gemm.multiply(logits, hidden, weight.mT, False)
            row_kernel(logits, None if bias is None else bias[columns], scale, columns.start, state)
            if state.mean is not None:
                gemm.multiply(state.mean, logits, weight, True)
        log_partition[rows] = state.row_max.double() + state.row_sum.log()
        if mean is not None and state.mean is not None:
            mean[rows] = state.mean.div_(state.row_sum[:, None])
        if bias_mean is not None and state.bias_sum is not None:
            bias_mean[rows] = (state.bias_sum / state.row_sum).to(dtype)
        if label_logit is not None and state.label_logit is not None:
            label_logit[rows] = state.label_logit
    return Expectation(log_partition, label_logit, mean, bias_mean)


def _initial_state(
    problem: ExpectationProblem, hidden: Tensor, bias: Tensor | None, rows: slice | Tensor, mean: Tensor | None
) -> ExpectationState:
    tokens, dtype = hidden.shape[0], hidden.dtype
    if mean is not None:
        mean = mean[rows]
    labels = None if problem.labels is None else problem.labels[rows].contiguous()
    return ExpectationState(
        torch.full((tokens,), -torch.inf, dtype=dtype),
        torch.zeros(tokens, dtype=torch.float64),
        mean,
        None if bias is None else torch.zeros(tokens, dtype=torch.float64),
        labels,
        None if labels is None else torch.zeros(tokens, dtype=dtype),
    )
