"""Fit a KV prompt to the teacher's attention in all layers: closed form, then refinement.

Layers are independent of each other. They are done in groups, so that the rows of a group fit into `GROUP_BYTES`, and
the result of a group is stored before the next one begins: an interrupted run resumes there.

Of many ranks each matches some of the groups, with all rows. Groups are cut so that there is one for each rank, while
there are layers. So for the same rows the closed form has the bits of one process, a refinement differs by the rounding
of a group of another size, and nothing is exchanged before the end.
Then each rank gets the prompt: 4·k·Σ Hkv·(D + Dv) bytes over the layers. With more ranks than layers, a team of ranks
matches each layer and shares its rows. That sums as many bytes over the team in every step of refinement, and Gram
matrices of 16·k²·Hkv bytes for each layer before it.

Peak memory beyond the captured context and the finished layers: the rows of a group, and what one layer needs for its
closed form: its rows and parts, a chunk of P, and Gram matrices of k².
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.matching.closed_form import fit_layer, hides_prompt
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.matching.prompt_error import prompt_error
from softprompt_kernels.compress.matching.refine import RefineRows, refine, team_error
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.parallel.shares import shares
from softprompt_kernels.compress.parallel.teams import in_teams
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.teacher.rows import LayerRows, Rows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import replaced_when_complete
from softprompt_kernels.prompts import Prefix

GROUP_BYTES = 192 << 20
LEARNING_RATE = 4e-2
ROWS_PER_STEP = 512
FEWEST_TO_REFINE = 64  # with fewer rows the held-out ones decide nothing
FEWEST_OF_A_RANK = 32  # held-out rows, and others, of each rank of a team


@dataclass(frozen=True)
class Matching:
    """How a prompt is matched.

    Args:
        tokens: k, from 1 to C.
        steps: of refinement; 0 leaves the closed form.
        frozen_tokens: first tokens that refinement does not move.
    """

    tokens: int
    steps: int
    frozen_tokens: int


def match(
    context: Prefix,
    rows: Rows,
    settings: Matching,
    *,
    reporter: Reporter,
    folder: Path | None = None,
    key: str = "",
    record: Callable[[dict[str, Any]], None] = lambda record: None,
    model: PreTrainedModel | None = None,
) -> Prefix:
    """The prompt of k tokens for a captured context, with keys at the positions of the context, fp32.

    Move the keys by k − C with `models.shift_keys` before use.

    Args:
        context: one row of C tokens.
        rows: that the teacher recorded behind this context.
        settings: how.
        reporter: receives the progress.
        folder: where finished groups are stored; None stores nothing.
        key: names everything that the result depends on; groups stored under another key are not used.
        record: receives `{"stage": "matching", "first_layer", "layers", "step", "error", "seconds"}` for each step of
            refinement: mean error over heads, and the seconds since the step before. The steps of a group come when
            its result is stored, so that an interrupted group is not recorded twice.
        model: the fit runs on its device, and the prompt has to fit its dtype. None: those of the context.

    Raises:
        SoftPromptError: queries, keys or values are not finite.
    """
    place = context if model is None else model
    groups = list(layer_groups(context, rows, -(-context.num_layers // ranks.world())))
    paths = [None if folder is None else group_file(folder, group.start) for group in groups]
    found = [None if path is None else _read(path, key, len(g)) for path, g in zip(paths, groups, strict=True)]
    missing = ranks.of_first([index for index, stored in enumerate(found) if stored is None])
    later: list[dict[str, Any]] = []  # records of other ranks than the first
    with in_teams(len(missing), _most_of_a_team(rows)) as (number, teams, team):
        costs = [len(groups[index]) for index in missing]
        own = [missing[index] for index in shares(costs, teams)[number]] if number < teams else []
        layers = context.num_layers - sum(len(groups[index]) for index in {*missing} - {*own})
        with reporter.progress("Matching", layers * (settings.steps + 1), "layer step") as advance:
            advance((layers - sum(len(groups[index]) for index in own)) * (settings.steps + 1))
            for index in own:
                begin, path = time.perf_counter(), paths[index]
                steps: list[dict[str, Any]] = []
                matched, error = _match_group(
                    context, replace(rows, team=team), settings, groups[index], reporter, advance, steps.append, place
                )
                if team.rank:
                    continue  # the first of the team has it too
                if path is not None:
                    write_group(path, key, matched, error, time.perf_counter() - begin)
                found[index] = matched
                for step in steps if ranks.is_first() else ():
                    record(step)
                later += [] if ranks.is_first() else steps
    for step in (step for of_rank in ranks.gather(later) for step in of_rank if ranks.world() > 1):
        record(step)
    if ranks.world() > 1:
        _exchange(context, settings, groups, found, missing, place)
    return Prefix.of(
        (layer_key[None].to(place.device), layer_value[None].to(place.device))
        for group in found
        for layer_key, layer_value in group or ()
    )


def _most_of_a_team(rows: Rows) -> int:
    """How many ranks may share the rows of a layer."""
    fewest = min(rows.heldout, rows.count - rows.heldout) if rows.heldout else rows.count
    return max(1, fewest // FEWEST_OF_A_RANK)


def _exchange(
    context: Prefix,
    settings: Matching,
    groups: Sequence[range],
    found: list[list[tuple[Tensor, Tensor]] | None],
    missing: Sequence[int],
    place: Prefix | PreTrainedModel,
) -> None:
    """Give all ranks the `missing` groups, each of which one rank has found."""
    for index in missing:
        mine = found[index]
        if mine is None:
            tokens = min(settings.tokens, context.length)
            shapes = [[(t.shape[1], tokens, t.shape[3]) for t in context.layers[layer]] for layer in groups[index]]
            mine = [(torch.zeros(k, device=place.device), torch.zeros(v, device=place.device)) for k, v in shapes]
        ranks.sum_([tensor for pair in mine for tensor in pair])  # zeros of the others: exact
        found[index] = mine
    if any(group is None for group in found):
        raise SoftPromptError("output: layers that were matched before cannot be read; the same command goes on")


def stored_match(context: Prefix, folder: Path, key: str) -> Prefix | None:
    """What `match` has stored for all layers under this key; None if some are missing."""
    found = stored_layers(context, folder, key)
    if len(found) < context.num_layers:
        return None
    return Prefix.of((key[None].to(context.device), value[None].to(context.device)) for key, value in found)


def stored_layers(context: Prefix, folder: Path, key: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first layers, up to the first that `match` has not stored under this key."""
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < context.num_layers:
        group = _read(group_file(folder, len(found)), key)
        if not group:
            break
        found += group
    return found


