"""Least squares within a box, for many small problems at once.

    min_w  ½ wᵀ G w − bᵀ w,   low ≤ w ≤ high,   G [.., k, k] positive semidefinite

Accelerated projected gradient (FISTA, Beck & Teboulle 2009) that restarts where a step turns back (O'Donoghue & Candès
2015), on G scaled to a unit diagonal, in float64. It stops when the projected gradient is small. Then w satisfies the
KKT conditions to `tolerance`:

    gradient_j = 0 where low < w_j < high,   ≥ 0 where w_j = low,   ≤ 0 where w_j = high

Cost: one eigenvalue problem, then one product of k² for each iteration and problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHECK_EVERY = 25  # iterations between two checks of the KKT conditions


def box_least_squares(
    gram: Tensor, right: Tensor, low: float, high: float, *, iterations: int = 2000, tolerance: float = 1e-5
) -> Tensor:
    """w `[.., k]` in float64, from w = 1: inside the box, and optimal unless `iterations` are too few.

    Args:
        gram: G `[.., k, k]`. A zero on the diagonal is a variable that no equation contains; it keeps the value 1.
        right: b `[.., k]`.
        low, high: the box; 1 is inside.
        iterations: at most so many.
        tolerance: of the projected gradient, relative to the largest entry of b, in the scaled problem.
    """
    scale = gram.double().diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    matrix, vector = gram.double() / (scale[..., :, None] * scale[..., None, :]), right.double() / scale
    least, most = low * scale, high * scale
    step = 1 / torch.linalg.eigvalsh(matrix)[..., -1:].clamp(min=1e-12)
    x = scale.clamp(least, most)
    ahead, momentum = x, torch.ones_like(step)
    for iteration in range(iterations):
        if iteration % CHECK_EVERY == 0 and _is_optimal(matrix, vector, x, least, most, tolerance):
            break
        before = x
        x = (ahead - step * (_apply(matrix, ahead) - vector)).clamp(least, most)
        turned = ((ahead - x) * (x - before)).sum(-1, keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.where(turned, x, x + (momentum - 1) / grown * (x - before))
        momentum = torch.where(turned, 1.0, grown)
    return x / scale


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _is_optimal(matrix: Tensor, vector: Tensor, x: Tensor, least: Tensor, most: Tensor, tolerance: float) -> bool:
    gradient = _apply(matrix, x) - vector
    projected = torch.where(x <= least, gradient.clamp(max=0), torch.where(x >= most, gradient.clamp(min=0), gradient))
    size = vector.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return bool((projected.abs() <= tolerance * size).all())
