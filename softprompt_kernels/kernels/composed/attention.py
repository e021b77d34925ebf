"""Attention over [prompt ; own tokens] from PyTorch's CPU flash kernels, one call per segment.

A segment is a range of keys and the queries that see them in the same way. There are three: a prompt, with all tokens
that see it; the own keys before the first query; the square of own keys and queries under the causal rule. Tokens are
kept flat, [T = B·M, Hq, D], so that a shared prompt is one call over the whole batch, without a copy of the prompt or
of the queries. The forward merges the (out_i, lse_i) of all segments,

    lse = log( Σ_i exp(lse_i) + exp(sink) ),    out = Σ_i exp(lse_i − lse) out_i.

Backward: with the *joint* out and lse, the ordinary flash backward of each segment is exact, since exp(S − lse) and
rowsum(dO ∘ out) are then those of the joint softmax. The gradients of the queries add up. A gradient of lse is passed
as one more column: 1 in the values and in dO, and 1 − dlse in out. This turns rowsum(dO ∘ out) into
rowsum(dO ∘ out) − dlse.

fp16 and bf16 are computed in fp32, because the flash backward accumulates in the dtype of its inputs.
Cost: 2 flash calls forward and 2 backward. Memory beyond the outputs: one more out and dQ.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs
from softprompt_kernels.kernels.problems.tensors import unit_stride

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Rows = slice | Tensor
EVERYTHING = slice(None)


def unsupported(problem: AttentionProblem) -> str | None:
    """The flash kernels support the causal rule and padding, but no softcap and no window."""
    queries, own, prompt = problem.query.shape[2], problem.key.shape[2], problem.prompt_key.shape[2]
    if problem.query.device.type != "cpu":
        return f"query is on {problem.query.device}, and it serves the CPU"
    if problem.softcap is not None:
        return f"softcap={problem.softcap} is given, and it has none"
    if problem.window is not None and problem.window < prompt + own:
        return f"window={problem.window} is shorter than prompt and keys, {prompt} + {own}, and it has no window"
    if (problem.causal or problem.window is not None) and queries > own:
        return f"query is longer than key, {queries} > {own}, with causal=True or a window"
    return None


@dataclass(frozen=True)
class _Segment:
    """Some keys and the tokens that see them."""

    rows: Rows  # the tokens, of T
    batch: int  # these tokens are `batch` sequences of equal length
    is_prompt: bool  # the keys are of the bank, else own keys
    where: tuple[slice, slice, slice]  # which of these keys [prompt or sequence, head, position]
    causal: bool = False  # query i sees key j if j <= i
    padding: Tensor | None = None  # [batch, 1, 1, keys], −inf at padding


@dataclass(frozen=True)
class _Inputs:
    """The problem's tensors in the compute dtype, with flat tokens."""

    query: Tensor  # [T, Hq, D]
    key: tuple[Tensor, Tensor]  # own [B, Hkv, N, D], bank [R, Hkv, P, D]
    value: tuple[Tensor, Tensor]
    segments: list[_Segment]


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] and lse [B, Hq, M]."""
    inputs = _inputs(problem)
    batch, heads, queries, size = problem.query.shape
    value_size = problem.value.shape[3]
    width = max(size, value_size)
    merged = _Merged(inputs.query, value_size)
    for segment in inputs.segments:
        query, key, value = _operands(inputs, segment, width)
        segment_out, segment_lse = _flash(
            query, key, value, is_causal=segment.causal, attn_mask=segment.padding, scale=problem.scale
        )
        if segment.padding is not None:  # the kernel returns an lse of 0 where all keys are padding
            segment_lse = segment_lse.masked_fill((segment.padding == -torch.inf).all(-1), -torch.inf)
        merged.add(segment.rows, _flat(segment_out)[..., :value_size], segment_lse.transpose(1, 2).flatten(0, 1))
    out, lse = merged.out.contiguous(), merged.lse
    if problem.sinks is not None:
        with_sinks = torch.logaddexp(lse, problem.sinks.to(lse.dtype))
        out = out * torch.exp(torch.where(lse == -torch.inf, 0, lse - with_sinks))[..., None]
        lse = torch.where(lse == -torch.inf, lse, with_sinks)
    out = out.to(problem.query.dtype).view(batch, queries, heads, value_size)
    return out.transpose(1, 2), lse.view(batch, queries, heads).transpose(1, 2).contiguous()


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of the inputs named in `needs`. A segment that none of them depends on is not computed."""
    inputs = _inputs(problem)
    dtype = inputs.query.dtype
    out, grad_out = _flat(out.to(dtype)), _flat(grad_out.to(dtype))
    lse = lse.transpose(1, 2).flatten(0, 1)  # [T, Hq]
    grad_sinks = _grad_sinks(problem, out, lse, grad_out, grad_lse) if needs.sinks else None
    size, value_size = inputs.query.shape[2], out.shape[2]
    width = max(size, value_size)
    ones_column = None
    if grad_lse is not None:
        ones_column = width
        width += 1
        column = 1 - grad_lse.transpose(1, 2).flatten(0, 1)[..., None].to(dtype)
        out = torch.cat([_pad(out, width - 1), column], -1)
        grad_out = torch.cat([_pad(grad_out, width - 1), torch.ones_like(column)], -1)
    # exp(S − inf) = 0: rows that see no key have gradient 0.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)

    grad_query = torch.zeros_like(inputs.query)
    grad_key, grad_value = (tuple(torch.zeros_like(t) for t in pair) for pair in (inputs.key, inputs.value))
    for segment in _needed(inputs.segments, needs):
        query, key, value = _operands(inputs, segment, width)
        if ones_column is not None:
            value[..., ones_column] = 1  # in the padding that `_operands` added, so in a tensor of its own
        rows = segment.rows
        segment_grad_query, segment_grad_key, segment_grad_value = _flash_backward(
            _sequences(_pad(grad_out[rows], width), segment.batch),
            query,
            key,
            value,
            _sequences(_pad(out[rows], width), segment.batch),
            lse[rows].unflatten(0, (segment.batch, -1)).transpose(1, 2),
            0.0,
            segment.causal,
            attn_mask=segment.padding,
            scale=problem.scale,
        )
        grad_query[rows] += _flat(segment_grad_query)[..., :size]
        grad_key[segment.is_prompt][segment.where] = segment_grad_key[..., :size]
        grad_value[segment.is_prompt][segment.where] = segment_grad_value[..., :value_size]
    dtype = problem.query.dtype
    batch, heads, queries, _ = problem.query.shape
    return Gradients(
        grad_query.to(dtype).view(batch, queries, heads, size).transpose(1, 2) if needs.query else None,
        grad_key[0].to(dtype) if needs.key else None,
        grad_value[0].to(dtype) if needs.value else None,
        grad_key[1].to(dtype) if needs.prompt_key else None,
        grad_value[1].to(dtype) if needs.prompt_value else None,
        grad_sinks,
    )


