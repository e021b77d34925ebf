"""Examples, which are queries and outputs as token ids, and batches of them.

    tokens    x_0 … x_{m−1}  y_0 … y_{n−1}        targets y_0 … y_{n−1} are predicted at positions m−1 … m+n−2

The loss uses the n rows that predict the output. The last token predicts nothing and is not fed to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.models import QueryTap, prompted_hidden
from softprompt_kernels.prompts import Prefix


@dataclass(frozen=True)
class Example:
    """One query and its output: `input_ids` (m ≥ 1 tokens) is given, `output_ids` (n ≥ 1 tokens) is predicted."""

    input_ids: tuple[int, ...]
    output_ids: tuple[int, ...]

    @property
    def targets(self) -> int:
        """n, the number of predicted tokens and of rows in the loss."""
        return len(self.output_ids)

    @property
    def length(self) -> int:
        """m + n − 1, the number of tokens fed to the model."""
        return len(self.input_ids) + len(self.output_ids) - 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples, padded on the right.

    Args:
        input_ids: `[B, M]` int64.
        attention_mask: `[B, M]` int64 on the CPU, where it is read; None if no row is padded.
        target_rows: `[n]` int64: the rows of the flattened `[B·M]` hidden states that predict an output token, example
            by example.
        labels: `[n]` int64: the tokens that these rows predict.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    target_rows: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> Batch:
        """A batch of examples, padded with token 0 to the longest. The mask hides the padding."""
        width = max(example.length for example in examples)
        ids: list[list[int]] = []
        rows: list[int] = []
        labels: list[int] = []
        for index, example in enumerate(examples):
            fed = [*example.input_ids, *example.output_ids[:-1]]
            ids.append(fed + [0] * (width - len(fed)))
            start = index * width + len(example.input_ids) - 1
            rows.extend(range(start, start + example.targets))
            labels.extend(example.output_ids)
        # One tensor of all, and not one of each example: with short examples, those would be most of a step.
        lengths = torch.tensor([[example.length] for example in examples])
        padded = None if bool((lengths == width).all()) else (torch.arange(width) < lengths).long()
        return cls(
            torch.tensor(ids, device=device),
            padded,
            torch.tensor(rows, device=device),
            torch.tensor(labels, device=device),
        )

    def hidden(
        self,
        model: PreTrainedModel,
        prefix: Prefix | None,
        tap: QueryTap | None = None,
        prompt_index: Tensor | None = None,
    ) -> Tensor:
        """`[n, d]`: the last hidden states of `target_rows`, with every sequence behind `prefix` (None: no prefix).

        `tap` receives the queries of some tokens, and `prompt_index [B]` says which row of the prefix a sequence reads
        (see `prompted_hidden`).
        """
        hidden = prompted_hidden(
            model, self.input_ids, prefix, attention_mask=self.attention_mask, prompt_index=prompt_index, tap=tap
        )
        return hidden.flatten(0, 1).index_select(0, self.target_rows)


def in_batches(examples: Sequence[Example], tokens: int) -> Iterator[list[int]]:
    """Indices of `examples`, sorted by length, in groups of at most `tokens` padded tokens.

    A single example that is longer is a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: examples[i].length):
        if group and examples[index].length * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def total_targets(examples: Iterable[Example]) -> int:
    """The number of rows in a loss over `examples`."""
    return sum(example.targets for example in examples)
