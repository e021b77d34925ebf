"""The trainer: AdamW on σ, everything else frozen.

A step: draw a batch, run the prompt's prefix once, run the batch behind it in micro-batches, add up the gradient of

    loss = Σ_tokens loss(token) / number of tokens in the whole batch

so that neither micro-batches nor padding change its scale, and update σ at the cosine's learning rate.

The prefix is a leaf for the micro-batches and is differentiated once at the end: an embedding prompt pays its pass
through the model once a step. The order of examples is a function of seed and epoch, and nothing else is random, so
a run that was interrupted goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.sources.sequences import Batch, Example, total_targets
from softprompt_kernels.compress.teacher.moments_cache import Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix

Prompt = KVPrompt | EmbeddingPrompt
BETAS = (0.9, 0.95)  # few steps: a long second moment would remember the start for the whole run


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `steps`."""

    steps: int
    learning_rate: float
    warmup_steps: int = 0

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepReport:
    """What one step did: loss per token, norm of the gradient, learning rate, tokens in the loss, seconds."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float


class Trainer:
    """Trains one prompt on examples with their targets.

    Args:
        model: prepared and frozen.
        prompt: its parameters are trained in place.
        examples: the training set.
        targets: of these examples, in the objective's form.
        objective: what is minimised.
        schedule: how long and how fast.
        batch_size: examples a step; at most all of them.
        micro_batch_size: examples that go through the model at once, None: all of the batch. Memory only.
        weight_decay, max_grad_norm: as in AdamW and gradient clipping; None: no clipping.
        seed: of the order of examples.
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
    ) -> None:
        self.model, self.prompt, self.examples = model, prompt, examples
        self.targets, self.objective, self.schedule = targets, objective, schedule
        self.batch_size = min(batch_size, len(examples))
        self.micro_batch_size = micro_batch_size or self.batch_size
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [p for p in prompt.parameters() if p.numel()]
        if not self.parameters:
            raise SoftPromptError("frozen_tokens: got all tokens of the prompt, accepted is fewer: nothing is trained")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.learning_rate, betas=BETAS, weight_decay=weight_decay
        )
        self.step = 0
        self.whole = True  # False while σ is being updated
        self.saved = 0  # the step of the last checkpoint

    def run(self, after_step: Callable[[StepReport], None]) -> None:
        """Train from the current step to the last; `after_step` is told of each once σ has been updated."""
        while self.step < self.schedule.steps:
            after_step(self.train_step())

    def train_step(self) -> StepReport:
        """One update of σ."""
        begin = time.perf_counter()
        chosen = self.batch_at(self.step)
        loss = self.accumulate(chosen)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        rate = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SoftPromptError(
                f"learning_rate: at step {self.step + 1} the loss is {loss:.3g}, the norm of its gradient "
                f"{float(norm):.3g}; try a smaller one"
            )
        self.whole = False
        self.optimizer.step()
        self.step += 1
        self.whole = True
        tokens = total_targets([self.examples[i] for i in chosen])
        return StepReport(self.step, loss, float(norm), rate, tokens, time.perf_counter() - begin)

    def accumulate(self, chosen: Sequence[int]) -> float:
        """Set the gradient of σ to that of the mean loss over the tokens of `chosen`; returns that loss."""
        self.optimizer.zero_grad(set_to_none=True)
        prefix = prefix_of(self.model, self.prompt)
        leaves = Prefix.of((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prefix.layers)
        tokens = total_targets([self.examples[i] for i in chosen])
        total = 0.0
        with recomputing(self.model):
            for start in range(0, len(chosen), self.micro_batch_size):
                part = chosen[start : start + self.micro_batch_size]
                batch = Batch.of([self.examples[i] for i in part], self.model.device)
                hidden = batch.hidden(self.model, leaves)
                loss = self.objective.loss(hidden, batch.labels, part, self.targets) / tokens
                loss.backward()
                total += float(loss.detach())
        outputs, gradients = _with_gradient(prefix, leaves)
        torch.autograd.backward(outputs, gradients)
        return total

    def batch_at(self, step: int) -> list[int]:
        """Indices of the examples of a step: epochs are shuffled one after the other and cut into batches."""
        size, count = self.batch_size, len(self.examples)
        order: list[int] = []
        for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order += torch.randperm(count, generator=generator).tolist()
        start = step * size % count
        return order[start : start + size]

    def save(self, path: Path, identity: str) -> None:
        """Write σ, the optimiser and the step, whole or not at all.

        An update that was interrupted in the middle is not saved: the checkpoint before it is the last good state.
        """
        if not self.whole:
            return
        tensors = {f"prompt.{name}": tensor for name, tensor in self.prompt.state_dict().items() if tensor.numel()}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{name}"] = value
        temporary = path.with_name(path.name + ".partial")
        try:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                temporary,
                {"step": str(self.step), "identity": identity},
            )
            temporary.replace(path)
            self.saved = self.step
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path, identity: str) -> None:
        """Go on from `save`.

        Raises:
            SoftPromptError: a file that is cut off or of another run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (OSError, SafetensorError) as error:
            raise SoftPromptError(f"checkpoint: {path} cannot be read ({error}); delete it to start anew") from error
        if metadata.get("identity") != identity:
            raise SoftPromptError(f"checkpoint: {path} belongs to another run; delete it to start anew")
        state = self.prompt.state_dict()
        state.update({k.removeprefix("prompt."): v for k, v in tensors.items() if k.startswith("prompt.")})
        self.prompt.load_state_dict(state)
        for index, parameter in enumerate(self.parameters):
            head = f"optimizer.{index}."
            saved = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device) for name, value in saved.items()
            }
        self.step = self.saved = int(metadata["step"])


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let gradient checkpointing, where it was enabled, do its work.

    transformers checkpoints layers in training mode. Only the layers' own flag is set: with `model.train()` dropout
    would make the loss random, and the teacher's sampling would lose its cache.
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


def _with_gradient(prefix: Prefix, leaves: Prefix) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of the prefix that have a graph, with the gradient that their leaf has gathered."""
    outputs, gradients = [], []
    for pair, leaf_pair in zip(prefix.layers, leaves.layers, strict=True):
        for tensor, leaf in zip(pair, leaf_pair, strict=True):
            if tensor.requires_grad and leaf.grad is not None:
                outputs.append(tensor)
                gradients.append(leaf.grad)
    return outputs, gradients
