"""From an attention problem to launches: how rows and keys are cut for a target.

Nothing here reads a tensor, so a plan costs no synchronisation, and tensors on the meta device will do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import (
    AttentionProblem,
    Gradients,
    Needs,
    empty_output,
    empty_token_major,
)
from softprompt_kernels.kernels.problems.tensors import unit_stride
from softprompt_kernels.kernels.triton import tuning
from softprompt_kernels.kernels.triton.attention import configs
from softprompt_kernels.kernels.triton.attention.backward_dkdv import RowTensors, fold_kernel, key_gradients_kernel
from softprompt_kernels.kernels.triton.attention.backward_dq import query_gradient_kernel
from softprompt_kernels.kernels.triton.attention.configs import Tiles
from softprompt_kernels.kernels.triton.attention.forward import forward_kernel, merge_kernel
from softprompt_kernels.kernels.triton.attention.records import Inputs, Layout, Scoring, Strided, Variant
from softprompt_kernels.kernels.triton.launch import Launch, Options, ceil_div, next_power_of_2
from softprompt_kernels.kernels.triton.runtime import float32_precision
from softprompt_kernels.kernels.triton.targets import Target

_MOST_SPLITS = 64
_LEAST_ROWS = 16  # of a product
_FOLD_KEYS = 16  # of a program that adds up parts
_FOLD_ROWS = 1024  # that a program for the gradient of a sink looks at together


def plan_forward(
    problem: AttentionProblem, target: Target, candidate: int | None = None
) -> tuple[Tensor, Tensor, list[Launch]]:
    """out [B, Hq, M, Dv] and lse [B, Hq, M], not yet written, and the launches that write them.

    `candidate` says which of the configurations is taken; None: the one that tuning has found, or the shipped one.
    """
    tiles = _choose(configs.FORWARD, problem, target, candidate, lambda tiles: _forward(problem, target, tiles)[2])
    return _forward(problem, target, tiles)


def _forward(problem: AttentionProblem, target: Target, tiles: Tiles) -> tuple[Tensor, Tensor, list[Launch]]:
    query = unit_stride(problem.query)
    out = empty_output(problem)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    variant = _row_variant(problem, target, tiles)
    count, kv_heads = _row_tiles(problem, variant), problem.key.shape[1]
    variant = variant._replace(splits=_key_splits(problem, target, variant, count * kv_heads))
    outputs, merge = (out, lse), []
    if variant.splits > 1:
        batch, heads, queries, size = out.shape
        parts = out.new_empty(variant.splits * batch, heads, queries, size, dtype=torch.float32)
        outputs = parts, lse.new_empty(variant.splits, *lse.shape)
        merge = [_merge(problem, outputs[0], outputs[1], out, lse, variant, target)]
    launch = Launch(
        forward_kernel,
        (count, kv_heads, variant.splits),
        {
            "query": strided(query),
            "inputs": _inputs(problem),
            "sinks": _sinks(problem),
            "out": strided(outputs[0]),
            "lse": outputs[1],
            "layout": _layout(problem),
            "scoring": _scoring(problem),
        },
        {"VARIANT": variant},
        tiles.options,
        variant.descriptors,
    )
    return out, lse, [launch, *merge]


def plan_backward(
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
    target: Target,
    candidate: int | None = None,
) -> tuple[Gradients, list[Launch]]:
    """The gradients named in `needs`, not yet written, and the launches that write them; `candidate` as above."""
    gradients = _empty_gradients(problem, needs)
    out, grad_out = unit_stride(out), unit_stride(grad_out)
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)

    def of_queries(tiles: Tiles) -> list[Launch]:
        return [_query_gradient(problem, out, lse, grad_out, grad_lse, delta, gradients.query, target, tiles)]

    def of_keys(tiles: Tiles) -> list[Launch]:
        return _key_gradients(problem, lse, grad_out, delta, gradients, target, tiles)

    launches = of_queries(_choose(configs.QUERY_GRADIENT, problem, target, candidate, of_queries))
    if any(needs[1:5]):
        launches += of_keys(_choose(configs.KEY_GRADIENTS, problem, target, candidate, of_keys))
    elif gradients.sinks is not None:
        launches.append(_fold(problem, Gradients(*[None] * 6), gradients, lse, delta, 1))
    return gradients, launches


def _choose(
    kernel: str,
    problem: AttentionProblem,
    target: Target,
    candidate: int | None,
    launches_of: Callable[[Tiles], list[Launch]],
) -> Tiles:
    query, value_size = problem.query, problem.value.shape[3]
    block = max(next_power_of_2(query.shape[3]), next_power_of_2(value_size))
    rows = query.shape[2] * problem.group
    candidates = configs.candidates(kernel, target, query.element_size(), block, rows)
    if candidate is not None:
        return candidates[min(candidate, len(candidates) - 1)]
    rules = (problem.causal, problem.window is not None, problem.softcap is not None, problem.cu_seqlens is not None)
    sizes = tuning.shape_class(_sequences(problem), query.shape[2], problem.key.shape[2], problem.prompt_key.shape[2])
    key = f"{query.dtype} D{query.shape[3]}/{value_size} Hq{query.shape[1]} g{problem.group} {rules} {sizes}"
    return tuning.choose(f"attention {kernel}", key, candidates, launches_of, query.device)


# --- cutting ----------------------------------------------------------------------------------------------------------


def _row_variant(problem: AttentionProblem, target: Target, tiles: Tiles) -> Variant:
    """The constants of a kernel that has tiles of rows: fewer rows where there are fewer."""
    variant = _variant(problem, tiles)._replace(descriptors=_descriptors(problem, target))
    batch, _, queries, _ = problem.query.shape
    rows = queries * problem.group
    shared = problem.prompt_key.shape[0] == 1 and problem.prompt_index is None and problem.cu_seqlens is None
    # A tile of several sequences reads the prompt once for all, and looks at each one's own keys for all its rows.
    stacked = shared and batch > 1 and 2 * rows <= variant.block_m and problem.key.shape[2] <= variant.block_n
    most = max(_LEAST_ROWS, next_power_of_2(rows * batch if stacked else rows))
    return variant._replace(stacked=stacked, block_m=min(variant.block_m, most))


def _variant(problem: AttentionProblem, tiles: Tiles) -> Variant:
    size, value_size = problem.query.shape[3], problem.value.shape[3]
    block_d, block_dv = (max(16, next_power_of_2(s)) for s in (size, value_size))
    return Variant(
        group=problem.group,
        size=size,
        value_size=value_size,
        causal=problem.causal or problem.window is not None,
        windowed=problem.window is not None,
        capped=problem.softcap is not None,
        packed=problem.cu_seqlens is not None,
        stacked=False,
        splits=1,
        precision=float32_precision(),
        descriptors=False,
        block_m=tiles.rows,
        block_n=tiles.keys,
        block_d=block_d,
        block_dv=block_dv,
        block_s=1 if problem.cu_seqlens is None else next_power_of_2(problem.cu_seqlens.shape[0]),
    )


def _descriptors(problem: AttentionProblem, target: Target) -> bool:
    """Whether keys are loaded by tensor descriptors, which want 16-byte boundaries: from sm_90 on they become TMA.

    Not for fp32 products without tensor cores: those want operands in registers, and would spill.
    """
    if target.backend != "cuda" or int(target.arch) < 90:
        return False
    if problem.query.dtype == torch.float32 and float32_precision() == "ieee":
        return False
    tensors = [unit_stride(t) for t in (problem.key, problem.value, problem.prompt_key, problem.prompt_value)]
    return all(
        t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:3])
        for t in tensors
    )


def _sequences(problem: AttentionProblem) -> int:
    return problem.query.shape[0] if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1


def _tiles(problem: AttentionProblem, tokens: int, per_token: int, block: int) -> int:
    """Tiles of all sequences; in the packed form, whose lengths only the device knows, as many as there may be."""
    if problem.cu_seqlens is None:
        return problem.query.shape[0] * ceil_div(tokens * per_token, block)
    return ceil_div(tokens * per_token, block) + _sequences(problem) + 1 if tokens else 0


def _row_tiles(problem: AttentionProblem, variant: Variant) -> int:
    queries = problem.query.shape[2]
    if variant.stacked:
        return ceil_div(problem.query.shape[0] * queries * variant.group, variant.block_m)
    return _tiles(problem, queries, variant.group, variant.block_m)


def _key_splits(problem: AttentionProblem, target: Target, variant: Variant, programs: int) -> int:
    """Programs that share the keys of one tile of rows: more than one only where tiles leave multiprocessors idle."""
    keys = ceil_div(problem.prompt_key.shape[2] + problem.key.shape[2], variant.block_n)
    if programs == 0 or 2 * programs > target.multiprocessors:
        return 1
    # A part has 4 tiles of keys at least, or its merge would cost more than it spares.
    return max(1, min(target.multiprocessors // programs, keys // 4, _MOST_SPLITS))


def _row_splits(problem: AttentionProblem, target: Target, variant: Variant, own_programs: int) -> int:
    """Programs that share the rows of one tile of prompt keys.

    So many that none of them has more work than its part of all, and than a program of own keys.
    """
    prompts, kv_heads, length, _ = problem.prompt_key.shape
    sequences, queries = _sequences(problem), problem.query.shape[2]
    if problem.cu_seqlens is not None:
        queries = ceil_div(queries, max(1, sequences))
    one = ceil_div(queries * variant.group, variant.block_m)  # tiles of rows
    each = ceil_div(sequences * one, max(1, prompts))
    programs = prompts * kv_heads * ceil_div(length, variant.block_n)
    fair = ceil_div(own_programs * one + programs * each, target.multiprocessors)
    return max(1, min(ceil_div(each, max(1, one, fair)), _MOST_SPLITS))


# --- launches ---------------------------------------------------------------------------------------------------------


def _merge(
    problem: AttentionProblem,
    out_parts: Tensor,
    lse_parts: Tensor,
    out: Tensor,
    lse: Tensor,
    variant: Variant,
    target: Target,
) -> Launch:
    block = 16
    registers = 255 if target.backend == "cuda" else None  # the assembler, left to itself, spills on sm_120
    return Launch(
        merge_kernel,
        (ceil_div(lse.numel(), block),),
        {
            "out_parts": out_parts,
            "lse_parts": lse_parts,
            "sinks": _sinks(problem),
            "out": strided(out),
            "lse": lse,
            "count": lse.numel(),
            "queries": lse.shape[2],
            "heads": lse.shape[1],
        },
        {"SPLITS": variant.splits, "SIZE": variant.value_size, "BLOCK_M": block, "BLOCK_D": variant.block_dv},
        Options(4, 1, registers),
    )


def _query_gradient(
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    grad_query: Tensor | None,
    target: Target,
    tiles: Tiles,
) -> Launch:
    variant = _row_variant(problem, target, tiles)
    query = unit_stride(problem.query)
    return Launch(
        query_gradient_kernel,
        (_row_tiles(problem, variant), problem.key.shape[1]),
        {
            "query": strided(query),
            "inputs": _inputs(problem),
            "out": strided(out),
            "grad_out": strided(grad_out),
            "lse": lse.contiguous(),
            "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
            "grad_query": strided(delta.new_empty(0, 0, 0, 1) if grad_query is None else grad_query),
            "delta": delta,
            "layout": _layout(problem),
            "scoring": _scoring(problem),
        },
        {"NEED_QUERY": grad_query is not None, "VARIANT": variant},
        tiles.options,
        variant.descriptors,
    )


def _key_gradients(
    problem: AttentionProblem,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    gradients: Gradients,
    target: Target,
    tiles: Tiles,
) -> list[Launch]:
    variant = _variant(problem, tiles)
    prompts, kv_heads, length, _ = problem.prompt_key.shape
    queries, own = problem.query.shape[2], problem.key.shape[2]
    of_own = gradients.key is not None or gradients.value is not None
    of_prompts = gradients.prompt_key is not None or gradients.prompt_value is not None
    own_tiles = _tiles(problem, own, 1, variant.block_n) if of_own else 0
    # Rows of the whole batch are one run where they all see the whole of the one prompt.
    one_run = prompts == 1 and problem.prompt_index is None and problem.cu_seqlens is None and problem.window is None
    one_run = one_run and (own >= queries or not variant.causal)
    splits = _row_splits(problem, target, variant, own_tiles * kv_heads) if of_prompts else 1
    variant = variant._replace(splits=splits, stacked=one_run)
    written, folds = gradients, []
    if splits > 1:
        parts = [
            None if g is None else g.new_empty(splits * prompts, *g.shape[1:], dtype=torch.float32)
            for g in gradients[3:5]
        ]
        written = gradients._replace(prompt_key=parts[0], prompt_value=parts[1])
    if splits > 1 or gradients.sinks is not None:
        folds = [_fold(problem, written, gradients, lse, delta, splits)]
    prompt_tiles = ceil_div(length, variant.block_n) if of_prompts else 0
    launch = Launch(
        key_gradients_kernel,
        (own_tiles + prompts * splits * prompt_tiles, kv_heads),
        {
            "tensors": RowTensors(strided(unit_stride(problem.query)), strided(grad_out), lse.contiguous(), delta),
            "inputs": _inputs(problem),
            "gradients": Inputs(*(None if g is None else strided(g) for g in written[1:5])),
            "layout": _layout(problem),
            "own_tiles": own_tiles,
            "scoring": _scoring(problem),
        },
        {
            "NEED_KEY": gradients.key is not None or gradients.prompt_key is not None,
            "NEED_VALUE": gradients.value is not None or gradients.prompt_value is not None,
            "VARIANT": variant,
        },
        tiles.options,
    )
    return [launch, *folds]


def _fold(
    problem: AttentionProblem, parts: Gradients, gradients: Gradients, lse: Tensor, delta: Tensor, splits: int
) -> Launch:
    prompts, kv_heads, length, size = problem.prompt_key.shape
    value_size = problem.value.shape[3]
    prompt_tiles = ceil_div(length, _FOLD_KEYS) if splits > 1 else 0
    sinks = None if gradients.sinks is None else _sinks(problem)

    def views(of: Gradients) -> Inputs:
        return Inputs(None, None, *(None if g is None or splits == 1 else strided(g) for g in of[3:5]))

    return Launch(
        fold_kernel,
        (prompts * kv_heads * prompt_tiles + (0 if sinks is None else sinks.shape[0]),),
        {
            "parts": views(parts),
            "gradients": views(gradients),
            "lse": lse.contiguous(),
            "delta": delta,
            "sinks": sinks,
            "grad_sinks": gradients.sinks,
            "layout": _layout(problem),
            "prompt_tiles": prompt_tiles,
            "kv_heads": kv_heads,
            "batches": problem.query.shape[0],
        },
        {
            "SPLITS": splits,
            "SIZE": size,
            "VALUE_SIZE": value_size,
            "BLOCK_M": _FOLD_ROWS,
            "BLOCK_N": _FOLD_KEYS,
            "BLOCK_D": max(16, next_power_of_2(size)),
            "BLOCK_DV": max(16, next_power_of_2(value_size)),
        },
        Options(4, 1),
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Strided:
    """A tensor [batch, heads, tokens, size] as kernels take it."""
    return Strided(tensor, *tensor.stride()[:3])


def _inputs(problem: AttentionProblem) -> Inputs:
    tensors = (problem.key, problem.value, problem.prompt_key, problem.prompt_value)
    return Inputs(*(strided(unit_stride(t)) for t in tensors))


def _layout(problem: AttentionProblem) -> Layout:
    _, heads, queries, _ = problem.query.shape
    prompts, _, prompt_keys, _ = problem.prompt_key.shape
    vectors = (problem.cu_seqlens, problem.prompt_index, problem.prompt_lengths, problem.key_lengths)
    starts, index, prompt_lengths, key_lengths = (None if v is None else v.contiguous() for v in vectors)
    sizes = (_sequences(problem), prompts, queries, problem.key.shape[2], prompt_keys, heads)
    return Layout(starts, index, prompt_lengths, key_lengths, *sizes)


def _scoring(problem: AttentionProblem) -> Scoring:
    # A window beyond every distance that there is means the same, and overflows nothing.
    most = problem.query.shape[2] + problem.key.shape[2] + problem.prompt_key.shape[2] + 1
    return Scoring(problem.scale, problem.softcap or 0.0, min(problem.window or 0, most))


def _sinks(problem: AttentionProblem) -> Tensor | None:
    return None if problem.sinks is None else problem.sinks.contiguous()


def _empty_gradients(problem: AttentionProblem, needs: Needs) -> Gradients:
    own = (problem.query, problem.key, problem.value)
    others = (problem.prompt_key, problem.prompt_value, problem.sinks)
    return Gradients(
        *(empty_token_major(t, *t.shape) if need else None for t, need in zip(own, needs[:3], strict=True)),
        *(t.new_empty(t.shape) if need and t is not None else None for t, need in zip(others, needs[3:], strict=True)),
    )
