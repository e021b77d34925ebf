"""Least squares within a box: the KKT conditions, and the best of all active sets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softprompt_kernels.compress.matching.box_least_squares import box_least_squares

LOW, HIGH = 1e-3, 1e3


def problem(seed: int, batch: int, k: int, rank: int, unused: int) -> tuple[Tensor, Tensor]:
    """G = AᵀA and b = Aᵀ1 with positive A, as masses have them. `unused` columns of A are 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(batch, rank, k, generator=generator, dtype=torch.float64)
    rows = rows * 10 ** (2 * torch.rand(batch, 1, k, generator=generator, dtype=torch.float64) - 2)
    rows[..., :unused] = 0
    return rows.mT @ rows, rows.sum(1)


def kkt_violation(gram: Tensor, right: Tensor, w: Tensor, low: float, high: float) -> float:
    """The largest violation, in units of the largest entry of the scaled right side."""
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gradient = ((gram @ w[..., None])[..., 0] - right) / scale
    at_low, at_high = w <= low * (1 + 1e-9), w >= high * (1 - 1e-9)
    wrong = torch.where(at_low, -gradient, torch.where(at_high, gradient, gradient.abs())).clamp(min=0)
    return float((wrong / (right / scale).abs().amax(-1, keepdim=True)).nan_to_num(0.0).max())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    k=st.integers(1, 12),
    rank=st.integers(1, 20),
    unused=st.integers(0, 3),
)
def test_the_result_satisfies_the_kkt_conditions(seed: int, batch: int, k: int, rank: int, unused: int) -> None:
    gram, right = problem(seed, batch, k, rank, min(unused, k - 1))
    w = box_least_squares(gram, right, LOW, HIGH)
    assert w.dtype == torch.float64 and w.isfinite().all()
    assert (w >= LOW * (1 - 1e-9)).all() and (w <= HIGH * (1 + 1e-9)).all()
    assert kkt_violation(gram, right, w, LOW, HIGH) <= 2e-5


def best_of_all_active_sets(gram: Tensor, right: Tensor, low: float, high: float) -> float:
    """The smallest objective of the 3^k problems in which each variable is free, at `low` or at `high`."""
    best = float("inf")
    for states in itertools.product((None, low, high), repeat=len(right)):
        w = torch.tensor([0.0 if state is None else state for state in states]).double()
        free = [j for j, state in enumerate(states) if state is None]
        if free:
            w[free] = torch.linalg.lstsq(gram[free][:, free], (right - gram @ w)[free]).solution
        if bool(((w >= low - 1e-9) & (w <= high + 1e-9)).all()):
            best = min(best, float(w @ gram @ w / 2 - right @ w))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (0.5, 1.5)])
def test_no_active_set_is_better(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = 1 + seed % 4
    rows = torch.randn(k + 3, k, generator=generator, dtype=torch.float64)
    gram, right = rows.T @ rows, rows.T @ torch.randn(k + 3, generator=generator, dtype=torch.float64)
    w = box_least_squares(gram, right, low, high)
    assert float(w @ gram @ w / 2 - right @ w) <= best_of_all_active_sets(gram, right, low, high) + 1e-8


def test_a_variable_that_no_equation_contains_keeps_the_value_1() -> None:
    gram, right = problem(3, 2, 5, 8, unused=2)
    assert torch.equal(box_least_squares(gram, right, LOW, HIGH)[:, :2], torch.ones(2, 2).double())


def test_problems_of_a_batch_do_not_depend_on_each_other() -> None:
    gram, right = problem(4, 3, 6, 9, unused=0)
    together = box_least_squares(gram, right, LOW, HIGH, tolerance=1e-9)
    for i in range(3):
        alone = box_least_squares(gram[i], right[i], LOW, HIGH, tolerance=1e-9)
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-6)


def test_equal_keys_share_their_mass() -> None:
    gram, right = torch.ones(2, 2).double(), torch.full((2,), 3.0).double()
    torch.testing.assert_close(box_least_squares(gram, right, LOW, HIGH), torch.full((2,), 1.5).double())


def test_a_problem_without_equations_is_left_at_1() -> None:
    assert torch.equal(box_least_squares(torch.zeros(2, 4, 4), torch.zeros(2, 4), LOW, HIGH), torch.ones(2, 4).double())
