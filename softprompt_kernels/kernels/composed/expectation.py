"""What a head's distribution expects of its own weights, with row work by PyTorch. See `host/head_expectation.py`."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.host import head_expectation as tiled
from softprompt_kernels.kernels.host.chunks import block_size
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, ExpectationState


def unsupported(problem: ExpectationProblem) -> str | None:
    """It skips rows by looking at the weights, which would stop another device."""
    device = problem.hidden.device
    return None if device.type == "cpu" else f"hidden states are on {device}, and it serves the CPU"


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    return tiled.forward(problem, _row_work_, TORCH)


def _row_work_(logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState) -> None:
    """See `RowWork`; in cache-sized blocks of rows."""
    step = block_size(logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        _exponentials_(logits[rows], bias, scale, first, _part(state, rows))


def _part(state: ExpectationState, rows: slice) -> ExpectationState:
    fields = (state.largest, state.total, state.mean, state.bias_total, state.labels, state.label_logit)
    return ExpectationState(*(None if f is None else f[rows] for f in fields))  # type: ignore[arg-type]


def _exponentials_(logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState) -> None:
    if bias is not None:
        logits.add_(bias, alpha=scale)
    if state.labels is not None and state.label_logit is not None:
        column = state.labels - first
        here = (column >= 0) & (column < logits.shape[1]) & (state.labels >= 0)
        chosen = logits.gather(1, torch.where(here, column, 0)[:, None]).squeeze(1)
        torch.where(here, chosen, state.label_logit, out=state.label_logit)
    largest = torch.maximum(state.largest, logits.amax(1))
    shift = torch.where(largest == -torch.inf, 0, largest)  # no word yet
    old = torch.exp(state.largest - shift)
    state.largest.copy_(largest)
    logits.sub_(shift[:, None]).exp_()
    state.total.mul_(old).add_(logits.sum(1))
    if bias is not None and state.bias_total is not None:
        # A bias of −inf has probability 0 and expects nothing.
        state.bias_total.mul_(old).add_(torch.mv(logits, bias.masked_fill(bias == -torch.inf, 0)))
    if state.mean is not None:
        state.mean.mul_(old[:, None])
