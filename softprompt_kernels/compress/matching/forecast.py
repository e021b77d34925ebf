"""An estimate of how long `match` takes, measured on one layer and a few rows.

    seconds = layers · (closed form of a layer + refinement steps · one step of a layer)

The rows of a few examples are recorded in the first layer, and repeated. The closed form is timed with two numbers of
rows, because only a part of it grows with them. Reading rows from disk is not counted, and layers that are refined
together may be faster on a GPU.

Memory: `MEASURED_ROWS` rows of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.matching.closed_form import fit_layer, hides_prompt
from softprompt_kernels.compress.matching.match import FEWEST_TO_REFINE, LEARNING_RATE, ROWS_PER_STEP, Matching
from softprompt_kernels.compress.matching.parts import Parts, split
from softprompt_kernels.compress.matching.refine import RefineRows, refine
from softprompt_kernels.compress.reporter import SilentReporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.models.attention import QueryTap, ScoreFunction
from softprompt_kernels.prompts import Prefix

MEASURED_ROWS = 1024
MEASURED_STEPS = 2

T = TypeVar("T")


def matching_seconds(
    model: PreTrainedModel, context: Prefix, examples: Sequence[Example], settings: Matching, rows: int
) -> float:
    """Estimated seconds of `match`.

    Args:
        model, context: the model and the captured context.
        examples: a few, whose tokens are the rows that are measured.
        settings: of the run.
        rows: of the run.
    """
    most = min(rows, MEASURED_ROWS)
    recorded = _first_layer(model, context, examples)
    recorded = recorded.take(torch.arange(most, device=context.device) % recorded.count)
    key, value = (tensor[0] for tensor in context.layers[0])

    def closed_form(count: int) -> tuple[Parts, tuple[Tensor, Tensor]]:
        some = recorded.take(slice(count))
        parts = split(some, key, value)
        return parts, fit_layer(some, parts, key, value, settings.tokens)

    few = max(1, most // 4)
    closed_form(few)  # the first call is slower
    few_seconds, _ = _timed(lambda: closed_form(few))
    most_seconds, (parts, start) = _timed(lambda: closed_form(most))
    for_each_row = max(0.0, most_seconds - few_seconds) / max(1, most - few)
    seconds = most_seconds + for_each_row * (rows - most)
    if settings.steps and rows >= FEWEST_TO_REFINE and not hides_prompt(recorded, settings.tokens):
        own = RefineRows.of([recorded], [parts])

        def refined(steps: int) -> None:
            refine(
                start[0][None],
                start[1][None],
                own,
                own.slice(0, 1),
                steps=steps,
                learning_rate=LEARNING_RATE,
                rows_per_step=ROWS_PER_STEP,
                frozen_tokens=settings.frozen_tokens,
            )

        refined(1)
        step_seconds, _ = _timed(lambda: refined(MEASURED_STEPS))
        seconds += settings.steps * step_seconds / MEASURED_STEPS
    return context.num_layers * seconds


class _FirstLayer:
    """Keeps the rows of layer 0. A `QuerySink`."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scores: ScoreFunction | None = None

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        """Keep the rows of a batch."""
        if layer == 0:
            self.rows.append((query.detach(), out.detach(), lse.detach()))
            self.scores = scores


def _first_layer(model: PreTrainedModel, context: Prefix, examples: Sequence[Example]) -> LayerRows:
    sink = _FirstLayer()
    offsets: list[Tensor] = []

    def tap(group: Sequence[int]) -> QueryTap:
        lengths = [examples[index].length for index in group]
        own = [torch.arange(length) for length in lengths]
        offsets.extend(own)
        return QueryTap(torch.cat([row * max(lengths) + part for row, part in enumerate(own)]), sink)

    hidden_states(model, context, examples, SilentReporter(), "", tap=tap)
    query, out, lse = (
        torch.cat(parts).to(torch.float32).transpose(0, 1).contiguous() for parts in zip(*sink.rows, strict=True)
    )
    assert sink.scores is not None
    return LayerRows(query, out, lse, torch.cat(offsets).to(query.device), sink.scores)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, with what a GPU still does after it, and its result."""
    _synchronize()
    begin = time.perf_counter()
    result = work()
    _synchronize()
    return time.perf_counter() - begin, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
