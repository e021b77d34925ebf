"""Divergence between the logits of two heads, with the vocabulary split over ranks. PyTorch, on any device.

For a chunk of n tokens, each rank computes the logits of its shard and

    gathers    the largest logit and Σ e^(z − largest) of its shard, for student and teacher: 4 n float64 numbers. With
               them p_s and p_t are those of the whole vocabulary, and the formulas of `kernels/reference/divergence.py`
               hold for the entries of a shard.
    sums       for reverse and jsd, whose gradient needs it, the loss: 2 n float64 numbers

and at the end, in one piece, the gradient by the hidden states and the loss: N (d + 1) numbers. The loss keeps its
relative accuracy as it goes to 0: an error ε in the normalisers changes it by ε²/2 only.

Cost on each rank, in GEMMs of its shard's size: 3 with a frozen head; with a trained one, whose own gradient needs no
other rank, 2 forward and 4 backward. The backward of a frozen head needs no collective. Memory beside the gradient:
64 MiB for the logits of a chunk on a CPU; on a GPU the chunks are those of one process with the largest shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.device import gemm, memory
from softprompt_kernels.kernels.host import chunks
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.problems.loss import (
    FORWARD,
    JSD,
    REVERSE,
    Head,
    HeadGradients,
    HeadNeeds,
    HeadProblem,
    unknown_divergence,
)
from softprompt_kernels.kernels.reference.divergence import kl_sum, log_mix
from softprompt_kernels.kernels.sharded.shards import Shards

_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**24  # numbers of a temporary of the row work
_FP16_SCALE = 1024.0  # of the gradient by the logits, which fp16 has too few small numbers for


def forward(problem: HeadProblem, shards: Shards, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed, in the compute dtype. Collective.

    Args:
        problem: with this rank's shards of both heads, cut to the entries that count.
        shards: the split of the vocabulary.
        need_gradient: the same on all ranks.
    """
    tokens, size = problem.student.shape
    # One buffer, so that one collective sums both.
    packed = problem.student.new_zeros(tokens * (size + 1 if need_gradient else 1), dtype=problem.compute_dtype)
    loss, gradient = packed[:tokens], packed[tokens:].view(tokens, size) if need_gradient else None
    for chunk in _chunks(problem, shards, need_gradient):
        loss[chunk.rows] = chunk.loss
        if gradient is not None:
            gradient[chunk.rows] = _pull_back(chunk.by_linear, problem.head.weight)
    shards.sum_(packed)
    return loss, gradient


def backward(problem: HeadProblem, shards: Shards, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n], by hidden states, and by this rank's weight and bias. Collective."""
    student, head = problem.student, problem.head
    dtype = problem.compute_dtype
    hidden = torch.zeros_like(student, dtype=dtype, memory_format=torch.contiguous_format) if needs.hidden else None
    weight = torch.zeros_like(head.weight, dtype=dtype) if needs.weight else None
    bias = torch.zeros_like(head.bias, dtype=dtype) if needs.bias and head.bias is not None else None
    for chunk in _chunks(problem, shards, True):
        by_linear = chunk.by_linear.mul_(row_scale[chunk.rows, None].to(dtype))
        if hidden is not None:
            hidden[chunk.rows] = _pull_back(by_linear, head.weight)
        if weight is not None:
            weight.addmm_(by_linear.mT, _kept(problem, student, chunk.rows).to(dtype))
        if bias is not None:
            bias += by_linear.sum(0)
    if hidden is not None:
        shards.sum_(hidden)
    return HeadGradients(
        None if hidden is None else hidden.to(student.dtype),
        None if weight is None else weight.to(head.weight.dtype),
        None if bias is None or head.bias is None else bias.to(head.bias.dtype),
    )


# --- chunks of tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    rows: slice | Tensor
    loss: Tensor  # [n] this rank's part
    by_linear: Tensor  # [n, V of the shard] ∂ loss / ∂ (W h + bias); the next chunk overwrites it


@dataclass(frozen=True)
class _Normalisers:
    """Of the whole vocabulary, for the tokens of a chunk, the same on every rank. Each [n, 1] in the compute dtype."""

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    log_ratio: Tensor  # log(student_sum / teacher_sum)

    def of(self, rows: slice) -> _Normalisers:
        """Those of some rows, as views."""
        return _Normalisers(
            self.student_max[rows],
            self.student_sum[rows],
            self.teacher_max[rows],
            self.teacher_sum[rows],
            self.log_ratio[rows],
        )