def stored_seconds(context: Prefix, folder: Path, key: str) -> float:
    """Seconds that the groups took which `match` has stored under this key."""
    seconds, layer = 0.0, 0
    while layer < context.num_layers:
        path = group_file(folder, layer)
        group = _read(path, key)
        if not group:
            break
        with safe_open(path, framework="pt") as file:
            seconds += float((file.metadata() or {}).get("seconds", 0))
        layer += len(group)
    return seconds


def stored_error(context: Prefix, folder: Path, key: str) -> Tensor | None:
    """The error `[layers, Hq]` of the prompt that `match` has stored under this key, by layer and query head.

    It is `prompt_error` on the rows that refinement held out. The closed form has seen them, and they chose which state
    of a layer was kept, so it may be a little too low. Without held-out rows it is the error on all rows.

    Returns:
        fp32 on the CPU; None if layers are missing, or were stored by a version that did not keep the error.
    """
    errors: list[Tensor] = []
    layers = 0
    while layers < context.num_layers:
        path = group_file(folder, layers)
        group = _read(path, key)
        if not group:
            return None
        with safe_open(path, framework="pt") as file:
            if "error" not in file.keys():  # noqa: SIM118 (not a mapping)
                return None
            errors.append(file.get_tensor("error").float())
        layers += len(group)
    return torch.cat(errors)


def group_file(folder: Path, layer: int) -> Path:
    """The file of the group that begins with this layer."""
    return folder / f"matched-{layer:05d}.safetensors"


def layer_groups(context: Prefix, rows: Rows, most: int | None = None) -> Iterator[range]:
    """Runs of at most `most` layers of equal shapes and score functions, whose rows fit into GROUP_BYTES."""
    start = 0
    for layer in range(1, context.num_layers):
        few = most is None or layer - start < most
        fits = few and (layer + 1 - start) * layer_bytes(context, rows, layer) <= GROUP_BYTES
        if not (fits and _same_kind(context, rows, start, layer)):
            yield range(start, layer)
            start = layer
    yield range(start, context.num_layers)


def _same_kind(context: Prefix, rows: Rows, one: int, other: int) -> bool:
    shapes = [tuple(tensor.shape for tensor in context.layers[layer]) for layer in (one, other)]
    return shapes[0] == shapes[1] and rows.scores[one] == rows.scores[other]


def layer_bytes(context: Prefix, rows: Rows, layer: int) -> int:
    """Bytes of what refinement reads of a layer: query, out and rest in fp32."""
    key, value = context.layers[layer]
    return 4 * rows.count * rows.query_heads * (key.shape[3] + 2 * value.shape[3] + 1)


