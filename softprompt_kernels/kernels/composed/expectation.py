"""What a head's distribution expects of its own weights, a chunk of tokens at a time.

A chunk costs one product for the logits, four passes over them in place, and one product for the mean; the softmax is
normalised after it, where that costs [n, d].
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.composed.chunks import (
    block_size,
    chunk_size,
    head_logits,
    kept_tokens,
    pull_back,
    token_chunks,
)
from softprompt_kernels.kernels.loss_problem import Expectation, ExpectationProblem


def unsupported(problem: ExpectationProblem) -> str | None:
    """It skips rows by looking at the weights, which would stop another device."""
    device = problem.hidden.device
    return None if device.type == "cpu" else f"hidden states are on {device}, and it serves the CPU"


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    head, dtype, labels = problem.head, problem.compute_dtype, problem.labels
    (tokens, size), vocab = problem.hidden.shape, head.weight.shape[0]
    scale = head.logit_scale / problem.temperature
    bias = None if head.bias is None else head.bias.to(dtype)
    log_partition = torch.zeros(tokens, dtype=torch.float64)
    label_logit = None if labels is None else torch.zeros(tokens, dtype=dtype)
    mean = torch.zeros(tokens, size, dtype=dtype) if problem.need_mean else None
    bias_mean = None if bias is None else torch.zeros(tokens, dtype=dtype)

    chunk = chunk_size(tokens, problem.chunk_tokens, 1, vocab, dtype)
    buffer = torch.empty(chunk, vocab, dtype=dtype)
    for rows in token_chunks(tokens, kept_tokens(problem.weights), chunk):
        hidden = problem.hidden[rows].to(dtype)
        logits = buffer[: hidden.shape[0]]
        head_logits(logits, hidden * scale, head.weight, None if bias is None else bias * scale)
        if labels is not None and label_logit is not None:
            label = labels[rows]
            chosen = logits.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
            label_logit[rows] = torch.where(label >= 0, chosen, 0)
        largest, total = _exp_(logits)
        log_partition[rows] = largest.double() + total.double().log()
        if mean is not None:
            mean[rows] = pull_back(logits, head.weight).div_(total[:, None])
        if bias is not None and bias_mean is not None:
            # A bias of −inf has probability 0 and expects nothing.
            bias_mean[rows] = torch.mv(logits, bias.masked_fill(bias == -torch.inf, 0)).div_(total)
    return Expectation(log_partition, label_logit, mean, bias_mean)


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits into exp(z − max z), a cache-sized block at a time; returns max z and the sum, [n]."""
    step = block_size(logits.shape[1])
    largest, total = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        block = logits[rows]
        torch.amax(block, 1, out=largest[rows])
        block.sub_(largest[rows, None]).exp_()
        torch.sum(block, 1, out=total[rows])
    return largest, total