# --- layout -----------------------------------------------------------------------------------------------------------


def _flat(tensor: Tensor) -> Tensor:
    """[b, H, m, X] -> [b·m, H, X], a view of token-major memory with the last stride 1 that the kernels need."""
    return tensor.transpose(1, 2).contiguous().flatten(0, 1)


def _sequences(tokens: Tensor, batch: int) -> Tensor:
    """[b·m, H, X] -> [b, H, m, X], a view."""
    return tokens.unflatten(0, (batch, -1)).transpose(1, 2)


def _pad(tensor: Tensor, width: int) -> Tensor:
    """Zeros after the last column, up to `width`: the kernels need keys and values of the same size."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _operands(inputs: _Inputs, segment: _Segment, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """query [b, Hq, m, width], key and value [b, Hkv, n, width] of a segment."""
    query = _sequences(_pad(inputs.query[segment.rows], width), segment.batch)
    key = inputs.key[segment.is_prompt][segment.where]
    value = inputs.value[segment.is_prompt][segment.where]
    return query, _pad(key, width), _pad(value, width)


class _Merged:
    """out [T, Hq, Dv] and lse [T, Hq] of the segments so far; 0 and −inf for tokens without a segment."""

    def __init__(self, query: Tensor, value_size: int) -> None:
        self.out = query.new_zeros(1, 1, 1).expand(*query.shape[:2], value_size)
        self.lse = query.new_full((1, 1), -torch.inf).expand(query.shape[:2])
        self._empty = True

    def add(self, rows: Rows, segment_out: Tensor, segment_lse: Tensor) -> None:
        """Merges a segment into the rows of its tokens."""
        if self._empty and segment_out.shape == self.out.shape:
            self.out, self.lse, self._empty = segment_out.contiguous(), segment_lse.contiguous(), False
            return
        if self._empty:
            self.out, self.lse, self._empty = self.out.contiguous(), self.lse.contiguous(), False
        old = self.lse[rows]
        share = torch.sigmoid(segment_lse - old).nan_to_num_(0)[..., None]  # NaN: both are −inf
        if isinstance(rows, slice):
            self.out[rows].lerp_(segment_out, share)
        else:
            self.out[rows] = self.out[rows].lerp_(segment_out, share)
        self.lse[rows] = torch.logaddexp(old, segment_lse)


def _grad_sinks(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Tensor:
    """− Σ exp(sink − lse) · (rowsum(dO ∘ out) − dlse), [Hq]."""
    assert problem.sinks is not None
    delta = (grad_out * out).sum(-1)  # [T, Hq]
    if grad_lse is not None:
        delta = delta - grad_lse.transpose(1, 2).flatten(0, 1)
    share = torch.where(lse == -torch.inf, 0, torch.exp(problem.sinks.to(lse.dtype) - lse))
    return -(share * delta).sum(0).to(problem.sinks.dtype)


# --- segments ---------------------------------------------------------------------------------------------------------


def _inputs(problem: AttentionProblem) -> _Inputs:
    dtype = problem.compute_dtype
    own = (problem.key.to(dtype), problem.value.to(dtype))
    if problem.key_lengths is not None:  # 0 · NaN is NaN: the contents of padding must not reach the kernels
        exists = torch.arange(problem.key.shape[2]) < problem.key_lengths[:, None]
        own = tuple(torch.where(exists[:, None, :, None], t, 0) for t in own)  # type: ignore[assignment]
    bank = (problem.prompt_key.to(dtype), problem.prompt_value.to(dtype))
    segments: list[_Segment] = []
    if problem.query.numel():
        segments = [*_prompt_segments(problem), *_own_segments(problem)]
    return _Inputs(
        _flat(problem.query.to(dtype)),
        (unit_stride(own[0]), unit_stride(bank[0])),
        (unit_stride(own[1]), unit_stride(bank[1])),
        segments,
    )


def _needed(segments: list[_Segment], needs: Needs) -> list[_Segment]:
    """The segments that a needed gradient depends on."""
    own, prompt = needs.key or needs.value, needs.prompt_key or needs.prompt_value
    return [s for s in segments if needs.query or (prompt if s.is_prompt else own)]


def _prompt_segments(problem: AttentionProblem) -> list[_Segment]:
    """One segment per prompt that any sequence sees."""
    rows, _, length, _ = problem.prompt_key.shape
    sequences = _sequence_tokens(problem)
    own_prompts = problem.prompt_index is None and rows > 1  # sequence s sees prompt s
    if own_prompts and problem.prompt_lengths is None and problem.cu_seqlens is None:
        return [_Segment(EVERYTHING, rows, True, (EVERYTHING,) * 3)] if length else []
    index = [s if own_prompts else 0 for s in range(len(sequences))]
    if problem.prompt_index is not None:
        index = problem.prompt_index.tolist()
    lengths = [length] * rows if problem.prompt_lengths is None else problem.prompt_lengths.tolist()
    segments = []
    for row in range(rows):
        tokens = _union([sequences[s] for s, r in enumerate(index) if r == row])
        if tokens is not None and lengths[row]:
            segments.append(_Segment(tokens, 1, True, (slice(row, row + 1), EVERYTHING, slice(lengths[row]))))
    return segments


def _own_segments(problem: AttentionProblem) -> list[_Segment]:
    batch, _, queries, _ = problem.query.shape
    own = problem.key.shape[2]
    causal = problem.causal or problem.window is not None
    if problem.cu_seqlens is not None:
        return [
            _Segment(slice(s.start, s.stop), 1, False, (EVERYTHING, EVERYTHING, slice(s.start, s.stop)), causal)
            for s in _sequence_tokens(problem)
            if len(s)
        ]
    # Bottom-right alignment: the first own − queries keys are before all queries, the others form a causal square.
    before = own - queries if causal and queries > 1 else own
    segments = []
    for start, stop, is_square in ((0, before, False), (before, own, True)):
        if stop > start:
            where = (EVERYTHING, EVERYTHING, slice(start, stop))
            segments.append(_Segment(EVERYTHING, batch, False, where, is_square, _padding(problem, start, stop)))
    return segments


def _padding(problem: AttentionProblem, start: int, stop: int) -> Tensor | None:
    """[B, 1, 1, keys] additive mask of the own keys from start to stop."""
    if problem.key_lengths is None:
        return None
    exists = torch.arange(start, stop) < problem.key_lengths[:, None]
    mask = torch.zeros(exists.shape, dtype=problem.compute_dtype).masked_fill_(~exists, -torch.inf)
    return mask[:, None, None, :]


def _sequence_tokens(problem: AttentionProblem) -> list[range]:
    """The flat tokens of each sequence."""
    if problem.cu_seqlens is not None:
        starts = problem.cu_seqlens.tolist()
        return [range(a, b) for a, b in pairwise(starts)]
    batch, _, queries, _ = problem.query.shape
    return [range(b * queries, (b + 1) * queries) for b in range(batch)]


def _union(ranges: list[range]) -> Rows | None:
    """The tokens of several ranges: a slice where they are contiguous, None where there are none."""
    ranges = [r for r in ranges if len(r)]
    if not ranges:
        return None
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges])
