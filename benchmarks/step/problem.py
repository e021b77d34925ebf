"""What all implementations of a training step start from: one batch, one prompt, and the moments of the teacher.

It is made once, before anything is timed, and written into a folder. So fresh processes start from the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, SilentReporter
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, hidden_states
from softprompt_kernels.compress.teacher.moments_cache import Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, head_of
from softprompt_kernels.ops import teacher_moments

FROZEN_TOKENS = 1
CAPTURE_TOKENS = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A batch to train on.

    Args:
        model: folder or name of the model.
        context_ids: the context, C tokens, which the teacher reads before every query.
        examples: the batch, at most 64 sequences.
        tokens: k, the prompt's length.
        folder: holds the initial prompt (`prompt.safetensors`) and the teacher's moments (`moments.safetensors`).
        micro_batch_size: sequences that ours runs at once; the baseline always runs all of them.
        threads: torch's number of threads.
    """

    model: str
    context_ids: tuple[int, ...]
    examples: tuple[Example, ...]
    tokens: int
    folder: Path
    micro_batch_size: int
    threads: int

    @property
    def targets(self) -> int:
        """Tokens in the loss."""
        return sum(example.targets for example in self.examples)

    def describe(self) -> str:
        """The sizes in one line."""
        return (
            f"{len(self.examples)} sequences (ours: {self.micro_batch_size} at once), {self.targets} tokens in the "
            f"loss; context {len(self.context_ids)} tokens, prompt {self.tokens} tokens; fp32"
        )

    def start(self) -> tuple[Tensor, Tensor]:
        """The prompt before the first step: key and value `[L, Hkv, k, D]`."""
        tensors = load_file(self.folder / "prompt.safetensors")
        return tensors["key"], tensors["value"]

    def moments(self, logit_scale: float) -> Targets:
        """The teacher's moments, memory-mapped, as in training."""
        file = safe_open(self.folder / "moments.safetensors", framework="pt")
        bounds = pairwise(accumulate((example.targets for example in self.examples), initial=0))
        rows = {index: (0, start, stop) for index, (start, stop) in enumerate(bounds)}
        return Targets("moments", (file,), rows, 1.0, logit_scale, "bias_mean" in file.offset_keys())


@dataclass(frozen=True)
class Preparation:
    """Seconds that cached moments cost before training.

    Args:
        context: to run the context through the model, once.
        moments_per_sequence: to take the moments of one sequence, once for each sequence.
    """

    context: float
    moments_per_sequence: float


def make_problem(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    queries: Sequence[Query],
    folder: Path,
    *,
    tokens: int | None = None,
    micro_batch_size: int | None = None,
    new_tokens: int = 48,
) -> tuple[Problem, Preparation]:
    """Capture the context, let the teacher answer the queries, and take the teacher's moments of the answers.

    Args:
        name: name or folder that the model was loaded from.
        model, tokenizer: from `load_model`.
        text: the context.
        queries: one for each sequence of the batch, at most 64.
        folder: an existing folder; the files are written there.
        tokens: k; None: an eighth of the context. The prompt starts as the context's first k tokens.
        micro_batch_size: sequences that ours runs at once; None: the whole batch.
        new_tokens: the most tokens of an answer, which is sampled with temperature 0.7 and seed 0.

    Raises:
        SoftPromptError: the batch or the prompt has a size that cannot be measured, or the head has a softcap.
    """
    if not queries:
        raise SoftPromptError("queries: got 0, accepted is at least one")
    head = head_of(model)
    if head.softcap is not None:
        raise SoftPromptError(f"model: its head has a softcap ({head.softcap}), accepted is a linear head")
    chat = ChatFormat(tokenizer)
    ids = chat.context_ids(text)
    tokens = tokens or ids.shape[1] // 8
    if not FROZEN_TOKENS < tokens < ids.shape[1]:
        raise SoftPromptError(f"tokens: got {tokens}, accepted is {FROZEN_TOKENS + 1} to {ids.shape[1] - 1}")

    context, context_seconds = timed(lambda: capture(model, ids, CAPTURE_TOKENS))
    quiet = SilentReporter()
    examples = answer(
        model,
        chat,
        context,
        queries,
        new_tokens=new_tokens,
        temperature=0.7,
        batch_size=len(queries),
        seed=0,
        reporter=quiet,
    )

    def moments() -> dict[str, Tensor]:
        rows = torch.cat(hidden_states(model, context, examples, quiet, ""))
        made = teacher_moments(rows, head.weight, bias=head.bias, logit_scale=head.logit_scale)
        named = {"mean": made.mean, "entropy": made.entropy, "bias_mean": made.bias_mean}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    saved, moments_seconds = timed(moments)
    save_file(saved, folder / "moments.safetensors")
    first = context.slice(0, tokens).layers
    start = {"key": torch.cat([key for key, _ in first]), "value": torch.cat([value for _, value in first])}
    save_file(start, folder / "prompt.safetensors")
    problem = Problem(
        name,
        tuple(ids[0].tolist()),
        tuple(examples),
        tokens,
        folder,
        min(micro_batch_size or len(examples), len(examples)),
        torch.get_num_threads(),
    )
    return problem, Preparation(context_seconds, moments_seconds / len(examples))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of `work`, and the seconds that it took."""

    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin
