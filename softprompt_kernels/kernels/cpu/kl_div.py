"""Divergence between given logits, in C++: a row is read, and its gradient written, while it is in the cache.

Forward and backward both compute from the logits, in their own dtype and with their own row stride. The workspace is
2 V fp32 numbers a thread. The forward computes one exponential a logit, and the backward computes it again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.rows import address
from softprompt_kernels.kernels.host.chunks import CPU_WORKSPACE_BYTES
from softprompt_kernels.kernels.problems.loss import LogitsProblem, no_statistics
from softprompt_kernels.kernels.problems.tensors import DTYPES, unit_stride
from softprompt_kernels.kernels.ranges import kernel_range

STATISTICS = 0


def unsupported(problem: LogitsProblem) -> str | None:
    """Why the problem is not supported, None if it is: every divergence of fp32, bf16 and fp16 logits on a CPU is."""
    return native.unsupported_tensor("student_logits", problem.student) or native.unsupported_tensor(
        "teacher_logits", problem.teacher
    )


def forward(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Loss of each row [N], and no statistics."""
    loss = problem.student.new_zeros(problem.student.shape[0], dtype=torch.float32)
    _run(problem, loss, None, None)
    return loss, no_statistics(loss)


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
    """Gradient of Σ_n row_scale[n] · loss[n] by the student's logits."""
    gradient = torch.empty(problem.student.shape, dtype=problem.student.dtype)
    _run(problem, None, row_scale.contiguous(), gradient)
    return gradient


def _run(problem: LogitsProblem, loss: Tensor | None, row_scale: Tensor | None, gradient: Tensor | None) -> None:
    divergence = problem.divergence
    weights = None if problem.weights is None else problem.weights.contiguous()
    for rows in _parts(problem):
        student, teacher = unit_stride(problem.student[rows]), unit_stride(problem.teacher[rows])
        with kernel_range("kl_logits", student.shape[0], problem.vocab):
            native.module().kl_logits(
                student=address(student),
                teacher=address(teacher),
                weights=address(None if weights is None else weights[rows]),
                row_scale=address(None if row_scale is None else row_scale[rows]),
                gradient=address(None if gradient is None else gradient[rows]),
                loss=address(None if loss is None else loss[rows]),
                rows=student.shape[0],
                vocab=problem.vocab,
                columns=problem.student.shape[1],
                student_stride=student.stride(0),
                teacher_stride=teacher.stride(0),
                gradient_stride=problem.student.shape[1],
                student_dtype=DTYPES[student.dtype],
                teacher_dtype=DTYPES[teacher.dtype],
                divergence=divergence.code,
                beta=divergence.beta,
                temperature=divergence.temperature,
                threads=torch.get_num_threads(),
            )


def _parts(problem: LogitsProblem) -> Iterator[slice]:
    """All rows at once, or parts whose fp32 copies fit the workspace: logits without a last stride of 1 are copied."""
    tokens, step = problem.student.shape[0], problem.student.shape[0]
    if any(t.stride(1) != 1 for t in (problem.student, problem.teacher)):
        columns = problem.student.shape[1] + problem.teacher.shape[1]
        step = max(1, CPU_WORKSPACE_BYTES // (columns * 4))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, max(1, step)))
