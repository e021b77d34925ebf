"""FlashAttention over concatenated keys. Its causal mask is aligned to the last key, as ours is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softprompt_kernels.bench.peers.eager import concatenated
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.attention import AttentionInputs
from softprompt_kernels.testing.case import Case


def attention(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """Its tensors are `[B, tokens, heads, D]`."""
    from flash_attn import flash_attn_func

    def forward() -> Tensor:
        key, value = concatenated(inputs)
        query, key, value = (tensor.transpose(1, 2) for tensor in (inputs.query, key, value))
        return flash_attn_func(query, key, value, causal=True).transpose(1, 2)

    return forward


def refuses(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """It needs a GPU and 16-bit tensors."""
    if device.type != "cuda":
        return "it needs a GPU"
    return None if dtype in (torch.float16, torch.bfloat16) else "it takes bfloat16 and float16"


FLASH_ATTN = Peer(
    "flash-attn",
    "concatenation, then FlashAttention",
    {"prompt_attention": attention},
    package="flash_attn",
    install="flash-attn --no-build-isolation",
    refuses=refuses,
)
