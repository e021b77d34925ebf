"""Expectations of a head's weights under its own distribution, with the vocabulary split over ranks.

Rank r computes A_r = lse of its logits and its own means with the ordinary kernel. With A = lse_r(A_r) and the share
of a rank Q_r = e^(A_r − A),

    E_p[W] = Σ_r Q_r E_{p^r}[W_r],        z_y and W_y come from the rank that holds y

Cost on each rank: that of the kernel on its shard; a gather of 2 N float64 numbers, and, where the mean is needed, a
sum over ranks of N d numbers, with a bias N (d + 1), in one piece.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softprompt_kernels.kernels.moments import ExpectationKernel
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem
from softprompt_kernels.kernels.sharded.shards import Shards


def forward(
    problem: ExpectationProblem, shards: Shards, kernel: ExpectationKernel, label_weight: float = 0.0
) -> Expectation:
    """The expectation under the whole distribution, the same on every rank.

    Args:
        problem: with this rank's shard of the head; the labels are those of the whole vocabulary.
        shards: the split of the vocabulary.
        kernel: of a backend, for one shard.
        label_weight: λ; the mean is E_p[W] − λ W_y in rows with a label.

    Raises:
        ValueError: a label is not below the vocabulary's size. Only where labels are on the CPU.
    """
    labels = problem.labels
    if labels is not None and labels.device.type == "cpu" and bool((labels >= shards.total).any()):
        raise ValueError(f"labels must be below the vocabulary's size {shards.total}; got {int(labels.max())}")
    own_labels = None if labels is None else shards.own_labels(labels)
    found = _of_shard(replace(problem, labels=own_labels), kernel)
    label_logit = torch.zeros_like(found.log_partition) if found.label_logit is None else found.label_logit
    told = shards.gather(torch.stack((found.log_partition.double(), label_logit.double()), 1))
    log_partition = torch.logsumexp(told[..., 0], 0)
    # A row whose every logit is −inf, as a kernel may leave in a skipped one, has no shares.
    share = torch.where(log_partition.isneginf(), 0, torch.exp(found.log_partition.double() - log_partition))
    label_logit = told[..., 1].sum(0)
    mean, bias_mean = _sum(problem, found, share, shards, own_labels, label_weight)
    return Expectation(log_partition, None if labels is None else label_logit, mean, bias_mean)


def _of_shard(problem: ExpectationProblem, kernel: ExpectationKernel) -> Expectation:
    """The kernel's result; for a shard without entries −inf and zeros."""
    if problem.head.weight.shape[0]:
        return kernel(problem)
    dtype = problem.compute_dtype
    rows = torch.zeros(problem.hidden.shape[0], dtype=dtype, device=problem.hidden.device)
    mean = torch.zeros(problem.hidden.shape, dtype=dtype, device=rows.device) if problem.need_mean else None
    return Expectation(torch.full_like(rows, -torch.inf), rows, mean, None if problem.head.bias is None else rows)


def _sum(
    problem: ExpectationProblem,
    found: Expectation,
    share: Tensor,
    shards: Shards,
    own_labels: Tensor | None,
    label_weight: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Σ_r Q_r of the means and of the biases' means, which travel as one tensor."""
    if found.mean is None:  # the biases' means are needed by none without a mean
        return None, None
    tokens, size = found.mean.shape
    packed = found.mean.new_zeros(tokens * (size + (found.bias_mean is not None)))
    mean, bias_mean = packed[: tokens * size].view(tokens, size), packed[tokens * size :]
    torch.mul(torch.where(share[:, None] == 0, 0, found.mean), share[:, None].to(mean.dtype), out=mean)
    if found.bias_mean is not None:
        torch.mul(torch.where(share == 0, 0, found.bias_mean), share.to(mean.dtype), out=bias_mean)
    if own_labels is not None and label_weight and problem.head.weight.shape[0]:
        held = (own_labels >= 0).to(mean.dtype)[:, None] * -label_weight
        mean.addcmul_(problem.head.weight[own_labels.clamp(min=0)].to(mean.dtype), held)
    shards.sum_(packed)
    return mean, None if found.bias_mean is None else bias_mean
