"""PyTorch, operation by operation: what a model or a trainer does without any kernel for it.

Attention concatenates the prompt with the own keys, repeats key heads, and makes all scores. Losses make all logits.
With a cached teacher, its log-probabilities for the whole vocabulary are an input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.bench.peers.peer import Forward, Peer
from softprompt_kernels.testing.attention import AttentionInputs
from softprompt_kernels.testing.losses import HeadInputs, LabelInputs, LogitsInputs, TeacherInputs


def concatenated(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys and values of prompt and sequence, `[B, Hkv, P + M, D]` each."""
    batch = inputs.query.shape[0]
    key = torch.cat([inputs.prompt_key.expand(batch, -1, -1, -1), inputs.key], dim=2)
    return key, torch.cat([inputs.prompt_value.expand(batch, -1, -1, -1), inputs.value], dim=2)


def float_mask(inputs: AttentionInputs) -> Tensor:
    """`[M, P + M]`, 0 where a query sees a key and −inf elsewhere."""
    query, prompt = inputs.query, inputs.prompt_key.shape[2]
    queries = query.shape[2]
    visible = torch.ones(queries, prompt + queries, dtype=torch.bool, device=query.device).tril(prompt)
    return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(~visible, float("-inf"))


def attention(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """Scores, mask, softmax in fp32, values."""
    query, mask = inputs.query, float_mask(inputs)
    group, scale = query.shape[1] // inputs.key.shape[1], query.shape[3] ** -0.5

    def forward() -> Tensor:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in concatenated(inputs))
        scores = query @ key.transpose(2, 3) * scale + mask
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value

    return forward


def kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher‖student), the mean over the rows of logits `[N, V]`."""
    return kl_of_log_probabilities(student, F.log_softmax(teacher.float(), dim=-1))


def kl_of_log_probabilities(student: Tensor, log_p_teacher: Tensor) -> Tensor:
    """The same from the teacher's log-probabilities `[N, V]`."""
    log_p_student = F.log_softmax(student.float(), dim=-1)
    return F.kl_div(log_p_student, log_p_teacher, log_target=True, reduction="batchmean")


def kl_of_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The same from hidden states `[N, d]` and the head `[V, d]`."""
    return kl_of_logits(student @ weight.T, teacher @ weight.T)


def kl_of_cached_teacher(student: Tensor, log_p_teacher: Tensor, weight: Tensor) -> Tensor:
    """The same from the student's hidden states and the teacher's log-probabilities."""
    return kl_of_log_probabilities(student @ weight.T, log_p_teacher)


def cross_entropy(student: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of labels `[N]`."""
    return F.cross_entropy((student @ weight.T).float(), labels)


def moments(teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The expectation of the head's rows `[N, d]`, and the entropy `[N]`, in fp32."""
    log_p = F.log_softmax((teacher @ weight.T).float(), dim=-1)
    p = log_p.exp()
    return (p.to(weight.dtype) @ weight).float(), -(p * log_p).sum(dim=-1)


def teacher_log_probabilities(inputs: HeadInputs) -> Tensor:
    """`[N, V]` in fp32."""
    return F.log_softmax((inputs.teacher @ inputs.weight.T).float(), dim=-1)


def _logits(inputs: LogitsInputs) -> Callable[[], Tensor]:
    return partial(kl_of_logits, *inputs)


def _hidden(inputs: HeadInputs) -> Callable[[], Tensor]:
    return partial(kl_of_hidden, *inputs)


def _cached(inputs: HeadInputs) -> Callable[[], Tensor]:
    return partial(kl_of_cached_teacher, inputs.student, teacher_log_probabilities(inputs), inputs.weight)


def _labels(inputs: LabelInputs) -> Callable[[], Tensor]:
    return partial(cross_entropy, *inputs)


def _moments(inputs: TeacherInputs) -> Callable[[], tuple[Tensor, Tensor]]:
    return partial(moments, *inputs)


FORWARDS: dict[str, Forward] = {
    "prompt_attention": attention,
    "kl_div": _logits,
    "linear_kl_div": _hidden,
    "linear_kl_div_from_moments": _cached,
    "linear_cross_entropy": _labels,
    "teacher_moments": _moments,
}
EAGER = Peer("eager", "PyTorch, operation by operation", FORWARDS)
