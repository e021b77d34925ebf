"""Attention of a batch over [soft prompt ; own tokens]. Sequences may share prompts, which are never copied.

For query i of sequence b, which sees prompt r = prompt_index[b] of length len_r:

    S_p = softcap(scale · ⟨q_i, prompt_key[r, p]⟩)      S_j = softcap(scale · ⟨q_i, key[b, j]⟩)
    lse = log( Σ exp(S_p) + Σ exp(S_j) + exp(sink) )
    out = Σ exp(S_p − lse) prompt_value[r, p] + Σ exp(S_j − lse) value[b, j]

where the sums are over the keys that the query sees. Prompt key p has position p, own key j has len_r + j, query i has
len_r + (N − M) + i. `causal` keeps keys at or before the query. `window=w` keeps keys with
`0 <= query position − key position < w`.

Cost: 4 · B · Hq · M · (P + N) · D FLOP forward, and 2.5 times that backward. The gradients of prompts are summed over
the sequences in fp32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import (
    AttentionProblem,
    Gradients,
    Needs,
    accumulate_dtype,
    empty_output,
    token_major,
)
from softprompt_kernels.ops import checks, dispatch
from softprompt_kernels.ops.autograd import are_ordinary, define_op, forbid_double_backward, is_intercepted, run_kernel

OP = "prompt_attention"
FORWARD, BACKWARD = f"{OP}.forward", f"{OP}.backward"


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    prompt_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a shared prompt and each sequence's own tokens.

    Formula: the head of ops/prompt_attention.py. The backward over two segments: docs/maths.md.

    Args:
        query: [B, Hq, M, D], any strides. query, key, value and the prompt have one dtype and device.
        key: [B, Hkv, N, D], after RoPE; Hq is a multiple of Hkv. N may be 0.
        value: [B, Hkv, N, Dv].
        prompt_key: [R, Hkv, P, D], a bank of R prompts. P may be 0.
        prompt_value: [R, Hkv, P, Dv].
        prompt_index: [B] (packed: [S]) integers in [0, R): the prompt that each sequence sees. None: all share the one
            prompt if R = 1, sequence s sees prompt s if R = B.
        prompt_lengths: [R] integers in [0, P]: keys of each prompt; the rest is padding. None: P.
        key_lengths: [B] integers in [0, N]: own keys of each sequence; the rest is padding. The positions of queries do
            not change: they still follow from N. None: N.
        cu_seqlens: [S + 1] integers from 0 on, for the packed form: B = 1, M = N, and sequence s owns the tokens from
            cu_seqlens[s] to cu_seqlens[s + 1] − 1. Tokens after the last sequence have out 0.
        causal: a query does not see keys after it.
        window: a query does not see keys after it, nor keys `window` or more positions before it. None: no window.
        softcap: scores become softcap · tanh(scores / softcap).
        sinks: [Hq] logits, one more term of each row's denominator, without a value.
        scale: multiplies the scores. None: 1 / sqrt(D).
        return_lse: also return the logarithm of the denominator, sinks included.
        backend: the name of a backend; None chooses one.

    Padding keys may hold anything, NaN included. Their gradient is 0.

    Returns:
        out [B, Hq, M, Dv] in query's dtype, in memory [B, M, Hq, Dv]; with `return_lse` also lse [B, Hq, M] in fp32
        (float64 for float64 inputs), natural logarithm, differentiable. A query that sees no key has out 0, lse −inf
        and gradient 0, also with sinks.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it accepts.
        RuntimeError: on a second derivative.
    """
    query, key, value, prompt_key, prompt_value = checks.autocast(query, key, value, prompt_key, prompt_value)
    tensors = query, key, value, prompt_key, prompt_value, prompt_index, prompt_lengths, key_lengths, cu_seqlens, sinks
    bypass = not is_intercepted() and are_ordinary(tensors) and _are_numbers(causal, window, softcap, scale)
    _check(tensors, window, softcap, scale, skip_known=bypass)
    dispatch.check_backend(backend)
    indices = [None if t is None else t.to(torch.int64) for t in tensors[5:9]]
    options = causal, window, softcap, 1 / math.sqrt(query.shape[3]) if scale is None else float(scale), backend
    op = attention_op.bypassing_dispatcher if bypass else attention_op.through_dispatcher
    out, lse = op(*tensors[:5], *indices, sinks, *options)
    return (out, lse) if return_lse else out


