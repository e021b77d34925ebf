"""Top-p, and rows with settings of their own in one call."""

import torch

from softprompt_kernels.models.decode.draw import draw, next_tokens

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()


def drawn(top_p: float, uniform: float) -> int:
    column = torch.tensor([uniform], dtype=torch.float64)
    return int(draw(LOGITS, 1.0, column, torch.tensor([top_p], dtype=torch.float64)))


def test_top_p_keeps_the_most_probable_tokens_that_reach_it():
    # Of 0.5 and 0.3 the first has 5/8 of what is left.
    assert [drawn(0.7, u) for u in (0.0, 0.62, 0.63, 0.999)] == [0, 0, 1, 1]
    assert [drawn(0.81, u) for u in (0.0, 0.52, 0.53, 0.83, 0.85)] == [0, 0, 1, 1, 2]
    assert {drawn(0.3, u) for u in (0.0, 0.5, 0.999)} == {0}
    assert {drawn(0.0, u) for u in (0.0, 0.5, 0.999)} == {0}
    assert [drawn(1.0, u) for u in (0.94, 0.96)] == [2, 3]


def test_what_is_not_finite_is_found_behind_top_p_too():
    logits = torch.full((1, 4), torch.nan)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert int(draw(logits, 1.0, half, half)) == -1


def test_rows_with_different_settings_get_what_each_gets_alone():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 300, generator=generator)
    logits[4, 7] = torch.inf
    settings = ([0.0, 0.7, 1.3, 0.7, 1.0, 0.0], [1.0, 1.0, 0.5, 0.9, 1.0, 0.2], [0.0, 0.3, 0.8, 0.4, 0.5, 0.0])
    together = next_tokens(logits, *settings).tolist()
    apart = [int(next_tokens(logits[i : i + 1], *([values[i]] for values in settings))) for i in range(6)]
    assert together == apart
    assert together[0] == int(logits[0].argmax())
    assert together[4] == -1
