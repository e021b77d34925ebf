"""Concatenation of the prompt with the own keys, then `scaled_dot_product_attention` with a float mask.

A single query sees every key, so no mask is needed. Key heads are shared (`enable_gqa`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.bench.peers.eager import concatenated, float_mask
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.attention import AttentionInputs


def attention(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """The mask is made before."""
    mask = float_mask(inputs) if inputs.query.shape[2] > 1 else None

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(inputs.query, *concatenated(inputs), attn_mask=mask, enable_gqa=True)

    return forward


SDPA = Peer("sdpa", "concatenation, then PyTorch's SDPA", {"prompt_attention": attention})
