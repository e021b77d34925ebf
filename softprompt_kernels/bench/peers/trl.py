"""TRL's chunked divergence with β = 0, the forward KL of its DistillationTrainer. PyTorch on a CPU, Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.losses import HeadInputs


def hidden(inputs: HeadInputs) -> Callable[[], Tensor]:
    """It also computes the student's entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher, weight = inputs

    def forward() -> Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 0.0)
        return rows.mean()

    return forward


TRL = Peer("trl", "TRL's chunked divergence", {"linear_kl_div": hidden}, package="trl", install="trl")
