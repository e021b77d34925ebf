"""The trainer: AdamW on the soft prompt σ. Everything else is frozen.

One step draws a batch, computes the prompt's prefix, runs the batch behind the prefix in micro-batches, accumulates the
gradient of

    loss = Σ_tokens weight(token) · loss(token) / Σ_tokens weight(token)      over the whole batch

and updates σ at the learning rate of the schedule. The weights are 1 unless the objective has others. Neither
micro-batches nor padding change the scale of this loss.

The micro-batches see the prefix as a leaf, and autograd runs through the prefix once at the end of the step. So an
embedding prompt costs one pass through the model a step. The order of examples depends on seed and epoch only, the
choice between answers of teacher and student (`on_policy.py`) on seed and step, and nothing else is random: a resumed
run gives the same bits as an uninterrupted one.

Of many ranks each takes a share of the batch. They exchange two numbers and the gradient of σ once a step: 4 bytes for
each trained number. Batch and loss are those of one process, because the sums are divided by the tokens or weights of
the whole batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt_kernels.compress.distill.checkpoint import Checkpoint, Checkpoints
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.relative_adamw import RelativeAdamW
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.sources.sequences import Batch, Example, total_targets
from softprompt_kernels.compress.teacher.moments_cache import Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix

Prompt = KVPrompt | EmbeddingPrompt
BETAS = (0.9, 0.95)  # runs are short: with AdamW's 0.999 the first gradients would count until the end


@dataclass(frozen=True)
class Schedule:
    """Number of steps, and the learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `steps`."""

    steps: int
    learning_rate: float
    warmup_steps: int = 0

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepReport:
    """One step: its number from 1, mean loss per token, gradient norm before clipping, learning rate, tokens in the
    loss, seconds."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float


class Diverged(SoftPromptError):
    """Training cannot go on: a loss, a gradient, the prompt or its optimiser is not finite."""


