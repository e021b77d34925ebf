"""Refinement: Adam on the keys and values of many layers at once, without a pass through the model.

For a row i and a query head, with the notation of `parts`, the prompt gives

    a' = sigmoid(Λ' − Λ^rest),   out' = a' o' + (1 − a') r,   error = Σ_i ‖out' − out‖² / Σ_i ‖out‖²

The loss is the sum of the errors of all heads and layers. One call of `prompt_attention` does all layers: they are the
sequences of a batch, each with its own prompt of a bank, without own keys. The gradient of its lse carries that of a'.

Some rows are held out. The prompt is compared on them every few steps, and each layer keeps its best keys and values:
where rows are few for k, refinement would fit their noise.

Cost of a step: attention of the step's rows over k keys, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.compress.matching.parts import Parts, attend_prompts
from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.models.attention import ScoreFunction

BETAS = (0.9, 0.99)
CHECK_EVERY = 25  # steps between two comparisons on the held-out rows


@dataclass(frozen=True, eq=False)
class RefineRows:
    """Rows of L layers with one score function.

    Args:
        query: `[L, Hq, n, D]`.
        out: `[L, Hq, n, Dv]`.
        rest_out: r `[L, Hq, n, Dv]`.
        rest_lse: Λ^rest `[L, Hq, n]`.
        scores: of the layers. A window is not applied.
    """

    query: Tensor
    out: Tensor
    rest_out: Tensor
    rest_lse: Tensor
    scores: ScoreFunction

    @classmethod
    def of(cls, rows: Sequence[LayerRows], parts: Sequence[Parts]) -> RefineRows:
        """The rows of several layers."""
        found = cls.empty(len(rows), rows[0])
        for index, (layer_rows, layer_parts) in enumerate(zip(rows, parts, strict=True)):
            found.put(index, layer_rows, layer_parts)
        return found

    @classmethod
    def empty(cls, layers: int, like: LayerRows) -> RefineRows:
        """Room for the rows of several layers, each of the shape of `like`. Layer by layer, `put` fills it."""
        query, out, lse = (tensor.new_empty(layers, *tensor.shape) for tensor in (like.query, like.out, like.lse))
        return cls(query, out, torch.empty_like(out), lse, like.scores)

    def put(self, index: int, rows: LayerRows, parts: Parts) -> None:
        """Copy the rows of one layer to their place."""
        self.query[index], self.out[index] = rows.query, rows.out
        self.rest_out[index], self.rest_lse[index] = parts.rest_out, parts.rest_lse

    @property
    def count(self) -> int:
        """n, the rows of each layer."""
        return self.query.shape[2]

    def take(self, index: Tensor | slice) -> RefineRows:
        """Some of the rows of every layer."""
        query, out, rest_out = (tensor[:, :, index] for tensor in (self.query, self.out, self.rest_out))
        return RefineRows(query, out, rest_out, self.rest_lse[:, :, index], self.scores)


def match_error(rows: RefineRows, key: Tensor, value: Tensor) -> Tensor:
    """Σ ‖out' − out‖² / Σ ‖out‖² of each layer and query head, `[L, Hq]`; differentiable.

    Args:
        rows: of these layers.
        key, value: `[L, Hkv, k, D]` and `[L, Hkv, k, Dv]`.
    """
    out, lse = attend_prompts(rows.query, key, value, rows.scores)
    share = torch.sigmoid(lse - rows.rest_lse)[..., None].to(out.dtype)
    difference = torch.lerp(rows.rest_out, out, share) - rows.out
    return difference.square().sum((2, 3)) / rows.out.square().sum((2, 3)).clamp(min=1e-20)


@torch.enable_grad()
def refine(
    key: Tensor,
    value: Tensor,
    rows: RefineRows,
    heldout: RefineRows,
    *,
    steps: int,
    learning_rate: float,
    rows_per_step: int,
    frozen_tokens: int,
    generator: torch.Generator,
    after_step: Callable[[int, float], None] = lambda step, error: None,
) -> tuple[Tensor, Tensor]:
    """Better keys and values `[L, Hkv, k, ·]`, in their dtype.

    Args:
        key, value: where to start.
        rows: to fit; each step draws `rows_per_step` of them.
        heldout: other rows, which decide which state of a layer is kept.
        steps, learning_rate: of Adam, in units of the standard deviation of a head's keys and values; the rate falls
            to 0 by a cosine.
        frozen_tokens: the first tokens, which do not move.
        generator: of the CPU.
        after_step: receives the step, from 1, and the mean error on its rows before it.
    """
    scales = [tensor.std(dim=(2, 3), keepdim=True, correction=0).clamp(min=1e-6) for tensor in (key, value)]
    fixed = [tensor[:, :, :frozen_tokens] for tensor in (key, value)]
    free = [
        (tensor[:, :, frozen_tokens:] / scale).requires_grad_()
        for tensor, scale in zip((key, value), scales, strict=True)
    ]
    optimizer = torch.optim.Adam(free, lr=learning_rate, betas=BETAS)

    def current() -> list[Tensor]:
        return [torch.cat((f, x * s), dim=2) for f, x, s in zip(fixed, free, scales, strict=True)]

    with torch.no_grad():
        best = [key, value]
        best_error = match_error(heldout, key, value).sum(1)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        index = torch.randperm(rows.count, generator=generator)[:rows_per_step].to(key.device)
        errors = match_error(rows.take(index), *current())
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                now = current()
                error = match_error(heldout, *now).sum(1)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best = [torch.where(better[:, None, None, None], n, b) for n, b in zip(now, best, strict=True)]
        after_step(step, float(errors.detach().mean()))
    return best[0], best[1]
