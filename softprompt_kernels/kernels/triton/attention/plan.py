"""From an attention problem to launches: how rows and keys are cut into tiles and splits for a target.

Nothing here reads the values of a tensor. So planning needs no synchronisation, and works with tensors on the meta
device.
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
from softprompt_kernels.kernels.triton.attention.arguments import KeyValues, Layout, Scoring, Strided, Variant
from softprompt_kernels.kernels.triton.attention.backward_dkdv import (
    RowTensors,
    backward_dkdv_kernel,
    reduce_splits_kernel,
)
from softprompt_kernels.kernels.triton.attention.backward_dq import backward_dq_kernel
from softprompt_kernels.kernels.triton.attention.forward import forward_kernel, merge_kernel
from softprompt_kernels.kernels.triton.launch import Launch, Options, TileConfig, ceil_div, next_power_of_2
from softprompt_kernels.kernels.triton.runtime import float32_precision
from softprompt_kernels.kernels.triton.targets import Target

_MAX_SPLITS = 64
_MIN_DOT_ROWS = 16
_REDUCE_BLOCK_N = 16  # keys of a program that adds up partial sums
_REDUCE_BLOCK_M = 1024  # rows of a tile of the program that computes the gradient of a sink


def plan_forward(
    problem: AttentionProblem, target: Target, candidate: int | None = None
) -> tuple[Tensor, Tensor, list[Launch]]:
    """out [B, Hq, M, Dv] and lse [B, Hq, M], not yet written, and the launches that write them.

    `candidate` is the index of the tile configuration to use; None: the one that tuning found, or the shipped one.
    """
    config = _choose(configs.FORWARD, problem, target, candidate, lambda config: _forward(problem, target, config)[2])
    return _forward(problem, target, config)


def _forward(problem: AttentionProblem, target: Target, config: TileConfig) -> tuple[Tensor, Tensor, list[Launch]]:
    query = unit_stride(problem.query)
    out = empty_output(problem)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    variant = _row_variant(problem, target, config)
    tiles, kv_heads = _row_tiles(problem, variant), problem.key.shape[1]
    variant = variant._replace(splits=_key_splits(problem, target, variant, tiles * kv_heads))
    outputs, merge = (out, lse), []
    if variant.splits > 1:
        batch, heads, queries, size = out.shape
        partial_out = out.new_empty(variant.splits * batch, heads, queries, size, dtype=torch.float32)
        outputs = partial_out, lse.new_empty(variant.splits, *lse.shape)
        merge = [_merge(problem, *outputs, out, lse, variant, target)]
    launch = Launch(
        forward_kernel,
        (tiles, kv_heads, variant.splits),
        {
            "query": strided(query),
            "key_values": _key_values(problem),
            "sinks": _sinks(problem),
            "out": strided(outputs[0]),
            "lse": outputs[1],
            "layout": _layout(problem),
            "scoring": _scoring(problem),
        },
        {"VARIANT": variant},
        config.options,
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

    def dq(config: TileConfig) -> list[Launch]:
        return [_backward_dq(problem, out, lse, grad_out, grad_lse, delta, gradients.query, target, config)]

    def dkdv(config: TileConfig) -> list[Launch]:
        return _backward_dkdv(problem, lse, grad_out, delta, gradients, target, config)

    launches = dq(_choose(configs.BACKWARD_DQ, problem, target, candidate, dq))
    if any(needs[1:5]):
        launches += dkdv(_choose(configs.BACKWARD_DKDV, problem, target, candidate, dkdv))
    elif gradients.sinks is not None:
        launches.append(_reduce_splits(problem, Gradients(*[None] * 6), gradients, lse, delta, 1))
    return gradients, launches


def _choose(
    kernel: str,
    problem: AttentionProblem,
    target: Target,
    candidate: int | None,
    launches_of: Callable[[TileConfig], list[Launch]],
) -> TileConfig:
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


# --- tiles and splits -------------------------------------------------------------------------------------------------


def _row_variant(problem: AttentionProblem, target: Target, config: TileConfig) -> Variant:
    """The constants of a kernel whose programs hold a tile of rows. With few rows BLOCK_M is smaller."""
    variant = _variant(problem, config)._replace(descriptors=_descriptors(problem, target))
    batch, _, queries, _ = problem.query.shape
    rows = queries * problem.group
    one_prompt = problem.prompt_key.shape[0] == 1 and problem.prompt_index is None and problem.cu_seqlens is None
    # A tile with rows of several sequences reads the prompt once for all of them, but computes the scores of every
    # sequence's own keys for all its rows.
    stacked = one_prompt and batch > 1 and 2 * rows <= variant.block_m and problem.key.shape[2] <= variant.block_n
    largest = max(_MIN_DOT_ROWS, next_power_of_2(rows * batch if stacked else rows))
    return variant._replace(stacked=stacked, block_m=min(variant.block_m, largest))


def _variant(problem: AttentionProblem, config: TileConfig) -> Variant:
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
        block_m=config.block_m,
        block_n=config.block_n,
        block_d=block_d,
        block_dv=block_dv,
        block_s=1 if problem.cu_seqlens is None else next_power_of_2(problem.cu_seqlens.shape[0]),
    )


def _descriptors(problem: AttentionProblem, target: Target) -> bool:
    """Whether keys are loaded by tensor descriptors, which become TMA loads from sm_90 on and need 16-byte alignment.

    Not for fp32 dots without tensor cores: their operands must be in registers, and the kernel would spill.
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


