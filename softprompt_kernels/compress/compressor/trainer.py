"""Trains a compressor over many contexts: AdamW on the summary tokens and, where it has any, on LoRA.

One step draws contexts, cuts each into segments at random, reads them all at once, draws some queries of each, runs
these behind the prompts that were read, and takes the gradient of

    loss = Σ_tokens weight(token) · loss(token) / Σ_tokens weight(token)      over all queries of the step

through the last `backprop_segments` segments: truncated backpropagation through time, with the segments as time. The
number of segments is drawn for a step, and their cuts for each of its contexts, so that a compressor does not depend on
where a text is cut. Teacher and student are the frozen model without LoRA.

The students see the prompts as leaves, in micro-batches, and autograd runs through the reading once at the end. All
draws depend on seed and step alone, so a resumed run gives the same bits as an unbroken one.

Memory of a step: the graph of `backprop_segments` segments of all its contexts. Without LoRA and with one segment, that
of the summary tokens alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.lessons import Lesson, all_targets
from softprompt_kernels.compress.compressor.segments import even_lengths, random_lengths
from softprompt_kernels.compress.distill.checkpoint import Checkpoint, Checkpoints
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import BETAS, Schedule, StepReport, recompute_activations
from softprompt_kernels.compress.sources.sequences import Batch, Example, total_targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prompted_hidden
from softprompt_kernels.prompts import Prefix


@dataclass(frozen=True)
class Draws:
    """What a step draws.

    Args:
        contexts: at most so many contexts.
        queries: at most so many queries of each.
        segments: at most so many segments of a context, or as many as it needs.
        backprop_segments: the gradient goes through the last so many.
        micro_batch_size: sequences that go through the student at once; None: all.
        seed: of all draws.
    """

    contexts: int
    queries: int
    segments: int
    backprop_segments: int
    micro_batch_size: int | None
    seed: int


class CompressorTrainer:
    """Trains a compressor in place.

    Args:
        compressor: of a prepared and frozen model.
        lessons: to learn from, with targets in the objective's form.
        objective: the loss.
        schedule: number of steps, and the learning rate of the summary tokens.
        draws: what a step draws.
        lora_learning_rate: peak learning rate of LoRA.
        weight_decay: as in AdamW.
        max_grad_norm: as in `clip_grad_norm_`; None: no clipping.
    """

    def __init__(
        self,
        compressor: Compressor,
        lessons: Sequence[Lesson],
        objective: Objective,
        schedule: Schedule,
        draws: Draws,
        *,
        lora_learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.compressor, self.model, self.lessons = compressor, compressor.model, lessons
        self.objective, self.schedule, self.draws = objective, schedule, draws
        self.targets, self.max_grad_norm = all_targets(lessons), max_grad_norm
        self.examples: list[Example] = []
        self.first: list[int] = []  # the number of each lesson's first example
        for lesson in lessons:
            self.first.append(len(self.examples))
            self.examples += lesson.examples
        self.named = compressor.named_parameters()
        self.rates = {
            name: 1.0 if name == "summary" else lora_learning_rate / schedule.learning_rate for name in self.named
        }
        groups = [{"params": [parameter], "name": name} for name, parameter in self.named.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=BETAS, weight_decay=weight_decay)
        self.step = self.saved_step = 0
        self.consistent = True  # False while an update is under way
        self.best: dict[str, Tensor] = {}
        self.best_kl, self.best_step, self.judged_step = math.inf, 0, 0

    def train_step(self) -> StepReport:
        """One update.

        Raises:
            SoftPromptError: loss or gradient is not finite. Nothing is changed.
        """
        begin = time.perf_counter()
        loss, tokens = self.accumulate()
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm or math.inf)
        rate = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.rates[group["name"]]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SoftPromptError(
                f"learning_rate: at step {self.step + 1} the loss is {loss:.3g} and the gradient norm "
                f"{float(norm):.3g}; try a smaller learning rate, or a smaller lora_learning_rate"
            )
        self.consistent = False
        self.optimizer.step()
        self.step += 1
        self.consistent = True
        return StepReport(self.step, loss, float(norm), rate, tokens, time.perf_counter() - begin)

    def accumulate(self) -> tuple[float, int]:
        """Compute the gradient of the next step: that of the mean loss over its tokens, by their weights.

        Returns:
            The mean loss, and the number of tokens.
        """
        self.optimizer.zero_grad(set_to_none=True)
        draw = random.Random(f"{self.draws.seed} {self.step}")
        chosen = self._contexts_at(self.step)
        contexts = [self.lessons[index].ids for index in chosen]
        lengths = self._segments(contexts, draw)
        asked: list[tuple[int, int]] = []
        for row, index in enumerate(chosen):
            count = len(self.lessons[index].examples)
            numbers = sorted(draw.sample(range(count), min(self.draws.queries, count)))
            asked += ((row, self.first[index] + number) for number in numbers)
        with recompute_activations(self.model):
            with self.compressor.reading():
                read = self.compressor.read(contexts, lengths, self.draws.backprop_segments)
            leaves = Prefix.of((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in read.layers)
            loss, weight, tokens = self._students(leaves, asked)
            outputs = [tensor for pair in read.layers for tensor in pair]
            gradients = [tensor.grad for pair in leaves.layers for tensor in pair]
            found = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
            scale = tokens / weight if weight else 1.0
            with self.compressor.reading():
                torch.autograd.backward([o for o, _ in found], [g * scale if scale != 1 else g for _, g in found])
        return loss * scale, tokens

    def _students(self, leaves: Prefix, asked: Sequence[tuple[int, int]]) -> tuple[float, float, int]:
        """Mean loss over the tokens without their weights' sum, that sum, and the number of tokens.

        Args:
            leaves: R prompts, which get the gradient.
            asked: for each sequence its prompt, and the number of its example.
        """
        tokens = total_targets(self.examples[number] for _, number in asked)
        size = self.draws.micro_batch_size or len(asked)
        total = weight = 0.0
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            batch = Batch.of([self.examples[number] for _, number in part], self.model.device)
            hidden = prompted_hidden(
                self.model,
                batch.input_ids,
                leaves,
                attention_mask=batch.attention_mask,
                prompt_index=torch.tensor([row for row, _ in part]),
            )
            rows = hidden.flatten(0, 1).index_select(0, batch.target_rows)
            summed = self.objective.loss(rows, batch.labels, [number for _, number in part], self.targets)
            loss = summed.loss / tokens
            loss.backward()
            total, weight = total + float(loss.detach()), weight + summed.weight
        return total, weight, tokens

    def _segments(self, contexts: Sequence[Tensor], draw: random.Random) -> list[list[int]]:
        """The lengths of the segments of each context. All have equally many."""
        longest, sizes = self.compressor.form.segment_tokens, [context.shape[0] for context in contexts]
        least = max(len(even_lengths(size, longest)) for size in sizes)
        count = draw.randint(least, max(least, min(self.draws.segments, *sizes)))
        return [random_lengths(size, longest, count, draw) for size in sizes]

    def _contexts_at(self, step: int) -> list[int]:
        """The lessons of a step. Shuffled epochs follow each other and are cut into batches."""
        count = len(self.lessons)
        size = min(self.draws.contexts, count)
        order: list[int] = []
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            generator = torch.Generator().manual_seed(self.draws.seed * 1_000_003 + epoch)
            order += torch.randperm(count, generator=generator, device="cpu").tolist()
        start = step * size % count
        return order[start : start + size]

    def judged(self, kl: float) -> None:
        """Keep the present state if its KL on held-out contexts is the lowest so far."""
        self.judged_step = self.step
        if kl < self.best_kl:
            self.best_kl, self.best_step = kl, self.step
            self.best = {name: parameter.detach().clone() for name, parameter in self.named.items()}

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the state of the lowest KL in place of the last one."""
        for name, tensor in self.best.items():
            self.named[name].copy_(tensor)

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of what is trained, the optimiser, the step and the best state.

        Nothing is written if an update was interrupted in the middle: the previous checkpoint is the last good state.

        Args:
            checkpoints: of the run.

        Raises:
            OSError: it cannot be written. The previous checkpoint is as it was.
        """
        if not self.consistent:
            return
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.named.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.named.items():
            tensors |= {f"optimizer.{kind}.{name}": value for kind, value in self.optimizer.state[parameter].items()}
        steps = {"best_step": str(self.best_step), "judged_step": str(self.judged_step)}
        notes = {"best_kl": repr(self.best_kl), **steps}
        checkpoints.write(Checkpoint(self.step, tensors, notes))
        self.saved_step = self.step

    @torch.no_grad()
    def load(self, checkpoints: Checkpoints) -> bool:
        """Resume from the newest checkpoint; False if there is none.

        Raises:
            SoftPromptError: it is damaged, or belongs to another run.
        """
        found = checkpoints.read()
        if found is None:
            return False
        for name, parameter in self.named.items():
            parameter.copy_(found.tensors[f"parameter.{name}"])
            state = {
                kind: found.tensors[key]
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if (key := f"optimizer.{kind}.{name}") in found.tensors
            }
            self.optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device) for kind, value in state.items()
            }
        self.best = {
            name: found.tensors[key].to(parameter.device)
            for name, parameter in self.named.items()
            if (key := f"best.{name}") in found.tensors
        }
        self.best_kl = float(found.notes["best_kl"])
        self.best_step, self.judged_step = int(found.notes["best_step"]), int(found.notes["judged_step"])
        self.step = self.saved_step = found.step
        return True
