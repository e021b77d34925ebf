"""A prompt of k keys for one layer, in closed form (after Attention Matching, arXiv 2602.16284, without its biases).

For each key head, over the rows i of its query heads, with weights ω_i = a_i² (a: the context's share of the softmax)
and P_ij = exp(s q_i·K_j − Λ_i):

1. **Keys**: the k with the largest importance Σ_i ω_i P_ij². The first token is always among them, as attention sink.
2. **Masses**: w ≥ 0 with Σ_j w_j P_ij ≈ 1 for all rows, by weighted least squares. A factor w_j on the weight of a key
   is a bias β_j = log w_j of its score. It is put into the key: K'_j = K_j + β_j u / s, with u the ridge solution of
   q_i·u ≈ 1. The queries of a head have a direction in common, so such a u exists. A softcap bends the sum, so there
   the mass is approximate.
3. **Values**: V' by ridge regression of o on softmax(s q K'ᵀ), towards the values of the chosen keys.

Importance comes from the op. The gradient by the values of an attention with values [C, 1] and grad_out v is
Σ_i v_i P_ij. With scores doubled, P' = softmax(2 s q Kᵀ) and Λ' = lse(2 s q Kᵀ), so P_ij² = P'_ij exp(Λ'_i − 2 Λ_i).
Nothing of size [rows, C] is formed.

Cost for each key head with m = n·Hq/Hkv rows: 2 GEMMs of m·C·D for the importance, and 2 Gram matrices of m·k². A team
of ranks shares the rows, and sums importance (C numbers a head), Gram matrices and right sides (16·k² bytes a head).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softprompt_kernels.compress.matching.box_least_squares import box_least_squares
from softprompt_kernels.compress.matching.parts import Parts, attend_prompts, visible_runs
from softprompt_kernels.compress.teacher.rows import LayerRows

SMALLEST_MASS, LARGEST_MASS = 1e-3, 1e3
VALUE_RIDGE = 1e-3  # of the mean diagonal of the Gram matrix
DIRECTION_RIDGE = 1e-3
LARGEST_RATIO = 1e6  # P_ij is at most 1 for the context's own keys; other scores are cut here
CHUNK_ELEMENTS = 4 << 20  # of P at once


def fit_layer(rows: LayerRows, parts: Parts, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys `[Hkv, k, D]` and values `[Hkv, k, Dv]` for one layer.

    Args:
        rows, parts: of the layer.
        key, value: of the context, `[Hkv, C, D]` and `[Hkv, C, Dv]`.
        tokens: k, from 1. From C on the context itself is returned.

    Returns:
        Keys at the positions of the context and values, in the dtype of the rows.
    """
    dtype = rows.query.dtype
    if tokens >= key.shape[1]:
        return key.to(dtype), value.to(dtype)
    chosen = choose_keys(key_importance(rows, parts, key), tokens)[..., None]
    picked_key = key.gather(1, chosen.expand(-1, -1, key.shape[2])).to(dtype)
    picked_value = value.gather(1, chosen.expand(-1, -1, value.shape[2])).to(dtype)
    problem = _Problem(rows, parts, key.shape[0], tokens)
    new_key = picked_key + problem.mass_in_keys(picked_key)
    return new_key, problem.values(new_key, picked_value)


def key_importance(rows: LayerRows, parts: Parts, key: Tensor) -> Tensor:
    """Σ_i a_i² P_ij² over the rows of each key head, `[Hkv, C]`, in the dtype of the rows."""
    dtype = rows.query.dtype
    found = torch.zeros(key.shape[:2], dtype=dtype, device=key.device)
    for index, keys in visible_runs(rows, key.shape[1]):
        visible = key[None, :, keys].to(dtype)
        value = torch.zeros(*visible.shape[:3], 1, dtype=dtype, device=key.device, requires_grad=True)
        with torch.enable_grad():
            out, lse = attend_prompts(rows.query[None, :, index], visible, value, rows.scores, factor=2.0)
        weight = (2 * (parts.share[:, index].log() - parts.context_lse[:, index]) + lse[0].detach()).exp()
        (gradient,) = torch.autograd.grad(out, value, weight[None, ..., None].to(dtype))
        found[:, keys] += gradient[0, ..., 0]
    rows.team.sum_([found])
    return found


def choose_keys(importance: Tensor, tokens: int) -> Tensor:
    """Indices `[Hkv, k]` int64 of the k most important of `[Hkv, C]` keys, ascending.

    Key 0 is always one of them if any query sees it, or if none sees any key.
    """
    importance = importance.clone()
    seen = (importance[:, 0] > 0) | (importance.amax(1) <= 0)
    importance[:, 0] = torch.where(seen, torch.inf, importance[:, 0])
    return importance.topk(tokens, dim=1).indices.sort(dim=1).values