def packs_sequences(size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a padded batch should be packed, for attention with heads of `size`.

    The backend that serves it must accept packed sequences, and compute only pairs of tokens of one sequence. Others
    refuse packed sequences, or compute all pairs of tokens.
    """
    one, starts = torch.empty(1, 1, 1, size, dtype=dtype, device=device), torch.tensor([0, 1], device=device)
    options = None, None, None, starts, None, True, None, None, 1.0
    return dispatch.prefers_packed(OP, AttentionProblem(one, one, one, one, one, *options))


# --- the registered ops -----------------------------------------------------------------------------------------------


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = AttentionProblem(
        query,
        key,
        value,
        prompt_key,
        prompt_value,
        prompt_index,
        prompt_lengths,
        key_lengths,
        cu_seqlens,
        sinks,
        causal,
        window,
        softcap,
        scale,
    )
    kernel = dispatch.select(OP, problem, backend, query.device)
    result: tuple[Tensor, Tensor] = run_kernel(FORWARD, kernel, query.device, kernel.forward, problem)
    return result


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = token_major(query.new_empty(batch, heads, queries, value.shape[3]))
    return out, query.new_empty(batch, heads, queries, dtype=accumulate_dtype(query.dtype))


def _differentiate(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any, needs: list[bool]
) -> Gradients:
    """The kernel's gradients by the inputs of `_forward`, in the memory layout of `kernels/problems/attention.py`."""
    *arguments, backend = inputs
    problem = AttentionProblem(*arguments)
    kernel = dispatch.select(OP, problem, backend, out.device)
    if grad_out is None:
        grad_out = empty_output(problem).zero_()
    saved = out, lse, grad_out, grad_lse, Needs(*needs)
    grads: Gradients = run_kernel(BACKWARD, kernel, out.device, kernel.backward, problem, *saved)
    own = (None if g is None else token_major(g) for g in grads[:3])
    return Gradients(*own, *(None if g is None else g.contiguous() for g in grads[3:]))


@torch.library.custom_op(f"softprompt_kernels::{OP}_backward", mutates_args=())
def backward_op(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    tensors = query, key, value, prompt_key, prompt_value, prompt_index, prompt_lengths, key_lengths, cu_seqlens, sinks
    options = causal, window, softcap, scale, backend
    gradients = _differentiate(grad_out, grad_lse, out, lse, *tensors, *options, needs=needs)
    return [gradient for gradient in gradients if gradient is not None]


@backward_op.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    prompt_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    own = [token_major(t.new_empty(t.shape)) for t, need in zip((query, key, value), needs, strict=False) if need]
    others = zip((prompt_key, prompt_value, sinks), needs[3:], strict=True)
    return own + [t.new_empty(t.shape) for t, need in others if need and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.options = inputs[10:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[1 + i] for i in (0, 1, 2, 3, 4, 9)]
    if grad_out is None and grad_lse is None:
        return (None,) * 15
    tensors = grad_out, grad_lse, *ctx.saved_tensors
    inputs = *tensors, *ctx.options
    if ctx.bypassed_dispatcher and not torch.is_grad_enabled() and not is_intercepted() and are_ordinary(tensors):
        *grad_tensors, grad_sinks = _differentiate(*inputs, needs=needs)
    else:
        computed = iter(backward_op(*inputs, needs))
        *grad_tensors, grad_sinks = [next(computed) if need else None for need in needs]
    return *grad_tensors, None, None, None, None, grad_sinks, *(None,) * 5


attention_op = define_op(OP, _forward, _fake_forward, _setup_context, _backward)
forbid_double_backward(backward_op, OP)


# --- argument checks --------------------------------------------------------------------------------------------------


def _are_numbers(causal: bool, window: int | None, softcap: float | None, scale: float | None) -> bool:
    return type(causal) is bool and type(window) in (int, type(None)) and {type(softcap), type(scale)} <= _NUMBERS


_NUMBERS = {int, float, type(None)}
_passed: set[tuple[Any, ...]] = set()  # of calls that passed all checks: everything that the checks read
_MAX_PASSED = 4096


def _check(
    tensors: tuple[Any, ...], window: int | None, softcap: float | None, scale: float | None, skip_known: bool
) -> None:
    """All checks. `skip_known` skips them for a call like one that passed, as all layers of a model make."""
    if skip_known:
        signature = window, softcap, scale, *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        if signature in _passed:
            return
    query, key, value, prompt_key, prompt_value, prompt_index, prompt_lengths, key_lengths, cu_seqlens, sinks = tensors
    _check_tensors(query, key, value, prompt_key, prompt_value)
    sequences = query.shape[0]
    if cu_seqlens is not None:
        _check_packed(query, key, key_lengths, cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
    _check_bank(prompt_key, sequences, prompt_index, prompt_lengths)
    checks.integers("key_lengths", key_lengths, query.shape[0], "B", query.device)
    _check_scalars(query, window, softcap, scale, sinks)
    if skip_known:
        if len(_passed) >= _MAX_PASSED:
            _passed.clear()
        _passed.add(signature)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value, "prompt_key": prompt_key, "prompt_value": prompt_value}
    for name, tensor in tensors.items():
        checks.floating(name, tensor)
        checks.same_dtype_and_device(name, tensor, "query", query)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions; got shape {tuple(tensor.shape)}")
    batch, heads, _, size = query.shape
    if size == 0 or value.shape[3] == 0:
        raise ValueError(f"head sizes must be at least 1; got D = {size} and Dv = {value.shape[3]}")
    kv_heads, own = key.shape[1], key.shape[2]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"query's heads must be a multiple of key's; got Hq = {heads} and Hkv = {kv_heads}")
    rows, _, prompt, _ = prompt_key.shape
    value_size = value.shape[3]
    checks.shape("key", key, "[B, Hkv, N, D]", (batch, kv_heads, own, size))
    checks.shape("value", value, "[B, Hkv, N, Dv]", (batch, kv_heads, own, value_size))
    checks.shape("prompt_key", prompt_key, "[R, Hkv, P, D]", (rows, kv_heads, prompt, size))
    checks.shape("prompt_value", prompt_value, "[R, Hkv, P, Dv]", (rows, kv_heads, prompt, value_size))


def _check_packed(query: Tensor, key: Tensor, key_lengths: Tensor | None, cu_seqlens: Tensor) -> None:
    checks.integers("cu_seqlens", cu_seqlens, None, "S + 1", query.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have S + 1 >= 1 elements; got none")
    if query.shape[0] != 1:
        raise ValueError(f"query must have B = 1 with cu_seqlens; got B = {query.shape[0]}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must have M = N with cu_seqlens; got {query.shape[2]} and {key.shape[2]}")
    if key_lengths is not None:
        raise ValueError("key_lengths must be None with cu_seqlens, which already says where sequences end")


def _check_bank(prompt_key: Tensor, sequences: int, prompt_index: Tensor | None, prompt_lengths: Tensor | None) -> None:
    rows = prompt_key.shape[0]
    checks.integers("prompt_index", prompt_index, sequences, "number of sequences", prompt_key.device)
    checks.integers("prompt_lengths", prompt_lengths, rows, "R", prompt_key.device)
    if prompt_index is None and rows not in (1, sequences):
        raise ValueError(
            f"prompt_index must be given unless there is one prompt, or one for each of the {sequences} sequences; "
            f"got None with R = {rows}"
        )
    if rows == 0 and sequences > 0:
        raise ValueError("prompt_key must hold at least one prompt (of length 0 if there is none); got R = 0")


def _check_scalars(
    query: Tensor, window: int | None, softcap: float | None, scale: float | None, sinks: Tensor | None
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1; got {window}")
    checks.positive("softcap", softcap)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be None or finite; got {scale}")
    if sinks is not None:
        checks.floating("sinks", sinks)
        checks.shape("sinks", sinks, "[Hq]", (query.shape[1],))
        checks.device("sinks", sinks, query.device)
