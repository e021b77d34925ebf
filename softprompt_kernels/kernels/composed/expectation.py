"""Expectations of a head's weights, with row kernels in PyTorch. The driver is `host/head_expectation.py`."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.host import head_expectation
from softprompt_kernels.kernels.host.chunks import block_size
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, ExpectationState
from softprompt_kernels.kernels.ranges import kernel_range


def unsupported(problem: ExpectationProblem) -> str | None:
    """It serves the CPU: to skip rows it reads the weights, and on other devices the host would wait for them."""
    device = problem.hidden.device
    return None if device.type == "cpu" else f"hidden states are on {device}, and it serves the CPU"


def forward(problem: ExpectationProblem) -> Expectation:
    """For each row: lse(z) in float64, z of the label, E_p[W] and E_p[bias]."""
    return head_expectation.forward(problem, exponentials_, TORCH)


def exponentials_(logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState) -> None:
    """See `ExponentialsKernel` in `host/rows.py`. Works on blocks of rows that fit the cache."""
    step = block_size(logits.shape[1])
    with kernel_range("exponentials_", *logits.shape):
        for start in range(0, logits.shape[0], step):
            rows = slice(start, start + step)
            _exponentials_of_block_(logits[rows], bias, scale, first, _state_of(state, rows))


def _state_of(state: ExpectationState, rows: slice) -> ExpectationState:
    """The state of some rows, as views."""
    fields = (state.row_max, state.row_sum, state.mean, state.bias_sum, state.labels, state.label_logit)
    return ExpectationState(*(None if f is None else f[rows] for f in fields))  # type: ignore[arg-type]


def _exponentials_of_block_(
    logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState
) -> None:
    if bias is not None:
        logits.add_(bias, alpha=scale)
    if state.labels is not None and state.label_logit is not None:
        column = state.labels - first
        in_tile = (column >= 0) & (column < logits.shape[1]) & (state.labels >= 0)
        label_logit = logits.gather(1, torch.where(in_tile, column, 0)[:, None]).squeeze(1)
        torch.where(in_tile, label_logit, state.label_logit, out=state.label_logit)
    row_max = torch.maximum(state.row_max, logits.amax(1))
    shift = torch.where(row_max == -torch.inf, 0, row_max)  # −inf: no vocabulary entry in any tile yet
    rescale = torch.exp(state.row_max - shift)
    state.row_max.copy_(row_max)
    logits.sub_(shift[:, None]).exp_()
    state.row_sum.mul_(rescale).add_(logits.sum(1))
    if bias is not None and state.bias_sum is not None:
        # A bias of −inf has probability 0 and adds nothing to the expectation.
        state.bias_sum.mul_(rescale).add_(torch.mv(logits, bias.masked_fill(bias == -torch.inf, 0)))
    if state.mean is not None:
        state.mean.mul_(rescale[:, None])