class _Problem:
    """The least-squares problems of one layer: m = n·Hq/Hkv rows for each key head, k unknowns."""

    def __init__(self, rows: LayerRows, parts: Parts, kv_heads: int, tokens: int) -> None:
        self.scores, self.team = rows.scores, rows.team
        self.query = _by_key_head(rows.query, kv_heads)
        self.out = _by_key_head(parts.context_out, kv_heads)
        self.lse = _by_key_head(parts.context_lse[..., None], kv_heads)
        self.weight = _by_key_head(parts.share.square()[..., None], kv_heads)
        self.hidden = self._hidden_slots(rows, tokens)

    def mass_in_keys(self, key: Tensor) -> Tensor:
        """What is added to keys `[Hkv, k, D]` so that their masses sum to the context's."""
        gram: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for part, weight in self._chunks(key.shape[1]):
            # A row that sees none of the context has Λ = −inf and weight 0. The product would not be a number.
            p = (self._masked_scores(key, part) - self.lse[:, part]).exp().clamp(max=LARGEST_RATIO)
            p = torch.where(weight > 0, p, 0)
            gram = gram + (p.mT @ (p * weight)).double()
            right = right + (p * weight).sum(1, dtype=torch.float64)
        assert isinstance(gram, Tensor) and isinstance(right, Tensor)
        self.team.sum_([gram, right])
        mass = box_least_squares(gram, right, SMALLEST_MASS, LARGEST_MASS)
        weighted = self.query * self.weight
        products, sums = weighted.mT @ self.query, weighted.sum(1)[..., None]
        self.team.sum_([products, sums])
        direction = _ridge(products, sums, DIRECTION_RIDGE)[..., 0]
        return mass.log()[..., None].to(key.dtype) * direction[:, None].to(key.dtype) / self.scores.scale

    def values(self, key: Tensor, start: Tensor) -> Tensor:
        """Values `[Hkv, k, Dv]` for these keys, near `start`."""
        gram: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for part, weight in self._chunks(key.shape[1]):
            # A row from which a window hides all keys gives not-a-number, and counts for nothing.
            p = self._masked_scores(key, part).softmax(dim=-1).nan_to_num(0.0)
            weighted = p * weight
            gram = gram + (weighted.mT @ p).double()
            right = right + (weighted.mT @ (self.out[:, part] - p @ start)).double()
        assert isinstance(gram, Tensor) and isinstance(right, Tensor)
        self.team.sum_([gram, right])
        return start + _ridge(gram, right, VALUE_RIDGE).to(start.dtype)

    def _chunks(self, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and their weights, so that P of a run has at most CHUNK_ELEMENTS."""
        heads, rows, _ = self.query.shape
        size = max(1, CHUNK_ELEMENTS // (heads * tokens))
        for start in range(0, rows, size):
            part = slice(start, start + size)
            yield part, self.weight[:, part]

    def _masked_scores(self, key: Tensor, part: slice) -> Tensor:
        """`[Hkv, rows, k]`, −inf where the layer's window hides the slot from the student's query."""
        raw = self.query[:, part] @ key.mT * self.scores.scale
        if self.scores.softcap is not None:
            raw = torch.tanh(raw / self.scores.softcap) * self.scores.softcap
        return raw if self.hidden is None else raw.masked_fill(self.hidden[part], -torch.inf)

    def _hidden_slots(self, rows: LayerRows, tokens: int) -> Tensor | None:
        """`[m, k]` bool: the slots of the prompt that a query at position k + offset does not see; None for none."""
        if not hides_prompt(rows, tokens):
            return None
        assert rows.scores.window is not None
        slots = torch.arange(tokens, device=rows.offset.device)
        hidden = tokens + rows.offset[:, None] - slots >= rows.scores.window
        return hidden.repeat(self.query.shape[1] // rows.count, 1)


def hides_prompt(rows: LayerRows, tokens: int) -> bool:
    """Whether the layer's window hides some of k prompt tokens from some row."""
    window = rows.scores.window
    return window is not None and tokens + int(rows.team.largest(rows.offset.max())) >= window


def _by_key_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """`[Hq, n, ·]` to `[Hkv, m, ·]`: the rows of the query heads that share a key head, one after the other."""
    return tensor.reshape(kv_heads, -1, tensor.shape[2])


def _ridge(gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """`(gram + λ)⁻¹ right` in float64, λ = strength · mean diagonal. 0 where the Gram matrix is 0."""
    gram, right = gram.double(), right.double()
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1) * strength
    ridge = torch.where(ridge > 0, ridge, 1.0)[..., None, None]
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), right)