def _chunks(problem: HeadProblem, shards: Shards, need_gradient: bool) -> Iterator[_Chunk]:
    tokens, vocab = problem.student.shape[0], problem.head.weight.shape[0]
    on_cpu = problem.student.device.type == "cpu"
    kept = chunks.kept_tokens(problem.weights) if on_cpu else None  # elsewhere the host would wait for it
    count = tokens if kept is None else kept.shape[0]
    size = _chunk_tokens(problem, shards, count)
    logits = problem.student.new_empty(2, min(size, tokens), vocab, dtype=problem.compute_dtype)
    step = max(1, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // max(1, vocab))
    for rows in chunks.token_chunks(tokens, kept, size):
        used = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]
        blocks = [slice(start, min(start + step, used)) for start in range(0, used, step)]
        student, teacher = logits[0, :used], logits[1, :used]
        _logits(student, _kept(problem, problem.student, rows), problem.head, problem.divergence.temperature, blocks)
        _logits(
            teacher, _kept(problem, problem.teacher, rows), problem.teacher_head, problem.divergence.temperature, blocks
        )
        normalisers = _normalise(student, teacher, shards, blocks)
        loss = _divergence_(student, teacher, problem, shards, normalisers, blocks)
        if problem.weights is not None and kept is None:
            skipped = problem.weights[rows] == 0
            loss = torch.where(skipped, 0, loss)
            student.masked_fill_(skipped[:, None], 0)
        yield _Chunk(rows, loss, student)


def _chunk_tokens(problem: HeadProblem, shards: Shards, tokens: int) -> int:
    """The same on all ranks, because it depends on the largest shard."""
    size = problem.student.shape[1]
    if problem.student.device.type == "cpu":
        elements = 2 * shards.largest + 2 * size
        weights = [problem.head.weight, problem.teacher_head.weight]
        return chunks.chunk_size(tokens, problem.chunk_tokens, elements, weights, problem.compute_dtype, TORCH)
    each = 8 * memory.aligned(shards.largest) + 8 * size
    return memory.chunk_size(tokens, problem.chunk_tokens, each)


def _kept(problem: HeadProblem, hidden: Tensor, rows: slice | Tensor) -> Tensor:
    """Hidden states of a chunk, with 0 in skipped rows, which may hold NaN."""
    if problem.weights is None or not isinstance(rows, slice):
        return hidden[rows]
    return torch.where(problem.weights[rows, None] == 0, 0, hidden[rows])


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def _logits(out: Tensor, hidden: Tensor, head: Head, temperature: float, blocks: list[slice]) -> None:
    """out [n, V of the shard] becomes the logits over T."""
    if not out.shape[1]:
        return
    if out.dtype == torch.float64:
        torch.mm(hidden.double(), head.weight.double().mT, out=out)
    else:
        gemm.head_logits(out, hidden, head.weight)
    bias = None if head.bias is None else head.bias.to(out.dtype)
    for rows in blocks:
        z = out[rows]
        if bias is not None:
            z += bias
        if head.softcap is None:
            z.mul_(head.logit_scale / temperature)
        else:
            z.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / temperature)


def _pull_back(by_linear: Tensor, weight: Tensor) -> Tensor:
    """by_linear [n, V of the shard] times W: [n, d] in by_linear's dtype."""
    if by_linear.dtype == torch.float64:
        return by_linear @ weight.double()
    if by_linear.device.type == "cpu" or weight.dtype == torch.float32:
        return gemm.pull_back(by_linear, weight)
    # Tensor cores multiply 16 bits: the difference p_s − p_t is rounded once, after the subtraction.
    scale = _FP16_SCALE if weight.dtype == torch.float16 else 1.0
    return gemm.pull_back((by_linear * scale).to(weight.dtype), weight).div_(scale)


# --- rows -------------------------------------------------------------------------------------------------------------


def _normalise(student: Tensor, teacher: Tensor, shards: Shards, blocks: list[slice]) -> _Normalisers:
    """The normalisers of the whole vocabulary, from those of all shards. Collective."""
    own = student.new_empty(student.shape[0], 4, dtype=torch.float64)
    for rows in blocks:
        for column, z in ((0, student[rows]), (2, teacher[rows])):
            largest = z.amax(1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf)
            own[rows, column] = largest.double()
            own[rows, column + 1] = torch.exp(z - _finite(largest)[:, None]).sum(1).double()
    everyone = shards.gather(own)
    found = []
    for column in (0, 2):
        largest, sums = everyone[..., column], everyone[..., column + 1]
        most = _finite(largest.amax(0))
        found += [most, (sums * torch.exp(largest - most)).sum(0)]
    student_max, student_sum, teacher_max, teacher_sum = (each[:, None] for each in found)
    log_ratio = torch.log(student_sum / teacher_sum)
    parts = (student_max, student_sum, teacher_max, teacher_sum, log_ratio)
    return _Normalisers(*(part.to(student.dtype) for part in parts))


