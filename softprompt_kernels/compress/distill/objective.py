"""The training loss of the student against the teacher's targets, summed over tokens.

| objective | head | targets | GEMMs with the head per step | op |
|---|---|---|---|---|
| kl, nll, mixtures | linear | moments | 2 | `linear_kl_div_from_moments` |
| kl | with softcap | hidden | 3 | `linear_kl_div` |
| reverse_kl, jsd | any | hidden | 3 | `linear_kl_div` |

`nll_weight` λ mixes `(1 − λ)·divergence + λ·NLL(y)`. Objective "nll" is λ = 1 and needs no teacher targets.
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

DIVERGENCE_OF = {"kl": "forward", "reverse_kl": "reverse", "jsd": "jsd"}  # objective -> `divergence` of the op


@dataclass(frozen=True, eq=False)
class Objective:
    """A training loss.

    Args:
        name: "kl", "reverse_kl", "jsd" or "nll".
        head: the model's head.
        nll_weight: λ, from 0 to 1; above 0 only with "kl".
        beta: weight of the teacher in the mixture of "jsd".
        temperature: T. Divides the logits of student and teacher; the divergence is multiplied by T².

    Raises:
        SoftPromptError: an unknown name, or a mixture that is not supported. A loss with labels needs a linear head,
            temperature 1 and the forward KL.
    """

    name: str
    head: Head
    nll_weight: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in (*DIVERGENCE_OF, "nll"):
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
        """λ; 1 for "nll"."""
        return 1.0 if self.name == "nll" else self.nll_weight

    @property
    def form(self) -> Form | None:
        """What the loss needs from the teacher for each token: moments, the last hidden state, or nothing (None)."""
        if self.label_weight == 1:
            return None
        return "moments" if self.name == "kl" and self.head.softcap is None else "hidden"

    def loss(self, hidden: Tensor, labels: Tensor, examples: Sequence[int], targets: Targets | None) -> Tensor:
        """The loss summed over tokens, a scalar, in nats (times T²).

        Args:
            hidden: `[n, d]`: the student's hidden states, differentiable.
            labels: `[n]` int64: the tokens that follow.
            examples: the indices in `targets` of the examples that the rows belong to, in order.
            targets: the teacher's targets in this objective's `form`; None if the form is None.
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
                divergence=DIVERGENCE_OF[self.name],
                beta=self.beta,
                temperature=self.temperature,
                reduction="sum",
            )
        return linear_kl_div_from_moments(
            hidden,
            self._unused_moments(hidden) if targets is None else targets.moments(examples, hidden.device),
            head.weight,
            labels=labels if self.label_weight else None,
            label_weight=self.label_weight,
            bias=head.bias,
            logit_scale=head.logit_scale,
            temperature=self.temperature,
            reduction="sum",
        )

    def _unused_moments(self, hidden: Tensor) -> TeacherMoments:
        """Zero moments of the right shapes, for label weight 1, which gives them weight 0."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        bias_mean = None if self.head.bias is None else rows
        return TeacherMoments(mean, rows, bias_mean, self.temperature, self.head.logit_scale, None)
