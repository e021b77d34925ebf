"""Match the prompts of several small contexts at once.

The refinement of a layer takes hundreds of steps. With few rows, as of short contexts and small models, a step costs
more in Python and launches than in arithmetic. The layers of several contexts are then refined as one group: layers are
independent of each other, so those of another context are more layers of the same batch.

Contexts have different numbers of rows. The fewer are padded with rows that do not look at the prompt:

    Λ^rest = ∞, so a' = 0;   r − out = 0          error and gradient are exactly 0

Where a step of refinement would not take all rows of a context (`ROWS_PER_STEP`), its arithmetic counts more, and it is
matched alone. Results differ from those alone by rounding. Memory: the rows of the waiting contexts, `GROUP_BYTES`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.compress.bank.summary import counted
from softprompt_kernels.compress.initial_prompt import matched_prompt
from softprompt_kernels.compress.matching.match import (
    GROUP_BYTES,
    LEARNING_RATE,
    ROWS_PER_STEP,
    ClosedForm,
    Matching,
    check_dtype,
    closed_form,
    group_file,
    layer_bytes,
    layer_groups,
    stored_match,
    stored_seconds,
    write_group,
)
from softprompt_kernels.compress.matching.refine import RefineRows, match_error, refine
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.run import Run
from softprompt_kernels.compress.teacher.rows import Rows, delete_rows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import KVPrompt, Prefix


@dataclass(eq=False)
class _Waiting:
    """A context in closed form: its groups of layers, and the seconds that they took."""

    name: str
    run: Run
    heldout: int
    groups: dict[range, ClosedForm]
    seconds: float


class JointMatching:
    """Matches contexts as they come, small ones together.

    Args:
        settings: of the matching.
        reporter: receives the progress of the joint refinement.

    Attributes:
        failed: why contexts could not be matched, by name.
    """

    def __init__(self, settings: Matching, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        self.waiting: list[_Waiting] = []
        self.bytes = 0
        self.failed: dict[str, str] = {}

    def add(self, name: str, run: Run, rows: Rows | None) -> None:
        """Match the prompt of a context, now or with the next ones. The result is stored in the folder of its run.

        Args:
            name: of the context.
            run: with the captured context.
            rows: that the teacher left; None if the prompt is matched already.

        Raises:
            SoftPromptError: queries, keys or values are not finite.
        """
        if rows is None or run.matched:
            return
        size = sum(layer_bytes(run.context, rows, layer) for layer in range(run.context.num_layers))
        if rows.count - rows.heldout > ROWS_PER_STEP or 2 * size > GROUP_BYTES:
            run.match(rows)
            return
        if self.bytes + size > GROUP_BYTES:
            self.flush()
        begin, groups = time.perf_counter(), {}
        for group in layer_groups(run.context, rows):
            groups[group] = closed_form(
                run.context, rows, self.settings, group, run.reporter, lambda count: None, run.inputs.model
            )
        light = replace(run, context=hollow(run.context))
        self.waiting.append(_Waiting(name, light, rows.heldout, groups, time.perf_counter() - begin))
        self.bytes += size

    def flush(self) -> None:
        """Refine what waits, and store it."""
        waiting, self.waiting, self.bytes = self.waiting, [], 0
        if not waiting:
            return
        groups = list(waiting[0].groups)
        layers = sum(len(group) for one in waiting for group in one.groups)
        with self.reporter.progress(
            f"Matching of {counted(len(waiting))}", layers * self.settings.steps, "layer step"
        ) as advance:
            for group in groups:
                begin = time.perf_counter()
                found, records = self._refined(waiting, group, advance)
                seconds = (time.perf_counter() - begin) / len(waiting)
                for one, (key, value, error), steps in zip(waiting, found, records, strict=True):
                    try:
                        check_dtype(key, value, one.run.inputs.model.dtype, group)
                    except SoftPromptError as problem:
                        self.failed.setdefault(one.name, str(problem))
                        continue
                    path = group_file(one.run.folder.cache, group.start)
                    pairs = list(zip(key, value, strict=True))
                    write_group(path, one.run.key, pairs, error, seconds + one.seconds / len(groups))
                    for step in steps:
                        one.run.record(step | {"seconds": step["seconds"] / len(waiting)})

    def _refined(
        self, waiting: Sequence[_Waiting], group: range, advance: Any
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[list[dict[str, Any]]]]:
        """Keys, values and errors of a group of layers of each context, and the records of the steps."""
        found = [(form.key, form.value, form.error) for form in (one.groups[group] for one in waiting)]
        records: list[list[dict[str, Any]]] = [[] for _ in waiting]
        chosen = [index for index, one in enumerate(waiting) if one.groups[group].rows is not None]
        advance(len(group) * self.settings.steps * (len(waiting) - len(chosen)))
        if not chosen:
            return found, records
        forms = [(waiting[index].groups[group], waiting[index].heldout) for index in chosen]
        fit = _joined([_fit(form, heldout) for form, heldout in forms])
        heldout = _joined([_heldout(form, heldout) for form, heldout in forms])
        last = time.perf_counter()

        def after_step(step: int, errors: Tensor) -> None:
            nonlocal last
            now = time.perf_counter()
            means = errors.view(len(chosen), -1).mean(1).tolist()
            for index, error in zip(chosen, means, strict=True):
                record = {"stage": "matching", "first_layer": group.start, "layers": len(group), "step": step}
                records[index].append(record | {"error": error, "seconds": now - last})
            last = now
            advance(len(group) * len(chosen), error=sum(means) / len(means))

        key, value = refine(
            torch.cat([form.key for form, _ in forms]),
            torch.cat([form.value for form, _ in forms]),
            fit,
            heldout,
            steps=self.settings.steps,
            learning_rate=LEARNING_RATE,
            rows_per_step=ROWS_PER_STEP,
            frozen_tokens=self.settings.frozen_tokens,
            after_step=after_step,
        )
        with torch.no_grad():
            error = match_error(heldout, key, value)
        for place, index in enumerate(chosen):
            part = slice(place * len(group), (place + 1) * len(group))
            found[index] = key[part], value[part], error[part]
        return found, records

    def prompt(self, run: Run) -> tuple[KVPrompt, float]:
        """The prompt of a context that was matched, and the seconds that it took."""
        matched = stored_match(run.context, run.folder.cache, run.key)
        assert matched is not None
        delete_rows(run.folder.cache)
        return matched_prompt(run.inputs, run.context, matched), stored_seconds(run.context, run.folder.cache, run.key)


def hollow(context: Prefix) -> Prefix:
    """A prefix of the same shapes without memory. What follows the closed form of a context asks for no more."""
    return Prefix.of(
        (key.new_zeros(()).expand_as(key), value.new_zeros(()).expand_as(value)) for key, value in context.layers
    )


def _fit(form: ClosedForm, heldout: int) -> RefineRows:
    assert form.rows is not None
    return form.rows.slice(heldout, form.rows.count)


def _heldout(form: ClosedForm, heldout: int) -> RefineRows:
    assert form.rows is not None
    return form.rows.slice(0, heldout)


def _joined(parts: Sequence[RefineRows]) -> RefineRows:
    """The layers of several contexts as one, padded to the longest. The mean error of a layer stays what it was."""
    longest = max(part.count for part in parts)

    def padded(name: str, value: float) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        shape = (sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1], longest, *tensors[0].shape[3:])
        joined = tensors[0].new_full(shape, value)
        start = 0
        for tensor in tensors:
            joined[start : start + tensor.shape[0], :, : tensor.shape[2]] = tensor
            start += tensor.shape[0]
        return joined

    size = torch.cat([part.size * (part.count / longest) for part in parts])
    return RefineRows(
        padded("query", 0.0),
        padded("rest_out", 0.0),
        padded("rest_error", 0.0),
        padded("rest_lse", math.inf),
        size,
        parts[0].scores,
    )
