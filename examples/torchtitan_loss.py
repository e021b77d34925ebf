"""torchtitan's trainer, distilling a teacher, with the loss from hidden states.

torchtitan calls `loss, metrics = loss_fn(pred, labels, global_valid_tokens, **inputs)` with shifted labels, and wants
the sum over the tokens divided by `global_valid_tokens`. A model with `_skip_lm_head` gives hidden states as `pred`.
The trainer sets that, and hands over the head, if the loss is a `ChunkedLossWrapper`:

    class Loss(DistillationLoss, ChunkedLossWrapper):
        @dataclass(kw_only=True, slots=True)
        class Config(ChunkedLossWrapper.Config):
            pass

        def __init__(self, config, *, compile_config=None):
            super().__init__()

    trainer.loss_fn.watch(trainer.model_parts[0], teacher)    # once both models are made

The teacher reads what the student reads, by a hook before the student's forward. Both heads must be linear, without a
bias, a softcap or a scale behind them. Not for pipeline, tensor or context parallelism. Under FSDP2 the gradient of the
head is summed over the ranks, as torchtitan's trainer sums all gradients.

    python examples/torchtitan_loss.py STUDENT TEACHER     trains a few steps in the trainer's order of calls
"""

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_kernels import LinearKLDivLoss
from softprompt_kernels.models import head_of


class DistillationLoss:
    """KL(teacher‖student) in the signature of torchtitan's losses."""

    def __init__(self) -> None:
        self.loss = LinearKLDivLoss(reduction="sum", ignore_index=-100)
        self.lm_head: nn.Module | None = None
        self.teacher: Any = None
        self.teacher_hidden: Tensor | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The trainer calls it with the student's head."""
        _check(lm_head)
        self.lm_head = lm_head

    def watch(self, student: nn.Module, teacher: Any) -> None:
        """From now on, `teacher` reads each input of `student` before the student does."""
        _check(teacher.lm_head)
        self.teacher = teacher.eval().requires_grad_(False)
        teacher._skip_lm_head = True
        student.register_forward_pre_hook(self._ask_teacher, with_kwargs=True)

    def _ask_teacher(self, student: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        with torch.no_grad():
            self.teacher_hidden = self.teacher(*arguments, **options)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`pred [B, L, d]`, `labels [B, L]`: the loss, and no metrics."""
        if self.lm_head is None or self.teacher_hidden is None:
            raise ValueError("set_lm_head and watch must be called before the first step")
        hidden, self.teacher_hidden = self.teacher_hidden, None
        loss = self.loss(pred, _whole(self.lm_head), hidden, _whole(self.teacher.lm_head), labels)
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


def _check(head: nn.Module) -> None:
    """Raise unless `head` is linear and has no parameter but its weight: no bias, no adapter."""
    names = [name for name, _ in head.named_parameters()]
    if not isinstance(head, nn.Linear) or names != ["weight"] or head.weight.dim() != 2:
        raise ValueError(
            f"lm_head: got a {type(head).__name__} with parameters {names}, accepted is nn.Linear with a weight "
            "[V, d] alone"
        )


def _whole(head: nn.Module) -> Tensor:
    """The weight of a head; under FSDP2, gathered, and its gradient is summed over the ranks and scattered again."""
    weight = cast(Tensor, head.weight)
    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return weight


class Decoder(nn.Module):
    """A transformers model with the two names that torchtitan's models have: `lm_head` and `_skip_lm_head`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head, self.lm_head = head_of(model), cast(nn.Module, model.get_output_embeddings())
        if (head.softcap, head.logit_scale) != (None, 1.0):
            raise ValueError(
                f"model: its logits have softcap {head.softcap} and scale {head.logit_scale}, accepted is neither"
            )
        self.model, self._skip_lm_head = cast(nn.Module, model.get_decoder()), False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(tokens, use_cache=False).last_hidden_state
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def main(student: str | Path, teacher: str | Path, steps: int = 5) -> list[float]:
    """The losses of some steps on random tokens, called as torchtitan's trainer does, in 2 micro-batches a step."""
    model, teacher_model = (Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (student, teacher))
    loss_fn = DistillationLoss()
    loss_fn.set_lm_head(model.lm_head)
    loss_fn.watch(model, teacher_model)
    model._skip_lm_head = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, _whole(model.lm_head).shape[0], (4, 33), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[0, :9] = -100
    losses = []
    for _ in range(steps):
        valid, total = (labels != -100).sum(), 0.0
        for half in (slice(0, 2), slice(2, 4)):
            loss, _ = loss_fn(model(tokens[half, :-1]), labels[half], valid)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A few steps of distillation in the order of torchtitan's trainer.")
    for name in ("student", "teacher"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    print(*main(given.student, given.teacher), sep="\n")
