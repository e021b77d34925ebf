"""Divergence between given logits in PyTorch, one block of rows at a time.

Forward and backward both compute from the logits. Nothing of size [N, V] is kept between them but the inputs.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.composed.rows import SCRATCH_BUFFERS, divergence_
from softprompt_kernels.kernels.host.chunks import block_size, kept_tokens, token_chunks
from softprompt_kernels.kernels.problems.loss import LogitsProblem, no_statistics

STATISTICS = 0


def unsupported(problem: LogitsProblem) -> str | None:
    """It serves the CPU: to skip rows it reads the weights, and on other devices the host would wait for them."""
    device = problem.student.device
    return None if device.type == "cpu" else f"student_logits are on {device}, and it serves the CPU"


def forward(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Loss of each row [N], and no statistics [N, 0]."""
    loss = _run(problem, None, None)
    return loss, no_statistics(loss)


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
    """Gradient of Σ_n row_scale[n] · loss[n] by the student's logits; 0 in vocabulary entries that are cut."""
    gradient = torch.zeros(problem.student.shape, dtype=problem.student.dtype)
    _run(problem, row_scale, gradient)
    return gradient


def _run(problem: LogitsProblem, row_scale: Tensor | None, gradient: Tensor | None) -> Tensor:
    tokens, vocab = problem.student.shape[0], problem.vocab
    temperature = problem.divergence.temperature
    block = block_size(vocab)
    buffers = torch.empty(2 + SCRATCH_BUFFERS, block, vocab, dtype=problem.compute_dtype)
    loss = buffers.new_zeros(tokens)
    for rows in token_chunks(tokens, kept_tokens(problem.weights), block):
        selected = problem.student[rows, :vocab]
        student, teacher, *scratch = buffers[:, : selected.shape[0]]
        student.copy_(selected)
        teacher.copy_(problem.teacher[rows, :vocab])
        if temperature != 1:
            student.div_(temperature)
            teacher.div_(temperature)
        loss[rows] = divergence_(student, teacher, problem.divergence, (scratch[0], scratch[1]))
        if gradient is not None and row_scale is not None:
            student *= row_scale[rows, None] * temperature
            gradient[rows, :vocab] = student.to(gradient.dtype)
    return loss.mul_(temperature**2)
