"""The loss of a student against the teacher's targets, summed over tokens.

| objective | head | targets | products with the head | op |
|---|---|---|---|---|
| kl, nll, mixtures | linear | moments | 2 | `linear_kl_div_from_moments` |
| kl | with softcap | hidden | 3 | `linear_kl_div` |
| reverse_kl, jsd | any | hidden | 3 | `linear_kl_div` |

`nll_weight` λ mixes `(1 − λ)·divergence + λ·NLL(y)`; objective "nll" is λ = 1, for which no teacher is run at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.compress.teacher.moments_cache import Form, Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head
from softprompt_kernels.ops import TeacherMoments, linear_kl_div, linear_kl_div_from_moments

DIVERGENCES = {"kl": "forward", "reverse_kl": "reverse", "jsd": "jsd"}


@dataclass(frozen=True, eq=False)
class Objective:
    """What is minimised.

    Args:
        name: "kl", "reverse_kl", "jsd" or "nll".
        head: the model's head.
        nll_weight: λ, from 0 to 1.
        beta: of the JSD.
        temperature: divides both logits, multiplies the loss by its square.

    Raises:
        SoftPromptError: a mixture that is not served: labels need a linear head at temperature 1, and go with the
            forward KL.
    """

    name: str
    head: Head
    nll_weight: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in (*DIVERGENCES, "nll"):
            raise SoftPromptError(f"objective: got {self.name!r}, accepted are kl, reverse_kl, jsd and nll")
        if self.label_weight == 0:
            return
        if self.name in ("reverse_kl", "jsd"):
            raise SoftPromptError(f"nll_weight: got {self.nll_weight} with {self.name}, accepted is 0, or objective kl")
        if self.head.softcap is not None:
            raise SoftPromptError(
                f"objective: got {self.name} with nll_weight {self.label_weight} for a model whose head has a softcap; "
                "accepted are kl, reverse_kl and jsd with nll_weight 0"
            )
        if self.temperature != 1:
            raise SoftPromptError(f"loss_temperature: got {self.temperature} with labels in the loss, accepted is 1")

    @property
    def label_weight(self) -> float:
        """λ: 1 for "nll"."""
        return 1.0 if self.name == "nll" else self.nll_weight

    @property
    def form(self) -> Form | None:
        """What it needs of the teacher: None where it needs nothing."""
        if self.label_weight == 1:
            return None
        return "moments" if self.name == "kl" and self.head.softcap is None else "hidden"

    def loss(self, hidden: Tensor, labels: Tensor, examples: Sequence[int], targets: Targets | None) -> Tensor:
        """Scalar, summed over tokens, nats (times temperature²).

        Args:
            hidden: `[n, d]`, the student's rows, differentiable.
            labels: `[n]`, the tokens that follow.
            examples: indices in `targets` whose rows these are, in order.
            targets: the teacher's, in this objective's `form`; None where that is None.
        """
        head = self.head
        if self.form == "hidden":
            assert targets is not None
            return linear_kl_div(
                hidden,
                targets.hidden(examples, hidden.device),
                head.weight,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                divergence=DIVERGENCES[self.name],
                beta=self.beta,
                temperature=self.temperature,
                reduction="sum",
            )
        return linear_kl_div_from_moments(
            hidden,
            self._no_teacher(hidden) if targets is None else targets.moments(examples, hidden.device),
            head.weight,
            labels=labels if self.label_weight else None,
            label_weight=self.label_weight,
            bias=head.bias,
            logit_scale=head.logit_scale,
            temperature=self.temperature,
            reduction="sum",
        )

    def _no_teacher(self, hidden: Tensor) -> TeacherMoments:
        """Moments that label weight 1 leaves out of the sum."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        bias_mean = None if self.head.bias is None else rows
        return TeacherMoments(mean, rows, bias_mean, self.temperature, self.head.logit_scale, None)