class Trainer:
    """Trains one prompt.

    Args:
        model: prepared and frozen.
        prompt: trained in place.
        examples: the training set.
        targets: the teacher's targets of these examples, in the objective's form; None if it needs none.
        objective: the loss.
        schedule: number of steps and learning rate.
        batch_size: examples a step, cut to the size of the training set.
        micro_batch_size: examples that go through the model at once; None: the whole batch. It changes memory and time,
            not the gradient.
        weight_decay: as in AdamW.
        max_grad_norm: as in `clip_grad_norm_`; None: no clipping.
        seed: of the order of examples.
        relative: whether the learning rate of a KV prompt counts in standard deviations of each head's keys and values
            (see `RelativeAdamW`). Embedding prompts always have absolute rates.

    Raises:
        SoftPromptError: all tokens of the prompt are frozen.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        examples: Sequence[Example],
        targets: Targets | None,
        objective: Objective,
        schedule: Schedule,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        seed: int = 0,
        relative: bool = True,
    ) -> None:
        self.model, self.prompt, self.examples = model, prompt, examples
        self.targets, self.objective, self.schedule = targets, objective, schedule
        self.queries, self.student_share = len(examples), 0.0
        self.teacher_examples, self.teacher_targets = examples, targets
        self.batch_size = min(batch_size, self.queries)
        self.micro_batch_size = micro_batch_size or self.batch_size
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [p for p in prompt.parameters() if p.numel()]
        if not self.parameters:
            raise SoftPromptError("frozen_tokens: got all tokens of the prompt, accepted is fewer: none would train")
        adamw = RelativeAdamW if relative and isinstance(prompt, KVPrompt) else torch.optim.AdamW
        self.optimizer = adamw(self.parameters, lr=schedule.learning_rate, betas=BETAS, weight_decay=weight_decay)
        self.step = 0
        self.report: StepReport | None = None  # of the last step
        self.consistent = True  # False while an update of σ is under way, and after one that went wrong
        self.saved_step: int | None = None  # the step of the last checkpoint
        self.saved_notes: dict[str, str] = {}  # and its notes

    def take(self, examples: Sequence[Example], targets: Targets | None, share: float) -> None:
        """From now on, train on other answers to the same queries too, in place of those that were taken before.

        Args:
            examples: one for each training example, in the same order.
            targets: of these examples, in the objective's form; None if it needs none.
            share: probability that a query that is drawn has the answer from here, 0 to 1.
        """
        self.examples, self.student_share = [*self.teacher_examples, *examples], share
        if targets is not None and self.teacher_targets is not None:
            self.targets = self.teacher_targets.joined(targets, self.queries)

    def run(self, after_step: Callable[[StepReport], bool | None], until: int | None = None) -> None:
        """Train from the current step to `until` (None: the last), or until `after_step`, which is called after each
        update of σ, returns True."""
        while self.step < (self.schedule.steps if until is None else until):
            if after_step(self.train_step()):
                return

    def train_step(self) -> StepReport:
        """One update of σ.

        Raises:
            Diverged: loss or gradient is not finite, and σ is not changed. Or σ is not finite after the update, and is
                no longer saved.
        """
        begin = time.perf_counter()
        chosen = self.batch_at(self.step)
        loss = self.accumulate(chosen)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        rate = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"learning_rate: at step {self.step + 1} the loss is {loss:.3g} and the gradient norm "
                f"{float(norm):.3g}; try a smaller learning rate"
                + ", or look at your own loss" * (self.objective.function is not None)
                + (", or dtype bfloat16 or float32 in place of float16" * (self.model.dtype == torch.float16))
            )
        self.consistent = False
        self.optimizer.step()
        if not self._finite():
            raise Diverged(
                f"learning_rate: the update of step {self.step + 1} made the prompt or its optimiser infinite or NaN, "
                f"after a loss of {loss:.3g} and a gradient norm of {float(norm):.3g}; try a smaller learning rate"
            )
        tokens = total_targets([self.examples[i] for i in chosen])
        report = StepReport(self.step + 1, loss, float(norm), rate, tokens, time.perf_counter() - begin)
        self.step, self.report = report.step, report
        self.consistent = True
        return report

    def _finite(self) -> bool:
        """Whether σ and the moments of the optimiser are finite. A second moment that overflows would freeze σ."""
        state = (value for parameter in self.parameters for value in self.optimizer.state[parameter].values())
        tensors = [*self.parameters, *(value for value in state if value.device == self.parameters[0].device)]
        return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())

    def accumulate(self, chosen: Sequence[int]) -> float:
        """Compute the gradient of σ for a batch: that of the mean loss over its tokens, by their weights.

        Args:
            chosen: the indices of the examples in the batch.

        Returns:
            The mean loss.
        """
        self.optimizer.zero_grad(set_to_none=True)
        prefix = prefix_of(self.model, self.prompt)
        leaves = Prefix.of((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prefix.layers)
        tokens = total_targets([self.examples[i] for i in chosen])
        total = weight = 0.0
        own = [chosen[i] for i in ranks.share([self.examples[i].length for i in chosen])]
        with recompute_activations(self.model):
            for start in range(0, len(own), self.micro_batch_size):
                part = own[start : start + self.micro_batch_size]
                batch = Batch.of([self.examples[i] for i in part], self.model.device)
                hidden = batch.hidden(self.model, leaves)
                summed = self.objective.loss(hidden, batch.labels, part, self.targets)
                loss = summed.loss / tokens
                loss.backward()
                total, weight = total + float(loss.detach()), weight + summed.weight
        outputs, gradients = tensors_and_gradients(prefix, leaves)
        total, weight = ranks.sum_of(total, weight)
        if weight not in (0, tokens):  # the sum of all weights is known only now
            gradients = [gradient * (tokens / weight) for gradient in gradients]
        if outputs:
            torch.autograd.backward(outputs, gradients)
        ranks.sum_([_gradient(parameter) for parameter in self.parameters])
        return total * (tokens / weight) if weight else total

    def batch_at(self, step: int) -> list[int]:
        """The indices of the examples of a step. Shuffled epochs follow each other and are cut into batches.

        Those of the student's answers, if any were taken, follow on those of the teacher's.
        """
        size, count = self.batch_size, self.queries
        order: list[int] = []
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order += torch.randperm(count, generator=generator, device="cpu").tolist()
        start = step * size % count
        chosen = order[start : start + size]
        if not self.student_share:
            return chosen
        generator = torch.Generator().manual_seed(2**60 + self.seed * 1_000_003 + step)
        own = torch.rand(size, generator=generator, device="cpu") < self.student_share
        return [index + count * taken for index, taken in zip(chosen, own.tolist(), strict=True)]

    def save(self, checkpoints: Checkpoints, notes: Mapping[str, str] | None = None) -> None:
        """Write a checkpoint of σ, the optimiser and the step.

        Nothing is written if an update of σ was interrupted in the middle: the previous checkpoint is the last good
        state. Nor is it if the last checkpoint is of this step and has these notes.

        Args:
            checkpoints: of the run.
            notes: what else a resumed run needs to know.

        Raises:
            OSError: it cannot be written. The previous checkpoint is as it was.
        """
        notes = dict(notes or {})
        if not self.consistent or (self.saved_step, self.saved_notes) == (self.step, notes):
            return
        if not ranks.is_first():  # it is the same on all
            self.saved_step = self.step
            return
        tensors = {f"prompt.{name}": tensor for name, tensor in self.prompt.state_dict().items() if tensor.numel()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{name}"] = value
        checkpoints.write(Checkpoint(self.step, tensors, notes))
        self.saved_step, self.saved_notes = self.step, notes

    def load(self, checkpoints: Checkpoints) -> dict[str, str] | None:
        """Resume from the newest checkpoint, if there is one.

        Returns:
            The notes that were saved with it; None if there is no checkpoint.

        Raises:
            SoftPromptError: it is damaged, as are those before it, or it belongs to another run.
        """
        found = checkpoints.read()
        if found is None:
            return None
        state = self.prompt.state_dict()
        state.update({k.removeprefix("prompt."): v for k, v in found.tensors.items() if k.startswith("prompt.")})
        self.prompt.load_state_dict(state)
        for index, parameter in enumerate(self.parameters):
            prefix = f"optimizer.{index}."
            saved = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in saved.items()
            }
        self.step = self.saved_step = found.step
        self.saved_notes = found.notes
        return found.notes


@contextmanager
def recompute_activations(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, layers for which gradient checkpointing is enabled recompute their activations.

    transformers checkpoints a layer only in training mode. Here only the layer's own flag is set. With `model.train()`
    dropout would make the loss random, and the teacher's sampling would run without a cache.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    chosen = [layer for layer in layers if layer.gradient_checkpointing and not layer.training]
    for layer in chosen:
        layer.training = True
    try:
        yield
    finally:
        for layer in chosen:
            layer.training = False


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter: zeros on a rank without a share of the batch."""
    if parameter.grad is None and ranks.world() > 1:
        parameter.grad = torch.zeros_like(parameter)
    assert parameter.grad is not None
    return parameter.grad


def tensors_and_gradients(prefix: Prefix, leaves: Prefix) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the prefix that have a graph, and for each the gradient accumulated in its leaf."""
    outputs, gradients = [], []
    for pair, leaf_pair in zip(prefix.layers, leaves.layers, strict=True):
        for tensor, leaf in zip(pair, leaf_pair, strict=True):
            if tensor.requires_grad and leaf.grad is not None:
                outputs.append(tensor)
                gradients.append(leaf.grad)
    return outputs, gradients
