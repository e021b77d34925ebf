"""torchtune's distillation recipes with our losses.

For the recipes as they are, in the YAML file (torchtune's own class is in the comment):

    kd_loss:
      _component_: torchtune_loss.ForwardKLLoss      # torchtune.modules.loss.ForwardKLLoss

From hidden states, with a torchtune whose models have `skip_output_layer`, and its LinearCrossEntropyLoss as `loss`:

    kd_loss:
      _component_: torchtune_loss.LinearForwardKLLoss

    self._kd_loss_fn.set_model_output(self._model, self._teacher_model)    # in `setup`, after the models are made

The values are KL divergences. torchtune's is a cross-entropy: larger by the teacher's entropy, with the same gradient.

    python examples/torchtune_loss.py STUDENT TEACHER     trains a few steps in the recipe's order of calls
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_kernels import LinearKLDivLoss, kl_div
from softprompt_kernels.models import head_of


class ForwardKLLoss(nn.Module):
    """Takes logits: `[N, V]` with labels `[N]`, or the chunks `[B, L_i, V]` of a model with labels `[B, L]`."""

    def __init__(self, ignore_index: int = -100, num_output_chunks: int = 8) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.num_output_chunks = num_output_chunks  # the recipe compares it with that of the cross-entropy

    def forward(
        self,
        student_logits: Tensor | Sequence[Tensor],
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        counted = labels != self.ignore_index
        if isinstance(student_logits, Tensor):
            total = kl_div(student_logits, torch.as_tensor(teacher_logits), weights=counted, reduction="sum")
        else:
            parts = counted.split([chunk.shape[1] for chunk in student_logits], dim=1)
            chunks = zip(student_logits, teacher_logits, parts, strict=True)
            total = torch.stack([kl_div(s, t, weights=part, reduction="sum") for s, t, part in chunks]).sum()
        return total / counted.sum().clamp(min=1) if normalize else total


class LinearForwardKLLoss(nn.Module):
    """Takes the hidden states of both models, `[B, L, d]`, and labels `[B, L]`. The logits never exist all at once.

    The output layers of both must be linear and without a bias. What a model does with their logits is not seen here:
    `softcap` and `logit_scale` must say it, and are for both models.
    """

    def __init__(self, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.loss = LinearKLDivLoss(ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale)
        self.ignore_index = ignore_index
        self.heads: tuple[Any, ...] = ()  # a tuple, so they are no submodules of the loss

    def set_model_output(self, model: Any, teacher: Any) -> None:
        """Both models return hidden states from now on, and their output layers are read here."""
        for one in (model, teacher):
            output_weight(one.output)  # refuses what cannot be served before the first step
        for one in (model, teacher):
            one.skip_output_layer = True
        self.heads = (model.output, teacher.output)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        if not self.heads:
            raise ValueError("set_model_output must be called with both models before the loss")
        student, teacher = (_whole(output_weight(head)) for head in self.heads)
        loss: Tensor = self.loss(student_hidden, student, teacher_hidden, teacher, labels)
        return loss


def output_weight(head: Any) -> Tensor:
    """The weight `[V, d]` of an output layer that has no other parameter: nn.Linear, or torchtune's TiedLinear."""
    tied = getattr(head, "tied_module", None)  # TiedLinear reads its weight alone
    names = [] if tied is not None else [name for name, _ in head.named_parameters()]
    if tied is None and not (isinstance(head, nn.Linear) and names == ["weight"]):
        raise ValueError(
            f"output: got a {type(head).__name__} with parameters {names}, accepted are nn.Linear with a weight alone "
            "and TiedLinear: use ForwardKLLoss, which takes logits"
        )
    weight: Tensor = (head if tied is None else tied).weight
    if type(weight) not in (Tensor, nn.Parameter, DTensor):
        raise ValueError(
            f"output: got a weight of type {type(weight).__name__}, accepted is an ordinary tensor or the shards of "
            "FSDP2, not quantised: use ForwardKLLoss, which takes logits"
        )
    return weight


def _whole(weight: Tensor) -> Tensor:
    """The weight itself; under FSDP2, gathered. Its gradient is the mean over the ranks, as FSDP2 takes it."""
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


class Decoder(nn.Module):
    """A transformers model with the two names that torchtune's models have: `output` and `skip_output_layer`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head, self.output = head_of(model), cast(nn.Module, model.get_output_embeddings())
        if (head.softcap, head.logit_scale) != (None, 1.0):
            raise ValueError(
                f"model: its logits have softcap {head.softcap} and scale {head.logit_scale}, accepted is neither"
            )
        self.model, self.skip_output_layer = cast(nn.Module, model.get_decoder()), False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(tokens, use_cache=False).last_hidden_state
        return hidden if self.skip_output_layer else self.output(hidden)


def main(student: str | Path, teacher: str | Path, steps: int = 5, hidden: bool = True) -> list[float]:
    """The losses of some steps on random tokens, called as in torchtune's recipe."""
    model, teacher_model = (Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (student, teacher))
    loss_fn: Any = LinearForwardKLLoss() if hidden else ForwardKLLoss()
    if hidden:
        loss_fn.set_model_output(model, teacher_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, output_weight(model.output).shape[0], (4, 32), generator=torch.Generator().manual_seed(0))
    ignored = torch.full((4, 1), loss_fn.ignore_index)
    labels = torch.hstack([tokens[:, 1:], ignored])  # shifted, as the recipe does it
    losses = []
    for _ in range(steps):
        outputs = model(tokens)
        with torch.no_grad():
            teacher_outputs = teacher_model(tokens)
        if not hidden:
            outputs, teacher_outputs, labels = outputs.flatten(0, 1), teacher_outputs.flatten(0, 1), labels.reshape(-1)
        loss = loss_fn(outputs, teacher_outputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A few steps of distillation in the order of torchtune's recipe.")
    for name in ("student", "teacher"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    print(*main(given.student, given.teacher), sep="\n")
