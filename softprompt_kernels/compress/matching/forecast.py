"""An estimate of how long `match` takes, measured on one layer of each kind and a few rows.

    seconds = Σ over kinds of layers · (closed form of a layer + refinement steps · one step of a layer)

Layers are of one kind when they have the same score function, and so the same window, and heads of the same shape. The
rows of a few examples are recorded in the first layer of each kind, and repeated. The closed form is timed with two
numbers of rows, because only a part of it grows with them. Reading rows from disk is not counted, and layers that are
refined together may be faster on a GPU.

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
from softprompt_kernels.compress.teacher.answers import watch
from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.models import FedTokens, QueryTap, ScoreFunction
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
    seconds = 0.0
    for layers, recorded in _kinds(model, context, examples):
        device, dtype = recorded.query.device, recorded.query.dtype
        key, value = (tensor[0].to(device, dtype) for tensor in context.layers[layers[0]])
        seconds += len(layers) * _layer_seconds(recorded, key, value, settings, rows)
    return seconds


def _layer_seconds(recorded: LayerRows, key: Tensor, value: Tensor, settings: Matching, rows: int) -> float:
    """Seconds of one layer, whose context has this key `[Hkv, C, D]` and value `[Hkv, C, Dv]`."""
    most = min(rows, MEASURED_ROWS)
    recorded = recorded.take(torch.arange(most, device=key.device) % recorded.count)

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
    return seconds


class _Kinds:
    """Keeps the rows of the first layer of each kind. A `Recorder` and a `QuerySink`."""

    def __init__(self) -> None:
        self.layers: dict[tuple[ScoreFunction, tuple[int, ...], tuple[int, ...]], list[int]] = {}
        self.rows: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.offsets: list[Tensor] = []

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap:
        """All tokens."""
        places = []
        for part in fed:
            own = torch.arange(len(part.tokens))
            self.offsets.append(part.start + own)
            places.append(part.place + own)
        return QueryTap(torch.cat(places), self)

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        """Keep the rows of a batch."""
        own = self.layers.setdefault((scores, query.shape[1:], out.shape[1:]), [])
        if layer not in own:
            own.append(layer)
        if layer == own[0]:
            self.rows.setdefault(layer, []).append((query.detach(), out.detach(), lse.detach()))

    def add(self, number: int, hidden: Tensor) -> None:
        """Hidden states are not kept."""


def _kinds(model: PreTrainedModel, context: Prefix, examples: Sequence[Example]) -> list[tuple[list[int], LayerRows]]:
    """The layers of each kind, and the rows of the first of them."""
    kinds = _Kinds()
    watch(model, context, examples, range(len(examples)), kinds, SilentReporter(), "")
    found = []
    for (scores, *_), layers in kinds.layers.items():
        parts = zip(*kinds.rows[layers[0]], strict=True)
        query, out, lse = (torch.cat(part).to(torch.float32).transpose(0, 1).contiguous() for part in parts)
        found.append((layers, LayerRows(query, out, lse, torch.cat(kinds.offsets).to(query.device), scores)))
    return found


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
