"""cut-cross-entropy: cross-entropy of labels from hidden states. It has no loss with a teacher.

On a GPU these are its Triton kernels, on a CPU its torch.compile form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softprompt_kernels.bench.peers.compiled import needs_compiler
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.case import Case
from softprompt_kernels.testing.losses import LabelInputs


def labels(inputs: LabelInputs) -> Callable[[], Tensor]:
    """Cross-entropy of labels."""
    from cut_cross_entropy import linear_cross_entropy

    form = "torch_compile" if inputs.student.device.type == "cpu" else "cce"
    return partial(linear_cross_entropy, inputs.student, inputs.weight, inputs.labels, impl=form)


def refuses(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The Triton kernels take 16-bit tensors."""
    if device.type != "cpu" and dtype == torch.float32:
        return "its kernels take bfloat16 and float16"
    return needs_compiler(case, pass_, dtype, device)


CUT_CROSS_ENTROPY = Peer(
    "cut-cross-entropy",
    "cut-cross-entropy",
    {"linear_cross_entropy": labels},
    package="cut_cross_entropy",
    install="cut-cross-entropy",
    refuses=refuses,
    compiled=True,
)
