"""Liger: JSD with β = 0, which is the forward KL, from logits and from hidden states; KL with a cached teacher.

On a GPU these are its Triton kernels. On a CPU its chunked loss in PyTorch serves hidden states; it computes the head's
gradient too, also where the head is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.bench.peers.eager import teacher_log_probabilities
from softprompt_kernels.bench.peers.peer import NEEDS_GPU, Peer
from softprompt_kernels.testing.case import Case
from softprompt_kernels.testing.losses import HeadInputs, LabelInputs, LogitsInputs

INSTALL = "--no-deps liger-kernel"


def logits(inputs: LogitsInputs) -> Callable[[], Tensor]:
    """Its kernel takes log-probabilities, so they are made first."""
    from liger_kernel.transformers.functional import liger_jsd

    student, teacher = inputs
    return lambda: liger_jsd(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), beta=0.0)


def hidden(inputs: HeadInputs) -> Callable[[], Tensor]:
    """The Triton kernel on a GPU, the chunked loss on a CPU."""
    student, teacher, weight = inputs
    if student.device.type == "cpu":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return partial(loss, student, weight, teacher, weight, torch.zeros(len(student), dtype=torch.int64))
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return partial(liger_fused_linear_jsd, student, weight, teacher, weight, jsd_beta=0.0)


def cached(inputs: HeadInputs) -> Callable[[], Tensor]:
    """With the teacher's probabilities of the whole vocabulary."""
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    target = teacher_log_probabilities(inputs).exp().to(inputs.student.dtype)
    return partial(liger_fused_linear_kl_div, inputs.student, inputs.weight, target)


def labels(inputs: LabelInputs) -> Callable[[], Tensor]:
    """Cross-entropy of labels."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, inputs.student, inputs.weight, inputs.labels)


def refuses(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """On a CPU only the chunked loss runs."""
    return None if device.type != "cpu" or case.op == "linear_kl_div" else NEEDS_GPU


LIGER = Peer(
    "liger",
    "liger-kernel",
    {
        "kl_div": logits,
        "linear_kl_div": hidden,
        "linear_kl_div_from_moments": cached,
        "linear_cross_entropy": labels,
    },
    package="liger_kernel",
    install=INSTALL,
    refuses=refuses,
)
