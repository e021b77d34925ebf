"""What a layer's attention gives for the context alone, and what is left of it.

A query i of a layer sees the context's keys K [C, D] and the rest: its own tokens, and a sink where there is one. With
the scale s,

    Λ_i = lse(s q_i Kᵀ)                      o_i = softmax(s q_i Kᵀ) V            the context's part
    a_i = exp(Λ_i − Λ_i^all)                                                      its share of the softmax
    Λ_i^rest = Λ_i^all + log(1 − a_i)        r_i = (out_i − a_i o_i) / (1 − a_i)  the rest

so that out_i = a_i o_i + (1 − a_i) r_i. A prompt with o', Λ' in place of the context gives

    a'_i = sigmoid(Λ'_i − Λ_i^rest),         out'_i = a'_i o'_i + (1 − a'_i) r_i.

Only the context's part is computed here, by `prompt_attention` without own keys, for runs of rows: nothing of size
[rows, C] is formed, even by a backend without kernels. In a layer with a window the keys that a query sees depend on
its position, so there is one call for each distance of a query from the end of the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.tap import ScoreFunction
from softprompt_kernels.ops import prompt_attention

LARGEST_LOG_SHARE = -1e-6  # a < 1: where the context is all that a query looks at, rounding may put Λ above Λ_all
ATTENDED_PAIRS = 1 << 27  # pairs of a query and a key in one call: a backend without kernels keeps a score for each
NOISY_REST = 1e-2  # 1 − a below which r is cut to the size of the values


@dataclass(frozen=True, eq=False)
class Parts:
    """The context's part of a layer's attention and the rest, for n rows.

    Args:
        context_out: o `[Hq, n, Dv]`.
        context_lse: Λ `[Hq, n]`, −inf for a row that sees none of the context.
        rest_out: r `[Hq, n, Dv]`.
        rest_lse: Λ^rest `[Hq, n]`.
        share: a `[Hq, n]`.
    """

    context_out: Tensor
    context_lse: Tensor
    rest_out: Tensor
    rest_lse: Tensor
    share: Tensor


def visible_runs(rows: LayerRows, context: int) -> Iterator[tuple[Tensor | slice, slice]]:
    """Pairs of rows and the run of the context's C keys that they see: runs of rows if there is no window."""
    window = rows.scores.window
    if window is None or int(rows.offset.max()) + context < window:
        size = max(1, ATTENDED_PAIRS // (context * rows.query.shape[0]))
        for start in range(0, rows.count, size):
            yield slice(None) if size >= rows.count else slice(start, start + size), slice(0, context)
        return
    for offset in rows.offset.unique().tolist():
        first = max(0, context + offset - window + 1)
        if first < context:
            yield (rows.offset == offset).nonzero().squeeze(1), slice(first, context)


def attend_prompts(
    query: Tensor, key: Tensor, value: Tensor, scores: ScoreFunction, *, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`prompt_attention` without own keys, for L layers at once: the queries of layer l read prompt l.

    Args:
        query: `[L, Hq, n, D]`.
        key, value: `[L, Hkv, P, D]`, `[L, Hkv, P, Dv]`.
        scores: its window is not applied.
        factor: multiplies the scores. A softcap c of scores f·x is f·c·tanh(x / c), so it takes the factor too.

    Returns:
        out `[L, Hq, n, Dv]` and lse `[L, Hq, n]`, differentiable.
    """
    own_key = query.new_empty(query.shape[0], key.shape[1], 0, key.shape[3])
    own_value = query.new_empty(query.shape[0], value.shape[1], 0, value.shape[3])
    result = prompt_attention(
        query,
        own_key,
        own_value,
        key,
        value,
        causal=False,
        scale=scores.scale * factor,
        softcap=None if scores.softcap is None else scores.softcap * factor,
        return_lse=True,
    )
    return cast(tuple[Tensor, Tensor], result)


@torch.no_grad()
def split(rows: LayerRows, key: Tensor, value: Tensor) -> Parts:
    """The parts of a layer whose context has keys `[Hkv, C, D]` and values `[Hkv, C, Dv]`, in the dtype of the rows.

    A row that sees none of the context has share 0, Λ = −inf and o = 0.

    Raises:
        SoftPromptError: a query, a result, a key or a value is not finite.
    """
    tensors = {"queries": rows.query, "results": rows.out, "sums": rows.lse, "keys": key, "values": value}
    for name, tensor in tensors.items():
        if not math.isfinite(_largest(tensor)):
            raise SoftPromptError(
                f"model: the {name} of a layer's attention behind the context are not finite, accepted are finite "
                "numbers; a 16-bit model may overflow where float32 does not (dtype)"
            )
    context_out = torch.zeros_like(rows.out)
    context_lse = torch.full_like(rows.lse, -torch.inf)
    dtype = rows.query.dtype
    for index, keys in visible_runs(rows, key.shape[1]):
        out, lse = attend_prompts(
            rows.query[None, :, index], key[None, :, keys].to(dtype), value[None, :, keys].to(dtype), rows.scores
        )
        context_out[:, index], context_lse[:, index] = out[0], lse[0].to(dtype)
    log_share = (context_lse - rows.lse).clamp(max=LARGEST_LOG_SHARE)
    share, rest = log_share.exp(), -torch.expm1(log_share)
    rest_out = (rows.out - share[..., None] * context_out) / rest[..., None]
    # The rest is a mean of values. Where a is near 1, cancellation leaves noise that is divided by a small number.
    largest_out = rows.team.largest(rows.out.new_tensor(_largest(rows.out)))
    largest = max(float(largest_out), _largest(value))
    noisy = (rest < NOISY_REST)[..., None]
    rest_out = torch.where(noisy, rest_out.clamp(-largest, largest), rest_out)
    return Parts(context_out, context_lse, rest_out, rows.lse + rest.log(), share)


def _largest(tensor: Tensor) -> float:
    """max |x|, not finite if one of the numbers is not. Nothing of the size of the tensor is made."""
    low, high = (float(found) for found in tensor.aminmax())
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.nan