def _match_group(
    context: Prefix,
    rows: Rows,
    settings: Matching,
    group: range,
    reporter: Reporter,
    advance: Callable[..., None],
    record: Callable[[dict[str, Any]], None],
    place: Prefix | PreTrainedModel,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys `[Hkv, k, D]` and values `[Hkv, k, Dv]` of some layers, and the error `[layers, Hq]` of each head."""
    start = closed_form(context, rows, settings, group, reporter, advance, place)
    stacked, error = (start.key, start.value), start.error
    if start.rows is not None:
        stacked = _refine_group(stacked, start.rows, rows.heldout, settings, group, advance, record)
        error = team_error(start.rows.slice(0, rows.heldout), *stacked)
    else:
        advance(len(group) * settings.steps)
    check_dtype(*stacked, place.dtype, group)
    return list(zip(*stacked, strict=True)), error


class ClosedForm(NamedTuple):
    """A group of L layers in closed form.

    Args:
        key, value: `[L, Hkv, k, D]` and `[L, Hkv, k, Dv]`, fp32.
        error: `[L, Hq]`, on the held-out rows.
        rows: for the refinement, held-out ones first; None if the layers are not refined.
    """

    key: Tensor
    value: Tensor
    error: Tensor
    rows: RefineRows | None


def closed_form(
    context: Prefix,
    rows: Rows,
    settings: Matching,
    group: range,
    reporter: Reporter,
    advance: Callable[..., None],
    place: Prefix | PreTrainedModel,
) -> ClosedForm:
    """A group of layers before their refinement, on the device of `place`. `advance` is called for each layer; the rest
    as in `match`.

    Raises:
        SoftPromptError: queries, keys or values are not finite.
    """
    keys, values, errors = [], [], []
    refine_rows: RefineRows | None = None
    for index, layer in enumerate(group):
        layer_rows = rows.layer(layer, place.device)
        # One layer of a context that is stored in 16 bits, or on another device, at a time.
        context_key, context_value = (
            tensor[0].to(place.device, layer_rows.query.dtype) for tensor in context.layers[layer]
        )
        parts = split(layer_rows, context_key, context_value)
        key, value = fit_layer(layer_rows, parts, context_key, context_value, settings.tokens)
        if not bool(key.isfinite().all() and value.isfinite().all()):
            raise SoftPromptError(
                f"matching_rows: the closed form of layer {layer} is not finite with {layer_rows.count} rows; try more "
                "rows, or another init"
            )
        keys.append(key)
        values.append(value)
        errors.append(prompt_error(layer_rows, parts, key, value, rows.heldout or rows.count))
        if settings.steps and _can_refine(layer_rows, rows.heldout, settings, context):
            refine_rows = refine_rows or RefineRows.empty(len(group), layer_rows)
            refine_rows.put(index, layer_rows, parts)
        del layer_rows, parts, context_key, context_value
        advance(1)
    if settings.steps and refine_rows is None:
        why = (
            f"{rows.count} rows are too few"
            if rows.count < FEWEST_TO_REFINE or not rows.heldout
            else "a window hides a part of the prompt"
        )
        reporter.message(f"Layers {group.start} to {group.stop - 1} are not refined: {why}.")
    return ClosedForm(torch.stack(keys), torch.stack(values), torch.stack(errors), refine_rows)


def check_dtype(key: Tensor, value: Tensor, dtype: torch.dtype, group: range) -> None:
    """Raise SoftPromptError if keys or values of a group of layers are not finite in `dtype`."""
    if not all(bool(tensor.to(dtype).isfinite().all()) for tensor in (key, value)):
        raise SoftPromptError(
            f"dtype: keys or values of layers {group.start} to {group.stop - 1} do not fit into {dtype} after "
            "matching; try float32 or bfloat16, or another init"
        )


def _can_refine(rows: LayerRows, heldout: int, settings: Matching, context: Prefix) -> bool:
    """Not with few rows or none held out, not to the context itself, not where a window hides a part of the prompt."""
    enough = (rows.total or rows.count) >= FEWEST_TO_REFINE and heldout > 0
    return enough and settings.tokens < context.length and not hides_prompt(rows, settings.tokens)


def _refine_group(
    start: tuple[Tensor, Tensor],
    rows: RefineRows,
    heldout: int,
    settings: Matching,
    group: range,
    advance: Callable[..., None],
    record: Callable[[dict[str, Any]], None],
) -> tuple[Tensor, Tensor]:
    last = time.perf_counter()

    def after_step(step: int, errors: Tensor) -> None:
        nonlocal last
        now, error = time.perf_counter(), float(errors.mean())
        record(
            {
                "stage": "matching",
                "first_layer": group.start,
                "layers": len(group),
                "step": step,
                "error": error,
                "seconds": now - last,
            }
        )
        last = now
        advance(len(group), error=error)

    return refine(
        *start,
        rows.slice(heldout, rows.count),
        rows.slice(0, heldout),
        steps=settings.steps,
        learning_rate=LEARNING_RATE,
        rows_per_step=ROWS_PER_STEP,
        frozen_tokens=settings.frozen_tokens,
        after_step=after_step,
    )


def write_group(path: Path, key: str, layers: Sequence[tuple[Tensor, Tensor]], error: Tensor, seconds: float) -> None:
    """Write a finished group atomically, with the error of its heads and the seconds that it took."""
    tensors = {"key": torch.stack([k for k, _ in layers]).cpu(), "value": torch.stack([v for _, v in layers]).cpu()}
    tensors["error"] = error.cpu().contiguous()
    with replaced_when_complete(path) as temporary:
        save_file(tensors, temporary, {"key": key, "seconds": f"{seconds:.3f}"})


def _read(path: Path, key: str, layers: int | None = None) -> list[tuple[Tensor, Tensor]] | None:
    """A finished group; None if there is none, or one of another key or number of layers."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            keys, values = file.get_tensor("key"), file.get_tensor("value")
    except (OSError, SafetensorError):
        return None
    return list(zip(keys, values, strict=True)) if layers in (None, keys.shape[0]) else None