def _finite(largest: Tensor) -> Tensor:
    return torch.where(torch.isinf(largest), 0, largest)


def _divergence_(
    student: Tensor, teacher: Tensor, problem: HeadProblem, shards: Shards, whole: _Normalisers, blocks: list[slice]
) -> Tensor:
    """This rank's part of the loss [n] times T². `student` becomes the gradient by W h + bias. Collective."""
    kind, temperature = problem.divergence.kind, problem.divergence.temperature
    if kind not in (FORWARD, REVERSE, JSD):
        raise unknown_divergence(kind)
    costs = student.new_zeros(student.shape[0], 2, dtype=torch.float64)  # the loss; the student's cost in its gradient
    if kind != FORWARD:  # their gradient needs a sum over the vocabulary, and one pass more
        for rows in blocks:
            p_s, p_t, delta = _ratio(student[rows], teacher[rows], whole.of(rows))
            costs[rows] = _costs(p_s, p_t, delta, problem).double()
        shards.sum_(costs)
    loss = student.new_zeros(student.shape[0], dtype=torch.float64)
    for rows in blocks:
        z, normalisers = student[rows], whole.of(rows)
        p_s, p_t, delta = _ratio(z, teacher[rows], normalisers)
        if kind == FORWARD:
            loss[rows] = kl_sum(p_t, p_s, delta).squeeze(1).double()
            gradient = p_s - p_t
        else:
            gradient = _coupled_gradient(p_s, delta, costs[rows].to(z.dtype), problem)
        empty = (normalisers.student_sum == 0) | (normalisers.teacher_sum == 0)
        gradient = torch.where(empty, 0, gradient)
        slope = problem.head.logit_scale * temperature  # T² of the loss, over T of the logits
        if problem.head.softcap is not None:
            gradient = gradient * (1 - (z * (temperature / problem.head.softcap)).square())  # tanh'
        z.copy_(gradient.mul_(slope))
    if kind != FORWARD:
        loss = costs[:, 0] / len(shards.sizes)  # it is the sum already: each rank gives an equal part of it
    loss = torch.where(whole.student_sum.squeeze(1) == 0, torch.inf, loss)
    loss = torch.where(whole.teacher_sum.squeeze(1) == 0, 0, loss)
    return (loss * temperature**2).to(student.dtype)


def _ratio(student: Tensor, teacher: Tensor, whole: _Normalisers) -> tuple[Tensor, Tensor, Tensor]:
    """p_s, p_t and δ = log p_s / p_t [n, V of the shard] of the whole vocabulary's distributions."""
    one = whole.student_sum.new_ones(())
    p_s = torch.exp(student - whole.student_max) / torch.where(whole.student_sum == 0, one, whole.student_sum)
    p_t = torch.exp(teacher - whole.teacher_max) / torch.where(whole.teacher_sum == 0, one, whole.teacher_sum)
    # Differences first, normalisers after: equal logits give exactly 0, and close ones lose no digits.
    return p_s, p_t, student - teacher - (whole.student_max - whole.teacher_max) - whole.log_ratio


def _costs(p_s: Tensor, p_t: Tensor, delta: Tensor, problem: HeadProblem) -> Tensor:
    """This shard's part of the loss, and of the sum that the gradient subtracts, [n, 2]."""
    if problem.divergence.kind == REVERSE:
        return kl_sum(p_s, p_t, -delta).expand(-1, 2)
    beta = problem.divergence.beta
    mixture = beta * p_t + (1 - beta) * p_s
    student_cost = kl_sum(p_s, mixture, log_mix(-delta, beta))
    teacher_cost = kl_sum(p_t, mixture, log_mix(delta, 1 - beta))
    return torch.cat((beta * teacher_cost + (1 - beta) * student_cost, student_cost), 1)


def _coupled_gradient(p_s: Tensor, delta: Tensor, costs: Tensor, problem: HeadProblem) -> Tensor:
    """∂ loss / ∂ z_s of reverse and jsd, with costs [n, 2] of the whole vocabulary."""
    loss, student_cost = costs[:, :1], costs[:, 1:]
    if problem.divergence.kind == REVERSE:
        return torch.where((p_s == 0) | torch.isinf(loss), 0, p_s * (delta - loss))
    beta = problem.divergence.beta
    gradient = (1 - beta) * p_s * (-log_mix(-delta, beta) - student_cost)
    return torch.where(p_s == 0, 0, gradient)
