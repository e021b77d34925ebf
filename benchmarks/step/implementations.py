"""The implementations of a training step. Each has `step() -> loss` and `gradient()`, the one that the last step used.

| | `CachedMoments` | `TransformersPeft` |
|---|---|---|
| teacher | read from disk: d + 1 floats a token | forward over context + query + output, each step |
| student | hidden states behind a shared prompt | PEFT's CARTRIDGE: keys and values of the prompt for each sequence |
| head | fused with the loss, on the rows that predict the output | logits of all tokens, `F.log_softmax`, `F.kl_div` |

`ComposedMoments` is `CachedMoments` without native kernels. `TransformersPeft` is the baseline: a step as the
documentation of both packages leads to. Where there is a choice, it gets the faster one: inputs are padded once and not
in each step, the teacher keeps no cache, and of the teacher's logits only the needed rows outlive its forward.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.step.problem import FROZEN_TOKENS, Problem
from softprompt_kernels.compress import load_model
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import BETAS, Schedule, Trainer
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import KVPrompt
from softprompt_kernels.prompts.layout import flatten

LEARNING_RATE = 2e-2
# Far more steps than are measured, so that the learning rate hardly falls.
SCHEDULE = Schedule(steps=10_000, learning_rate=LEARNING_RATE)


class StepImplementation(Protocol):
    """An implementation of a training step."""

    def step(self) -> float:
        """Updates the prompt once; returns the loss before the update, in nats per token."""

    def gradient(self) -> Tensor:
        """The prompt's gradient in the last step, `[k − frozen, L·2·Hkv·D]`."""


class CachedMoments:
    """Ours: `Trainer.train_step` of this package, with a KV prompt."""

    def __init__(self, problem: Problem, model: PreTrainedModel) -> None:
        head = head_of(model)
        self.prompt = KVPrompt(*problem.start(), frozen_tokens=FROZEN_TOKENS)
        self.trainer = Trainer(
            model,
            self.prompt,
            problem.examples,
            problem.moments(head.logit_scale),
            Objective("kl", head),
            SCHEDULE,
            batch_size=len(problem.examples),
            micro_batch_size=problem.micro_batch_size,
        )

    @staticmethod
    def load(name: str) -> PreTrainedModel:
        return load_model(name, "float32", "cpu")[0]

    def step(self) -> float:
        return self.trainer.train_step().loss

    def gradient(self) -> Tensor:
        key, value = self.prompt.key.grad, self.prompt.value.grad
        assert key is not None and value is not None
        return flatten(key, value)


class ComposedMoments(CachedMoments):
    """The same on the backend `composed`: no kernel of this package's own."""

    def step(self) -> float:
        with patch.dict(os.environ, SOFTPROMPT_BACKEND="composed"):
            return super().step()


class TransformersPeft:
    """The baseline: transformers and PEFT, as their documentation leads to."""

    def __init__(self, problem: Problem, model: PreTrainedModel) -> None:
        from peft import CartridgeConfig, get_peft_model

        config = CartridgeConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=problem.tokens, num_frozen_tokens=FROZEN_TOKENS
        )
        self.teacher, self.student = model, get_peft_model(model, config)
        encoder = cast(Any, self.student).prompt_encoder["default"]
        encoder.load_prompt_embeddings(flatten(*problem.start()))
        self.parameter = cast(Tensor, encoder.trainable_embedding)
        self.optimizer = torch.optim.AdamW([self.parameter], lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
        sequences = [(*example.input_ids, *example.output_ids) for example in problem.examples]
        outputs = [example.targets for example in problem.examples]
        self.student_inputs = _padded(sequences, outputs)
        self.teacher_inputs = _padded([(*problem.context_ids, *sequence) for sequence in sequences], outputs)

    @staticmethod
    def load(name: str) -> PreTrainedModel:
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
        return model.eval().requires_grad_(False)

    def step(self) -> float:
        self.optimizer.zero_grad()
        ids, mask, rows = self.teacher_inputs
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[rows]
        ids, mask, rows = self.student_inputs
        student = self.student(input_ids=ids, attention_mask=mask).logits[rows]
        loss = F.kl_div(
            F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), log_target=True, reduction="batchmean"
        )
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad


def _padded(
    sequences: Sequence[tuple[int, ...]], outputs: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Ids and mask `[B, T]`, right-padded, and `(sequence, position)` of the rows that predict the outputs."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for index, (sequence, targets) in enumerate(zip(sequences, outputs, strict=True)):
        ids[index, : len(sequence)] = torch.tensor(sequence)
        mask[index, : len(sequence)] = 1
        predicts[index, len(sequence) - targets - 1 : len(sequence) - 1] = True
    row, position = predicts.nonzero(as_tuple=True)
    return ids, mask, (row, position)


IMPLEMENTATIONS: dict[str, type[CachedMoments] | type[TransformersPeft]] = {
    "cached moments": CachedMoments,
    "cached moments, composed": ComposedMoments,
    "transformers + PEFT": TransformersPeft,
}
"""All implementations by name: ours is the first, the baseline the last."""
