"""flash-linear-attention: forward KL from hidden states, in Triton. It rounds logits to the dtype of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from softprompt_kernels.bench.peers.peer import Peer, needs_gpu
from softprompt_kernels.testing.losses import HeadInputs


def hidden(inputs: HeadInputs) -> Callable[[], Tensor]:
    """One head for student and teacher."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return partial(fused_kl_div_loss, inputs.student, inputs.teacher, inputs.weight, inputs.weight)


FLA = Peer(
    "fla",
    "flash-linear-attention",
    {"linear_kl_div": hidden},
    package="fla",
    install="--no-deps flash-linear-attention fla-core einops",
    refuses=needs_gpu,
)
