"""Implementations of the attention of a batch behind a shared prompt: the op, and what one writes with PyTorch alone.

With PyTorch alone, the prompt is expanded over the batch and concatenated with the own keys. There are then two ways
to call SDPA:

- with a mask, boolean or float, and with key heads either shared (GQA) or repeated;
- with `is_causal`, after the queries are padded in front until there are as many as keys. SDPA then skips masked tiles,
  and pays with more queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from softprompt_kernels.bench.peers.compiled import compile_for_one_size
from softprompt_kernels.bench.peers.eager import concatenated
from softprompt_kernels.bench.peers.eager import float_mask as float_mask_of
from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.testing.attention import AttentionInputs as Inputs

Forward = Callable[[], Tensor]  # returns out [B, Hq, M, D]


Attention = Callable[[Inputs], Forward]


def ours(inputs: Inputs) -> Forward:
    """`prompt_attention` on the backend that it chooses."""
    return partial(prompt_attention, *inputs)


def composed(inputs: Inputs) -> Forward:
    """`prompt_attention` on the backend `composed`, which uses PyTorch's own kernels."""
    return partial(prompt_attention, *inputs, backend="composed")


def unmasked(inputs: Inputs) -> Forward:
    """SDPA without a mask, for a single query, which sees every key."""

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(inputs.query, *concatenated(inputs), enable_gqa=True)

    return forward


def unmasked_repeated(inputs: Inputs) -> Forward:
    """SDPA without a mask, with repeated key heads."""

    def forward() -> Tensor:
        key, value = (_repeated_heads(inputs, tensor) for tensor in concatenated(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value)

    return forward


def float_mask(inputs: Inputs) -> Forward:
    """SDPA with a float mask, which is added to the scores."""
    return _masked(inputs, float_mask_of(inputs))


def bool_mask(inputs: Inputs) -> Forward:
    """SDPA with a boolean mask, which says which keys are visible."""
    return _masked(inputs, _visible(inputs))


def float_mask_repeated(inputs: Inputs) -> Forward:
    """SDPA with a float mask and repeated key heads."""
    mask = float_mask_of(inputs)

    def forward() -> Tensor:
        key, value = (_repeated_heads(inputs, tensor) for tensor in concatenated(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask)

    return forward


def lower_right(inputs: Inputs) -> Forward:
    """SDPA with PyTorch's `causal_lower_right` mask and repeated key heads."""
    queries, prompt = inputs.query.shape[2], inputs.prompt_key.shape[2]
    bias = causal_lower_right(queries, prompt + queries)

    def forward() -> Tensor:
        key, value = (_repeated_heads(inputs, tensor) for tensor in concatenated(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=bias)

    return forward


def padded(inputs: Inputs) -> Forward:
    """Causal SDPA with P queries of zeros in front, whose rows of out are dropped."""
    prompt = inputs.prompt_key.shape[2]

    def forward() -> Tensor:
        query = F.pad(inputs.query, (0, 0, prompt, 0))
        return F.scaled_dot_product_attention(query, *concatenated(inputs), is_causal=True, enable_gqa=True)[
            :, :, prompt:
        ]

    return forward


def compiled(attention: Attention) -> Attention:
    """`attention`, compiled by torch.compile for the sizes of its inputs."""
    return lambda inputs: compile_for_one_size(attention(inputs))


def as_implementation(
    attention: Attention, backward: bool, make_grad_out: Callable[[Tensor], Tensor]
) -> Callable[[Inputs], Callable[[], tuple[Tensor, ...]]]:
    """An implementation that returns out, and with `backward` also the gradients of all inputs.

    Args:
        attention: the forward.
        backward: whether to run the backward too; without it the forward runs under `torch.no_grad`.
        make_grad_out: makes the gradient of out, given the query (which has the shape of out).
    """

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        forward = attention(inputs)
        if not backward:

            def inference() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (forward(),)

            return inference
        grad_out = make_grad_out(inputs.query)

        def training() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, inputs, grad_out))

        return training

    return prepare


COMPILED = "concat + SDPA, compiled"
UNMASKED = {"concat + SDPA, GQA": unmasked, "concat + SDPA, repeated": unmasked_repeated}
MASKED = {
    "concat + SDPA, float mask, GQA": float_mask,
    "concat + SDPA, bool mask, GQA": bool_mask,
    "concat + SDPA, float mask, repeated": float_mask_repeated,
    "concat + SDPA, causal_lower_right": lower_right,
}
PADDED = {"padded queries + causal SDPA": padded}


def _masked(inputs: Inputs, mask: Tensor) -> Forward:
    def forward() -> Tensor:
        return F.scaled_dot_product_attention(inputs.query, *concatenated(inputs), attn_mask=mask, enable_gqa=True)

    return forward


def _repeated_heads(inputs: Inputs, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(inputs.query.shape[1] // tensor.shape[1], dim=1)


def _visible(inputs: Inputs) -> Tensor:
    queries, prompt = inputs.query.shape[2], inputs.prompt_key.shape[2]
    return torch.ones(queries, prompt + queries, dtype=torch.bool).tril(prompt)