def _tiles(problem: AttentionProblem, tokens: int, rows_per_token: int, block: int) -> int:
    """Tiles of all sequences. In the packed form only the device knows the lengths, so this is an upper bound."""
    if problem.cu_seqlens is None:
        return problem.query.shape[0] * ceil_div(tokens * rows_per_token, block)
    return ceil_div(tokens * rows_per_token, block) + _sequences(problem) + 1 if tokens else 0


def _row_tiles(problem: AttentionProblem, variant: Variant) -> int:
    queries = problem.query.shape[2]
    if variant.stacked:
        return ceil_div(problem.query.shape[0] * queries * variant.group, variant.block_m)
    return _tiles(problem, queries, variant.group, variant.block_m)


def _key_splits(problem: AttentionProblem, target: Target, variant: Variant, programs: int) -> int:
    """Programs that share the keys of one tile of rows: more than one only where multiprocessors would be idle."""
    key_tiles = ceil_div(problem.prompt_key.shape[2] + problem.key.shape[2], variant.block_n)
    if programs == 0 or 2 * programs > target.multiprocessors:
        return 1
    # A split has at least 4 key tiles; with fewer its merge would cost more than it saves.
    return max(1, min(target.multiprocessors // programs, key_tiles // 4, _MAX_SPLITS))


def _row_splits(problem: AttentionProblem, target: Target, variant: Variant, own_programs: int) -> int:
    """Programs that share the rows of one tile of prompt keys.

    Enough of them that none has more work than an equal share of the total, or than a program of own keys.
    """
    prompts, kv_heads, length, _ = problem.prompt_key.shape
    sequences, queries = _sequences(problem), problem.query.shape[2]
    if problem.cu_seqlens is not None:
        queries = ceil_div(queries, max(1, sequences))
    row_tiles_of_sequence = ceil_div(queries * variant.group, variant.block_m)
    row_tiles_of_prompt = ceil_div(sequences * row_tiles_of_sequence, max(1, prompts))
    prompt_programs = prompts * kv_heads * ceil_div(length, variant.block_n)
    total = own_programs * row_tiles_of_sequence + prompt_programs * row_tiles_of_prompt
    equal_share = ceil_div(total, target.multiprocessors)
    return max(1, min(ceil_div(row_tiles_of_prompt, max(1, row_tiles_of_sequence, equal_share)), _MAX_SPLITS))


# --- launches ---------------------------------------------------------------------------------------------------------


def _merge(
    problem: AttentionProblem,
    partial_out: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    variant: Variant,
    target: Target,
) -> Launch:
    block = 16
    registers = 255 if target.backend == "cuda" else None  # without a limit the assembler spills on sm_120
    return Launch(
        merge_kernel,
        (ceil_div(lse.numel(), block),),
        {
            "partial_out": partial_out,
            "partial_lse": partial_lse,
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


def _backward_dq(
    problem: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    grad_query: Tensor | None,
    target: Target,
    config: TileConfig,
) -> Launch:
    variant = _row_variant(problem, target, config)
    query = unit_stride(problem.query)
    return Launch(
        backward_dq_kernel,
        (_row_tiles(problem, variant), problem.key.shape[1]),
        {
            "query": strided(query),
            "key_values": _key_values(problem),
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
        config.options,
        variant.descriptors,
    )


def _backward_dkdv(
    problem: AttentionProblem,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    gradients: Gradients,
    target: Target,
    config: TileConfig,
) -> list[Launch]:
    variant = _variant(problem, config)
    prompts, kv_heads, length, _ = problem.prompt_key.shape
    queries, own = problem.query.shape[2], problem.key.shape[2]
    need_own = gradients.key is not None or gradients.value is not None
    need_prompts = gradients.prompt_key is not None or gradients.prompt_value is not None
    own_tiles = _tiles(problem, own, 1, variant.block_n) if need_own else 0
    # The rows of all sequences are stacked where there is one prompt and every row sees all of it.
    stacked = prompts == 1 and problem.prompt_index is None and problem.cu_seqlens is None and problem.window is None
    stacked = stacked and (own >= queries or not variant.causal)
    splits = _row_splits(problem, target, variant, own_tiles * kv_heads) if need_prompts else 1
    variant = variant._replace(splits=splits, stacked=stacked)
    written, reduction = gradients, []
    if splits > 1:
        partial_sums = [
            None if g is None else g.new_empty(splits * prompts, *g.shape[1:], dtype=torch.float32)
            for g in gradients[3:5]
        ]
        written = gradients._replace(prompt_key=partial_sums[0], prompt_value=partial_sums[1])
    if splits > 1 or gradients.sinks is not None:
        reduction = [_reduce_splits(problem, written, gradients, lse, delta, splits)]
    prompt_tiles = ceil_div(length, variant.block_n) if need_prompts else 0
    launch = Launch(
        backward_dkdv_kernel,
        (own_tiles + prompts * splits * prompt_tiles, kv_heads),
        {
            "tensors": RowTensors(strided(unit_stride(problem.query)), strided(grad_out), lse.contiguous(), delta),
            "key_values": _key_values(problem),
            "gradients": KeyValues(*(None if g is None else strided(g) for g in written[1:5])),
            "layout": _layout(problem),
            "own_tiles": own_tiles,
            "scoring": _scoring(problem),
        },
        {
            "NEED_KEY": gradients.key is not None or gradients.prompt_key is not None,
            "NEED_VALUE": gradients.value is not None or gradients.prompt_value is not None,
            "VARIANT": variant,
        },
        config.options,
    )
    return [launch, *reduction]


def _reduce_splits(
    problem: AttentionProblem, partial_sums: Gradients, gradients: Gradients, lse: Tensor, delta: Tensor, splits: int
) -> Launch:
    prompts, kv_heads, length, size = problem.prompt_key.shape
    value_size = problem.value.shape[3]
    prompt_tiles = ceil_div(length, _REDUCE_BLOCK_N) if splits > 1 else 0
    sinks = None if gradients.sinks is None else _sinks(problem)

    def prompt_tensors(of: Gradients) -> KeyValues:
        return KeyValues(None, None, *(None if g is None or splits == 1 else strided(g) for g in of[3:5]))

    return Launch(
        reduce_splits_kernel,
        (prompts * kv_heads * prompt_tiles + (0 if sinks is None else sinks.shape[0]),),
        {
            "partial_sums": prompt_tensors(partial_sums),
            "gradients": prompt_tensors(gradients),
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
            "BLOCK_M": _REDUCE_BLOCK_M,
            "BLOCK_N": _REDUCE_BLOCK_N,
            "BLOCK_D": max(16, next_power_of_2(size)),
            "BLOCK_DV": max(16, next_power_of_2(value_size)),
        },
        Options(4, 1),
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Strided:
    """A tensor [batch, heads, tokens, size] in the form that kernels take."""
    return Strided(tensor, *tensor.stride()[:3])


def _key_values(problem: AttentionProblem) -> KeyValues:
    tensors = (problem.key, problem.value, problem.prompt_key, problem.prompt_value)
    return KeyValues(*(strided(unit_stride(t)) for t in tensors))


def _layout(problem: AttentionProblem) -> Layout:
    _, heads, queries, _ = problem.query.shape
    prompts, _, prompt_keys, _ = problem.prompt_key.shape
    vectors = (problem.cu_seqlens, problem.prompt_index, problem.prompt_lengths, problem.key_lengths)
    cu_seqlens, prompt_index, prompt_lengths, key_lengths = (None if v is None else v.contiguous() for v in vectors)
    return Layout(
        cu_seqlens=cu_seqlens,
        prompt_index=prompt_index,
        prompt_lengths=prompt_lengths,
        key_lengths=key_lengths,
        sequences=_sequences(problem),
        prompts=prompts,
        queries=queries,
        keys=problem.key.shape[2],
        prompt_keys=prompt_keys,
        heads=heads,
    )


def _scoring(problem: AttentionProblem) -> Scoring:
    # A window larger than every distance means no window; the limit keeps sums with it within int32.
    limit = problem.query.shape[2] + problem.key.shape[2] + problem.prompt_key.shape[2] + 1
    return Scoring(problem.scale, problem.softcap or 0.0, min(problem.window or 0, limit))


def _sinks(problem: AttentionProblem) -> Tensor | None:
    return None if problem.sinks is None else problem.sinks.contiguous()


def _empty_gradients(problem: AttentionProblem, needs: Needs) -> Gradients:
    own = (problem.query, problem.key, problem.value)
    others = (problem.prompt_key, problem.prompt_value, problem.sinks)
    return Gradients(
        *(empty_token_major(t, *t.shape) if need else None for t, need in zip(own, needs[:3], strict=True)),
        *(t.new_empty(t.shape) if need and t is not None else None for t, need in zip(others, needs[3:], strict=True)),
    )
