"""PyTorch's FlexAttention over concatenated keys, compiled, with a block mask that skips hidden tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softprompt_kernels.bench.peers.compiled import compile_for_one_size, needs_compiler
from softprompt_kernels.bench.peers.eager import concatenated
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.attention import AttentionInputs
from softprompt_kernels.testing.case import FORWARD, Case


def attention(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """The block mask is made before."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, prompt = inputs.query.shape[2], inputs.prompt_key.shape[2]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + prompt

    mask = create_block_mask(visible, None, None, queries, prompt + queries, device=inputs.query.device.type)
    compiled = compile_for_one_size(flex_attention)
    if inputs.query.device.type == "cpu":  # refuses tensors that need a gradient, also where gradients are off
        inputs = AttentionInputs(*(tensor.detach() for tensor in inputs))

    def forward() -> Tensor:
        return compiled(inputs.query, *concatenated(inputs), block_mask=mask, enable_gqa=True)

    return forward


def refuses(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """On a CPU there is a forward alone."""
    if device.type == "cpu" and pass_ != FORWARD:
        return "FlexAttention has no backward on a CPU"
    return needs_compiler(case, pass_, dtype, device)


FLEX = Peer(
    "flex", "concatenation, then FlexAttention", {"prompt_attention": attention}, refuses=refuses, compiled=True
)
