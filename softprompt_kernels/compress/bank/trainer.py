"""Trains many prompts in one batch, each as it would train alone.

    loss = Σ_r  Σ_tokens of r  weight · loss / Σ_tokens of r  weight           r: the contexts in the batch

A step draws a batch for every context, the one that the context would have alone at this step, and runs all sequences
through the frozen model together: each reads its own prompt of a `PromptBank`. A context's part of the loss depends on
its own prompt only, so its gradient, its clipping and its update are those of a run of its own, except for rounding.

A context leaves when it has converged: when its mean loss over one pass through its training queries is below a share
of the KL without context. Less than that share is left to recover. A context also leaves when its loss or gradient is
not finite. The batches of the others stay as they are, so that the steps get shorter.

Cost: that of the steps of all contexts, but what a step costs once (Python, small GEMMs, launches of kernels) it costs
once for all of them. Memory: activations of one pass, at most `PASS_TOKENS` tokens or one context's batch, and for each
context its prompt, gradient and moments in fp32.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.objective import Objective, weighted
from softprompt_kernels.compress.distill.trainer import (
    StepReport,
    Trainer,
    recompute_activations,
    tensors_and_gradients,
)
from softprompt_kernels.compress.sources.sequences import Batch, Example, total_targets
from softprompt_kernels.compress.teacher.moments_cache import Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import Prefix, PromptBank

PASS_TOKENS = 2048
"""Padded tokens that go through the model at once, with gradients."""
MOST_IN_MEMORY = 256 << 20
"""Bytes of targets that are kept in memory. More are read from the disk in every step."""
FEWEST_STEPS = 5  # whose mean loss says that a context has converged


@dataclass(eq=False)
class Member:
    """A context in the training.

    Args:
        trainer: with its prompt, examples, targets, optimiser and order of batches.
        key: of its run.
        enough: it has converged at this mean loss; None: it never has.
        recent: the losses of the last steps.
        left: the step after which it left; None while it trains.
        failed: why it cannot be trained.
    """

    trainer: Trainer
    key: str
    enough: float | None = None
    recent: deque[float] = field(default_factory=deque)
    left: int | None = None
    failed: str | None = None

    def __post_init__(self) -> None:
        steps = max(FEWEST_STEPS, -(-self.trainer.queries // self.trainer.batch_size))
        self.recent = deque(self.recent, maxlen=steps)

    @property
    def trains(self) -> bool:
        """Whether it is still in the batch."""
        return self.left is None and self.failed is None

    @property
    def converged(self) -> bool:
        """Whether its recent losses are small enough."""
        full = len(self.recent) == self.recent.maxlen
        return self.enough is not None and full and sum(self.recent) / len(self.recent) <= self.enough


class BankTrainer:
    """Trains the prompts of several contexts.

    Args:
        model: prepared and frozen.
        objective: the loss.
        members: by name. Their trainers have one schedule and one model.
        micro_batch_size: sequences that go through the model at once; None: as many as have `PASS_TOKENS` tokens, but
            at least the batch of one context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        members: Mapping[str, Member],
        micro_batch_size: int | None = None,
    ) -> None:
        self.model, self.objective, self.members = model, objective, dict(members)
        self.micro_batch_size = micro_batch_size
        self.step = self.saved_step = 0
        self.consistent = True  # False while an update is under way
        self.examples: list[Example] = []
        self.offsets: dict[str, int] = {}
        self.targets: Targets | None = None
        for name, member in self.members.items():
            self.offsets[name] = len(self.examples)
            if member.trainer.targets is not None:
                own = member.trainer.targets
                self.targets = own if self.targets is None else self.targets.joined(own, self.offsets[name])
            self.examples += member.trainer.examples
        if self.targets is not None:
            self.targets = self.targets.in_memory(MOST_IN_MEMORY)
        # One optimiser, which on a GPU updates all prompts with the same few kernels. They share the schedule.
        first = next(iter(self.members.values())).trainer.optimizer
        options = {name: first.defaults[name] for name in ("lr", "betas", "weight_decay")}
        self.optimizer = type(first)([p for m in self.members.values() for p in m.trainer.parameters], **options)

    @property
    def steps(self) -> int:
        """The number of steps of those that stay until the end."""
        return next(iter(self.members.values())).trainer.schedule.steps

    @property
    def training(self) -> dict[str, Member]:
        """The contexts in the batch."""
        return {name: member for name, member in self.members.items() if member.trains}

    def train_step(self) -> dict[str, StepReport]:
        """One update of each prompt in the batch.

        Returns:
            A report by context. A step's seconds are shared out evenly.
        """
        begin, training = time.perf_counter(), self.training
        chosen = {name: member.trainer.batch_at(self.step) for name, member in training.items()}
        losses = self.accumulate(chosen)
        norms = dict(zip(training, torch.stack([_norm(m.trainer) for m in training.values()]).tolist(), strict=True))
        rate = next(iter(training.values())).trainer.schedule.at(self.step)
        for name, member in training.items():
            if not (math.isfinite(losses[name]) and math.isfinite(norms[name])):
                member.failed = (
                    f"learning_rate: at step {self.step + 1} the loss is {losses[name]:.3g} and the gradient norm "
                    f"{norms[name]:.3g}; try a smaller learning rate"
                )
                _drop_gradient(member.trainer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.consistent = False
        self.optimizer.step()
        self.step += 1
        for name, member in training.items():
            member.recent.append(losses[name])
            if member.failed is None and member.converged:
                member.left = self.step
            _drop_gradient(member.trainer)  # of one that leaves, the optimiser would go on using the last
        self.consistent = True
        seconds = (time.perf_counter() - begin) / len(training)
        return {
            name: StepReport(self.step, losses[name], norms[name], rate, self._tokens(name, chosen), seconds)
            for name, member in training.items()
            if member.failed is None
        }

    def accumulate(self, chosen: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Compute the gradient of each prompt: that of the mean loss over the tokens of its context, by their weights.

        Args:
            chosen: by context, the indices of the examples in its batch.

        Returns:
            The mean losses.
        """
        members, names = self.members, list(chosen)
        prefix = prefix_of(self.model, PromptBank([members[name].trainer.prompt for name in names]))
        leaves = Prefix.of(
            ((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prefix.layers), prefix.lengths
        )
        device = self.model.device
        tokens = torch.tensor([self._tokens(name, chosen) for name in names], device=device)
        total = torch.zeros(len(names), device=device)
        weight = torch.zeros_like(total)
        rows = [(row, self.offsets[name] + index) for row, name in enumerate(names) for index in chosen[name]]
        with recompute_activations(self.model):
            for part in self._passes(rows):
                summed = self._losses(leaves, part, len(names))
                loss = summed.loss / tokens
                loss.sum().backward()
                total += loss.detach()
                weight += summed.weight
        factor = torch.where(weight > 0, tokens / weight, 1.0)  # the sum of all weights is known only now
        outputs, gradients = tensors_and_gradients(prefix, leaves)
        if self.objective.token_weights != "uniform":
            gradients = [gradient * factor[:, None, None, None].to(gradient.dtype) for gradient in gradients]
        torch.autograd.backward(outputs, gradients)
        return dict(zip(names, (total * factor).tolist(), strict=True))

    def _losses(self, leaves: Prefix, part: Sequence[_Row], contexts: int) -> _Sums:
        """The sums over the tokens of each context in a pass."""
        examples = [self.examples[number] for _, number in part]
        batch = Batch.of(examples, self.model.device)
        index = torch.tensor([row for row, _ in part])
        hidden = batch.hidden(self.model, leaves, prompt_index=index)
        numbers = [number for _, number in part]
        losses = self.objective.losses(hidden, batch.labels, numbers, self.targets)
        weights = self.objective.weights(losses, numbers, self.targets)
        of_row = index.repeat_interleave(torch.tensor([example.targets for example in examples])).to(losses.device)
        of_token = losses if weights is None else weighted(losses, weights)
        zeros = torch.zeros(contexts, dtype=losses.dtype, device=losses.device)
        ones = torch.ones_like(losses) if weights is None else weights
        return _Sums(zeros.index_add(0, of_row, of_token), zeros.index_add(0, of_row, ones.detach()))

    def _passes(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """The sequences of a step in passes through the model."""
        batch_size = max(member.trainer.batch_size for member in self.members.values())
        part: list[_Row] = []
        width = 0
        for row in rows:
            wider = max(width, self.examples[row[1]].length)
            full = (
                len(part) == self.micro_batch_size
                if self.micro_batch_size
                else len(part) >= batch_size and wider * (len(part) + 1) > PASS_TOKENS
            )
            if full:
                yield part
                part, wider = [], self.examples[row[1]].length
            part.append(row)
            width = wider
        yield part

    def _tokens(self, name: str, chosen: Mapping[str, Sequence[int]]) -> int:
        return total_targets([self.members[name].trainer.examples[index] for index in chosen[name]])

    def save(self, path: Path) -> None:
        """Write a checkpoint of all prompts, their optimisers and the step, atomically.

        Nothing is written if an update was interrupted in the middle: the checkpoint before is the last good state.
        """
        if not self.consistent:
            return
        tensors: dict[str, Tensor] = {}
        states = {}
        for name, member in self.members.items():
            trainer = member.trainer
            states[name] = {
                "key": member.key,
                "left": member.left,
                "failed": member.failed,
                "recent": list(member.recent),
            }
            for part, tensor in trainer.prompt.state_dict().items():
                tensors[f"{name}/prompt.{part}"] = tensor
            if member.trains:
                for index, parameter in enumerate(trainer.parameters):
                    for part, tensor in self.optimizer.state[parameter].items():
                        tensors[f"{name}/optimizer.{index}.{part}"] = tensor
        temporary = path.with_name(path.name + ".partial")
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items() if tensor.numel()},
                temporary,
                {"step": str(self.step), "members": json.dumps(states)},
            )
            temporary.replace(path)
            self.saved_step = self.step
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Resume the members from a checkpoint, which has all of them.

        Raises:
            SoftPromptError: the file is damaged, or a member is of another run.
        """
        with _opened(path) as file:
            metadata = file.metadata() or {}
            states = json.loads(metadata["members"])
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        for name, member in self.members.items():
            state, trainer = states[name], member.trainer
            if state["key"] != member.key:
                raise SoftPromptError(f"checkpoint: {name} in {path} is of another run; delete the file to start over")
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            saved = trainer.prompt.state_dict()
            saved.update({k.removeprefix("prompt."): v for k, v in own.items() if k.startswith("prompt.")})
            trainer.prompt.load_state_dict(saved)
            for index, parameter in enumerate(trainer.parameters):
                start = f"optimizer.{index}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(start): value if key == f"{start}step" else value.to(parameter.device)
                    for key, value in own.items()
                    if key.startswith(start)
                }
            member.left, member.failed = state["left"], state["failed"]
            member.recent.extend(state["recent"])
        self.step = self.saved_step = int(metadata["step"])


_Row = tuple[int, int]  # the place of its context in the bank, and the number of its example


class _Sums(NamedTuple):
    """By context, `[R]`: the weighted losses, with a gradient, and the weights."""

    loss: Tensor
    weight: Tensor


def _norm(trainer: Trainer) -> Tensor:
    """The norm of the gradient, which is clipped to the trainer's largest."""
    if trainer.max_grad_norm is not None:
        return torch.nn.utils.clip_grad_norm_(trainer.parameters, trainer.max_grad_norm)
    gradients = [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))


def _drop_gradient(trainer: Trainer) -> None:
    for parameter in trainer.parameters:
        parameter.grad = None


def stored_members(path: Path) -> dict[str, str]:
    """The keys of the runs in a checkpoint, by context; empty if there is none.

    Raises:
        SoftPromptError: the file is damaged.
    """
    if not path.exists():
        return {}
    with _opened(path) as file:
        return {name: state["key"] for name, state in json.loads((file.metadata() or {})["members"]).items()}


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SoftPromptError(f"checkpoint: {path} cannot be read ({error}); delete it to train again") from error
