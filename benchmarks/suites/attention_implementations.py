"""Ways to the attention of a batch behind a shared prompt: the op, and what one writes with PyTorch alone.

With PyTorch alone the prompt is expanded over the batch and concatenated with the own keys. Then SDPA takes a mask, of
booleans or of numbers, for few key heads as they are or repeated; or the queries are padded in front until the plain
causal rule holds, which lets SDPA skip what is masked at the price of more queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.harness.case import compile_afresh
from softprompt_kernels.ops import prompt_attention

Forward = Callable[[], Tensor]


class Inputs(NamedTuple):
    """Of the op."""

    query: Tensor  # [B, Hq, M, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, D]
    prompt_key: Tensor  # [1, Hkv, P, D]
    prompt_value: Tensor  # [1, Hkv, P, D]


def ours(inputs: Inputs) -> Forward:
    """The op, on the backend that it chooses."""
    return partial(prompt_attention, *inputs)


def composed(inputs: Inputs) -> Forward:
    """The op, from PyTorch's own kernels."""
    return partial(prompt_attention, *inputs, backend="composed")


def unmasked(inputs: Inputs) -> Forward:
    """A single query sees everything."""

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(inputs.query, *_joined(inputs), enable_gqa=True)

    return forward


def unmasked_repeated(inputs: Inputs) -> Forward:
    """The same, key heads repeated."""

    def forward() -> Tensor:
        key, value = (_repeated(inputs, tensor) for tensor in _joined(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value)

    return forward


def float_mask(inputs: Inputs) -> Forward:
    """The mask is added to the scores."""
    return _masked(inputs, _float_mask(inputs))


def bool_mask(inputs: Inputs) -> Forward:
    """The mask says what is seen."""
    return _masked(inputs, _visible(inputs))


def float_mask_repeated(inputs: Inputs) -> Forward:
    """The mask is added to the scores, key heads are repeated."""
    mask = _float_mask(inputs)

    def forward() -> Tensor:
        key, value = (_repeated(inputs, tensor) for tensor in _joined(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask)

    return forward


def lower_right(inputs: Inputs) -> Forward:
    """PyTorch's own name for this mask."""
    queries, prompt = inputs.query.shape[2], inputs.prompt_key.shape[2]
    bias = causal_lower_right(queries, prompt + queries)

    def forward() -> Tensor:
        key, value = (_repeated(inputs, tensor) for tensor in _joined(inputs))
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=bias)

    return forward


def padded(inputs: Inputs) -> Forward:
    """P queries of zeros in front make it square; their rows are dropped."""
    prompt = inputs.prompt_key.shape[2]

    def forward() -> Tensor:
        query = F.pad(inputs.query, (0, 0, prompt, 0))
        return F.scaled_dot_product_attention(query, *_joined(inputs), is_causal=True, enable_gqa=True)[:, :, prompt:]

    return forward


def compiled(way: Callable[[Inputs], Forward]) -> Callable[[Inputs], Forward]:
    """A way, through torch.compile for its sizes."""
    return lambda inputs: compile_afresh(way(inputs))


def prepared(
    way: Callable[[Inputs], Forward], backward: bool, upstream: Callable[[Tensor], Tensor]
) -> Callable[[Inputs], Callable[[], tuple[Tensor, ...]]]:
    """A way to out, and, if wanted, on to the gradients of all inputs for the gradient of out that `upstream` makes."""

    def prepare(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        forward = way(inputs)
        if not backward:

            def inference() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (forward(),)

            return inference
        grad_out = upstream(inputs.query)

        def training() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, inputs, grad_out))

        return training

    return prepare


def useful_flop(batch: int, heads: int, queries: int, prompt: int, size: int, backward: bool) -> float:
    """Of two products of D for each pair of a query and a key that it sees, of seven with the gradients."""
    pairs = queries * prompt + queries * (queries + 1) // 2
    return (14 if backward else 4) * size * float(pairs * heads * batch)


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
        return F.scaled_dot_product_attention(inputs.query, *_joined(inputs), attn_mask=mask, enable_gqa=True)

    return forward


def _joined(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, P + M, D]."""
    batch = inputs.query.shape[0]
    key = torch.cat([inputs.prompt_key.expand(batch, -1, -1, -1), inputs.key], dim=2)
    return key, torch.cat([inputs.prompt_value.expand(batch, -1, -1, -1), inputs.value], dim=2)


def _repeated(inputs: Inputs, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(inputs.query.shape[1] // tensor.shape[1], dim=1)


def _visible(inputs: Inputs) -> Tensor:
    queries, prompt = inputs.query.shape[2], inputs.prompt_key.shape[2]
    return torch.ones(queries, prompt + queries, dtype=torch.bool).tril(prompt)


def _float_mask(inputs: Inputs) -> Tensor:
    visible = _visible(inputs)
    return torch.zeros(visible.shape, dtype=inputs.query.dtype).masked_fill(~visible, float("-inf"))
