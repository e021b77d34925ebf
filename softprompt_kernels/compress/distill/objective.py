"""The training loss of the student against the teacher's targets: losses of tokens, and their weights.

| objective | head | targets | GEMMs with the head per step | op |
|---|---|---|---|---|
| kl, nll, mixtures | linear | moments | 2 | `linear_kl_div_from_moments` |
| kl | with softcap | hidden | 3 | `linear_kl_div` |
| reverse_kl, jsd | any | hidden | 3 | `linear_kl_div` |
| a function of yours | any | hidden | its own | `own_loss.py` |

`nll_weight` λ mixes `(1 − λ)·divergence + λ·NLL(y)`. Objective "nll" is λ = 1 and needs no teacher targets. Weights of
tokens (`token_weights.py`): "entropy" needs the teacher's entropy, which moments have and which is stored beside other
targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt_kernels.compress.config import TokenWeights
from softprompt_kernels.compress.distill.own_loss import LossFunction, call_own_loss
from softprompt_kernels.compress.distill.token_weights import entropy_weights, student_weights
from softprompt_kernels.compress.teacher.moments_cache import Form, Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head
from softprompt_kernels.ops import TeacherMoments, linear_kl_div, linear_kl_div_from_moments

DIVERGENCE_OF = {"kl": "forward", "reverse_kl": "reverse", "jsd": "jsd"}  # objective -> `divergence` of the op


class Summed(NamedTuple):
    """Sums over tokens: of the weighted losses, a scalar with a gradient, and of the weights."""

    loss: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Objective:
    """A training loss.

    Args:
        name: "kl", "reverse_kl", "jsd" or "nll"; with a function, any name of it.
        head: the model's head. With a group of ranks, all call `loss` with the same hidden states.
        nll_weight: λ, from 0 to 1; above 0 only with "kl".
        beta: weight of the teacher in the mixture of "jsd".
        temperature: T. Divides the logits of student and teacher; the divergence is multiplied by T².
        token_weights: "uniform", "entropy" or "student" (see `token_weights.py`).
        function: a loss of your own instead of those above (see `own_loss.py`).

    Raises:
        SoftPromptError: an unknown name, or a mixture that is not supported. A loss with labels needs a linear head,
            temperature 1 and the forward KL, and has no weights by the student.
    """

    name: str
    head: Head
    nll_weight: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0
    token_weights: TokenWeights = "uniform"
    function: LossFunction | None = None

    def __post_init__(self) -> None:
        if self.function is not None:
            self._check_own()
            return
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
        if self.token_weights == "student":
            raise SoftPromptError(
                f"token_weights: got student with {self.name} and nll_weight {self.label_weight}, accepted are uniform "
                "and entropy: an NLL does not say what the student has already"
            )

    def _check_own(self) -> None:
        for field, value, accepted in (("nll_weight", self.nll_weight, 0), ("loss_temperature", self.temperature, 1)):
            if value != accepted:
                raise SoftPromptError(
                    f"{field}: got {value} with a loss of your own, accepted is {accepted}: it is for your function"
                )

    @property
    def label_weight(self) -> float:
        """λ; 1 for "nll"."""
        return 1.0 if self.name == "nll" else self.nll_weight

    @property
    def form(self) -> Form | None:
        """What the loss needs from the teacher for each token; None for nothing."""
        by_entropy = self.token_weights == "entropy"
        if self.function is None and self.label_weight == 1:
            return "entropy" if by_entropy else None
        if self.function is None and self.name == "kl" and self.head.softcap is None:
            return "moments"
        return "hidden_entropy" if by_entropy else "hidden"

    def loss(self, hidden: Tensor, labels: Tensor, examples: Sequence[int], targets: Targets | None) -> Summed:
        """The loss in nats (times T²), summed over tokens by their weights, and the sum of the weights.

        Args:
            hidden: `[n, d]`: the student's hidden states, differentiable.
            labels: `[n]` int64: the tokens that follow.
            examples: the indices in `targets` of the examples that the rows belong to, in order.
            targets: the teacher's targets in this objective's `form`; None if the form is None.
        """
        losses = self.losses(hidden, labels, examples, targets)
        weights = self.weights(losses, examples, targets)
        if weights is None:
            return Summed(losses.sum(), losses.shape[0])
        return Summed(weighted(losses, weights).sum(), float(weights.sum()))

    def weights(self, losses: Tensor, examples: Sequence[int], targets: Targets | None) -> Tensor | None:
        """`[n]`: the weights of `losses [n]`, without a gradient; None if all are 1. Arguments as in `loss`."""
        if self.token_weights == "uniform":
            return None
        if self.token_weights == "entropy":
            assert targets is not None
            weights = entropy_weights(targets.entropy(examples, losses.device))
        else:
            weights = student_weights(losses, self.temperature)
        return weights.to(losses.dtype)

    def losses(self, hidden: Tensor, labels: Tensor, examples: Sequence[int], targets: Targets | None) -> Tensor:
        """`[n]`: the loss of each token, without its weight. Arguments as in `loss`."""
        head = self.head
        if self.form in ("hidden", "hidden_entropy"):
            assert targets is not None
            teacher = targets.hidden(examples, hidden.device)
            if self.function is not None:
                return call_own_loss(self.function, hidden, teacher, head, labels)
            return linear_kl_div(
                hidden,
                teacher,
                head.weight,
                bias=head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                divergence=DIVERGENCE_OF[self.name],
                beta=self.beta,
                temperature=self.temperature,
                reduction="none",
                group=head.group,
            )
        if targets is not None and self.form == "moments":
            moments = targets.moments(examples, hidden.device)
        else:
            moments = self._unused_moments(hidden)
        return linear_kl_div_from_moments(
            hidden,
            moments,
            head.weight,
            labels=labels if self.label_weight else None,
            label_weight=self.label_weight,
            bias=head.bias,
            logit_scale=head.logit_scale,
            temperature=self.temperature,
            reduction="none",
            group=head.group,
        )

    def _unused_moments(self, hidden: Tensor) -> TeacherMoments:
        """Zero moments of the right shapes, for label weight 1, which gives them weight 0."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        mean = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        bias_mean = None if self.head.bias is None else rows
        return TeacherMoments(mean, rows, bias_mean, self.temperature, self.head.logit_scale, None)


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """`losses · weights`, and 0 where a weight is 0: a loss that is infinite would make not-a-number there."""
    return torch.where(weights == 0, 0, losses * weights)
