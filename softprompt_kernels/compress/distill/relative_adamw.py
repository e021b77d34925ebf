"""AdamW with learning rates in units of the size of what is trained.

    x ← x + s · (AdamW's update of x),   s = standard deviation of x over tokens and channels, of each layer and head

A KV prompt's values differ in size by a factor of 30 between the layers of a small model, and its keys are larger than
its values. One absolute rate then moves some of them too far and others hardly at all. Adam's update does not depend
on the size of the gradient, so without weight decay this is Adam on x / s. The decay is a part of the update, and is
scaled too.

Cost: one more copy of the parameters during a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RelativeAdamW(torch.optim.AdamW):
    """AdamW on parameters `[L, Hkv, k, D]`, with updates in units of each head's standard deviation at the start."""

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, **options)
        self.scales = [_scale(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        super().step(closure)
        for parameter, old, scale in zip(parameters, before, self.scales, strict=True):
            torch.lerp(old, parameter, scale, out=parameter.data)


def _scale(tensor: Tensor) -> Tensor:
    """`[L, Hkv, 1, 1]`; 1 where a head is constant."""
    scale = tensor.std(dim=(2, 3), keepdim=True, correction=0)
    return torch.where(scale > 0, scale, 1.0)
