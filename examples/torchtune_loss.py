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

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_kernels import LinearKLDivLoss, kl_div


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
            student_logits, teacher_logits, parts = [student_logits], [teacher_logits], [counted]
        else:
            parts = counted.split([chunk.shape[1] for chunk in student_logits], dim=1)
        total = sum(
            kl_div(student, teacher, weights=part, reduction="sum")
            for student, teacher, part in zip(student_logits, teacher_logits, parts, strict=True)
        )
        return total / counted.sum().clamp(min=1) if normalize else total


class LinearForwardKLLoss(nn.Module):
    """Takes the hidden states of both models, `[B, L, d]`, and labels `[B, L]`. The logits never exist all at once."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.loss = LinearKLDivLoss(ignore_index=ignore_index)
        self.ignore_index = ignore_index
        self.heads: tuple[nn.Module, nn.Module] = ()  # type: ignore[assignment]

    def set_model_output(self, model: nn.Module, teacher: nn.Module) -> None:
        """Both models return hidden states from now on, and their output layers are read here."""
        for one in (model, teacher):
            one.skip_output_layer = True
        self.heads = (model.output, teacher.output)  # a tuple, so they are no submodules of the loss

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        if not self.heads:
            raise ValueError("set_model_output must be called with both models before the loss")
        student, teacher = (getattr(head, "tied_module", head).weight for head in self.heads)  # torchtune's TiedLinear
        return self.loss(student_hidden, student, teacher_hidden, teacher, labels)


class Decoder(nn.Module):
    """A transformers model with the two names that torchtune's models have: `output` and `skip_output_layer`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.output, self.skip_output_layer = model.get_decoder(), model.lm_head, False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(tokens, use_cache=False).last_hidden_state
        return hidden if self.skip_output_layer else self.output(hidden)


def main(student: str | Path, teacher: str | Path, steps: int = 5, hidden: bool = True) -> list[float]:
    """The losses of some steps on random tokens, called as in torchtune's recipe."""
    model, teacher_model = (Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (student, teacher))
    loss_fn = LinearForwardKLLoss() if hidden else ForwardKLLoss()
    if hidden:
        loss_fn.set_model_output(model, teacher_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, model.output.weight.shape[0], (4, 32), generator=torch.Generator().manual_seed(0))
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
