"""Refinement: Adam on the keys and values of many layers at once, without a pass through the model.

For a row i and a query head, with the notation of `parts`, the prompt gives

    a' = sigmoid(Λ' − Λ^rest),   out' = a' o' + (1 − a') r,   error = Σ_i ‖out' − out‖² / Σ_i ‖out‖²

The loss is the sum of the errors of all heads and layers. One call of `prompt_attention` does all layers: they are the
sequences of a batch, each with its own prompt of a bank, without own keys. The gradient of its lse carries that of a'.

Some rows are held out. The prompt is compared on them every few steps, and each layer keeps its best keys and values:
where rows are few for k, refinement would fit their noise.

Cost of a step: attention of the step's rows over k keys, forward and backward. A team of ranks shares the rows of each
step, and sums the gradient: 4·k·Hkv·(D + Dv) bytes a layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softprompt_kernels.compress.matching.parts import Parts, attend_prompts
from softprompt_kernels.compress.parallel.teams import ALONE, Team
from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.models.tap import ScoreFunction

BETAS = (0.9, 0.99)
WARMUP_STEPS = 20  # without them, Adam's first steps undo a part of the closed form
CHECK_EVERY = 25  # steps between two comparisons on the held-out rows


@dataclass(frozen=True, eq=False)
class RefineRows:
    """Rows of L layers with one score function.

    Args:
        query: `[L, Hq, n, D]`.
        rest_out: r `[L, Hq, n, Dv]`.
        rest_error: r − out `[L, Hq, n, Dv]`, the error of a prompt that no query looks at.
        rest_lse: Λ^rest `[L, Hq, n]`.
        size: `[L, Hq]`, the mean of ‖out‖² over the rows that these were taken from.
        scores: of the layers. A window is not applied.
        team: of ranks that share the rows; these are n of them, and sums over rows are parts of the team's.
        first: the number of the first row that the team has here.
        total: how many the team has here; None: n.
    """

    query: Tensor
    rest_out: Tensor
    rest_error: Tensor
    rest_lse: Tensor
    size: Tensor
    scores: ScoreFunction
    team: Team = ALONE
    first: int = 0
    total: int | None = None

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
        query, rest_out, lse = (tensor.new_empty(layers, *tensor.shape) for tensor in (like.query, like.out, like.lse))
        size = lse.new_empty(lse.shape[:2])
        return cls(query, rest_out, torch.empty_like(rest_out), lse, size, like.scores, like.team, 0, like.total)

    def put(self, index: int, rows: LayerRows, parts: Parts) -> None:
        """Copy the rows of one layer to their place."""
        self.query[index], self.rest_out[index], self.rest_lse[index] = rows.query, parts.rest_out, parts.rest_lse
        torch.sub(parts.rest_out, rows.out, out=self.rest_error[index])
        self.size[index] = rows.mean_square().clamp(min=1e-20)

    @property
    def count(self) -> int:
        """The rows of each layer: n, or those of the team."""
        return self.query.shape[2] if self.total is None else self.total

    def slice(self, start: int, stop: int) -> RefineRows:
        """Rows `start` to `stop − 1` of every layer, as views. Of a team: this rank's among them."""
        own, first = self.team.own, self.first + start
        part = slice(own(first) - own(self.first), own(self.first + stop) - own(self.first))
        query, rest_out, rest_error = (t[:, :, part] for t in (self.query, self.rest_out, self.rest_error))
        total = None if self.total is None else stop - start
        rest_lse = self.rest_lse[:, :, part]
        return RefineRows(query, rest_out, rest_error, rest_lse, self.size, self.scores, self.team, first, total)


def match_error(rows: RefineRows, key: Tensor, value: Tensor) -> Tensor:
    """The mean of ‖out' − out‖² over the rows, relative to `rows.size`: `[L, Hq]`, differentiable.

    Of a team it is what this rank's rows add to the mean over all.

    Args:
        rows: of L layers.
        key, value: `[L, Hkv, k, D]` and `[L, Hkv, k, Dv]`.
    """
    out, lse = attend_prompts(rows.query, key, value, rows.scores)
    squares: Tensor = _SquaredError.apply(out, lse, rows.rest_out, rows.rest_error, rows.rest_lse)
    return squares / (rows.size * rows.count)


def team_error(rows: RefineRows, key: Tensor, value: Tensor) -> Tensor:
    """`match_error` over the rows of a team, without a gradient."""
    with torch.no_grad():
        errors = match_error(rows, key, value)
        rows.team.sum_([errors])
    return errors


class _SquaredError(torch.autograd.Function):
    """Σ_i ‖δ_i‖² of each head, δ = out' − out = a' (o' − r) + (r − out), differentiable by o' and Λ'.

        ∂/∂o' = 2 a' δ        ∂/∂Λ' = 2 a' (1 − a') δ·(o' − r)

    Autograd would read and write the rows more often, and these passes would take longer than the attention.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, rest_out: Tensor, rest_error: Tensor, rest_lse: Tensor) -> Tensor:
        share = torch.sigmoid(lse - rest_lse).to(out.dtype)
        difference = out - rest_out
        error = torch.addcmul(rest_error, difference, share[..., None])
        along = difference.mul_(error).sum(-1)
        ctx.save_for_backward(error, share, along)
        return torch.linalg.vector_norm(error, dim=(2, 3)).square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        error, share, along = ctx.saved_tensors
        factor = 2 * gradient[..., None] * share
        return error * factor[..., None], factor * (1 - share) * along, None, None, None


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
    after_step: Callable[[int, Tensor], None] = lambda step, errors: None,
) -> tuple[Tensor, Tensor]:
    """Better keys and values `[L, Hkv, k, ·]`, in their dtype.

    Args:
        key, value: where to start.
        rows: to fit, in random order; each step takes the next `rows_per_step` of them.
        heldout: other rows, which decide which state of a layer is kept.
        steps, learning_rate: of Adam, in units of the standard deviation of a head's keys and values. After a linear
            warm-up the rate falls to 0 by a cosine.
        frozen_tokens: the first tokens, which do not move.
        after_step: receives the step, from 1, and the errors `[L, Hq]` on its rows before it.
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

    steps_rows = batches(rows, rows_per_step)
    with torch.no_grad():
        best = [key, value]
        best_error = team_error(heldout, key, value).sum(1)
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, step / WARMUP_STEPS) * cosine
        errors = match_error(next(steps_rows), *current())
        optimizer.zero_grad()
        errors.sum().backward()
        errors = errors.detach()
        rows.team.sum_([*(tensor.grad for tensor in free if tensor.grad is not None), errors])
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                now = current()
                error = team_error(heldout, *now).sum(1)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best = [torch.where(better[:, None, None, None], n, b) for n, b in zip(now, best, strict=True)]
        after_step(step, errors)
    return best[0], best[1]


def batches(rows: RefineRows, size: int) -> Iterator[RefineRows]:
    """Runs of `size` rows, again and again. Runs are views: to draw rows at random would copy them in every step.

    Every other turn leaves out rows at the start instead of at the end, so two turns use every row.
    """
    size = min(size, rows.count)
    for turn in itertools.count():
        first = rows.count % size if turn % 2 else 0
        for start in range(first, rows.count - size + 1, size):
            yield rows.slice(start, start + size)
