"""AdamW with rates in units of each head's standard deviation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_kernels.compress.distill.relative_adamw import RelativeAdamW


def start() -> Tensor:
    """`[L, Hkv, k, D]` with heads of very different sizes."""
    size = torch.tensor([[0.03, 1.0], [2.0, 40.0]], dtype=torch.float64)
    return (
        torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size[..., None, None]
    )


def train(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_an_update_is_that_of_adam_on_scaled_parameters() -> None:
    x = start()
    scale = x.std(dim=(2, 3), keepdim=True, correction=0)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    found, scaled = nn.Parameter(x.clone()), nn.Parameter(x / scale)
    options: Any = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 0.0}
    train(lambda: (found - target).square().sum(), RelativeAdamW([found], **options))
    train(lambda: (scaled * scale - target).square().sum(), torch.optim.AdamW([scaled], **options))
    torch.testing.assert_close(found.detach(), scaled.detach() * scale, rtol=1e-9, atol=1e-12)
    moved = (found.detach() - x).abs().amax(dim=(2, 3), keepdim=True) / scale
    assert ((moved > 0.02) & (moved < 0.1)).all(), "every head moves by about steps · lr of its own size"


def test_a_head_that_is_constant_moves_as_with_adamw() -> None:
    found, expected = (nn.Parameter(torch.zeros(1, 1, 4, 2)) for _ in range(2))
    for parameter, kind in ((found, RelativeAdamW), (expected, torch.optim.AdamW)):
        train(lambda p=parameter: (p - 1).square().sum(), kind([parameter], lr=0.1))
    torch.testing.assert_close(found, expected)
