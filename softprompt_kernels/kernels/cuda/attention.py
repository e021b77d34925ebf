"""Attention over [prompt ; own tokens] in CUDA C++: one online softmax over both, prompts read where they lie.

It serves bf16 and fp16, heads of 64, 96 and 128, banks, ragged lengths, windows and softcap; the Triton backend serves
the rest. A forward is 1 launch; a backward is 2, and a third adds up what blocks that shared a prompt's rows have left.
The kernels stand in `csrc/cuda/attention/forward.cu`, `backward_dq.cu` and `backward_dkdv.cu`.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Runner
from softprompt_kernels.kernels.problems.attention import (
    AttentionProblem,
    Gradients,
    Needs,
    empty_output,
    empty_token_major,
)
from softprompt_kernels.kernels.problems.tensors import DTYPES

HEAD_SIZES = (64, 96, 128)
_ALIGNMENT = 16  # bytes, of rows: they are copied 16 at a time
_TILE = 64  # keys of a block of the gradient by keys
_MOST_SPLITS = 64

View = tuple[int, tuple[int, ...], tuple[int, ...]]


class Attention:
    """By one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def unsupported(self, problem: AttentionProblem) -> str | None:
        """Why it cannot serve a problem, naming the argument in the way."""
        query, value = problem.query, problem.value
        if query.dtype not in (torch.bfloat16, torch.float16):
            return f"query is {query.dtype}, and its products are of torch.bfloat16 and torch.float16"
        if query.shape[3] not in HEAD_SIZES or value.shape[3] != query.shape[3]:
            sizes = f"the head sizes of query and value are {query.shape[3]} and {value.shape[3]}"
            return f"{sizes}, and it serves {', '.join(map(str, HEAD_SIZES))}, the same for both"
        for name, argument in (("sinks", problem.sinks), ("cu_seqlens", problem.cu_seqlens)):
            if argument is not None:
                return f"{name} is given, and it serves none"
        for name, tensor in _inputs(problem).items():
            reason = self._runner.unsupported_tensor(name, tensor)
            if reason is None and not _is_aligned(tensor):
                reason = f"rows of {name} do not begin at multiples of {_ALIGNMENT} bytes"
            if reason is not None:
                return reason
        return None

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """out [B, Hq, M, D] and lse [B, Hq, M]."""
        out = empty_output(problem)
        lse = problem.query.new_empty(problem.query.shape[:3], dtype=torch.float32)
        reads = _read(problem)
        with self._runner.launching(reads, (out, lse)) as module:
            _native(module, problem, reads).forward(_view(out), _vector(lse), self._runner.stream(out.device))
        return out, lse

    def backward(
        self,
        problem: AttentionProblem,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        """Gradients of the inputs named in `needs`; those of prompts are summed in fp32, in one order at every run."""
        # Not `contiguous`, which returns dense numbers as they are, wherever they begin.
        out, grad_out = (
            t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in (out, grad_out)
        )
        lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
        delta = torch.empty_like(lse)
        splits = self._splits(problem) if needs.prompt_key or needs.prompt_value else 1
        wanted = [
            _empty_like(tensor, own=index < 3) if need else None
            for index, (tensor, need) in enumerate(zip(_inputs(problem).values(), needs[:5], strict=True))
        ]
        parts = [
            delta.new_empty(splits, *gradient.shape) if gradient is not None and splits > 1 else None
            for gradient in wanted[3:]
        ]
        reads = _read(problem)
        with self._runner.launching((*reads, out, grad_out, lse, grad_lse), (*wanted, *parts, delta)) as module:
            _native(module, problem, reads).backward(
                _view(out),
                _view(grad_out),
                _vector(lse),
                _optional(grad_lse, _vector),
                _vector(delta),
                splits,
                *(_optional(part, _vector) for part in parts),
                *(_optional(gradient, _view) for gradient in wanted),
                self._runner.stream(out.device),
            )
        query, key, value, prompt_key, prompt_value = wanted
        return Gradients(query, key, value, prompt_key, prompt_value, None)

    def _splits(self, problem: AttentionProblem) -> int:
        """Blocks that share the rows of a tile of a prompt's keys: more than one where tiles leave processors idle."""
        prompts, kv_heads, prompt_keys, _ = problem.prompt_key.shape
        tiles = -(-prompt_keys // _TILE) * prompts * kv_heads
        if tiles == 0:
            return 1
        batch, _, queries, _ = problem.query.shape
        rows = batch * -(-queries * problem.group // _TILE)
        idle = -(-2 * self._runner.multiprocessors(problem.query.device) // tiles)
        return max(1, min(idle, rows, _MOST_SPLITS))


def _inputs(problem: AttentionProblem) -> dict[str, Tensor]:
    return {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "prompt_key": problem.prompt_key,
        "prompt_value": problem.prompt_value,
    }


def _read(problem: AttentionProblem) -> list[Tensor | None]:
    """What is read of a problem."""
    lengths = (problem.prompt_index, problem.prompt_lengths, problem.key_lengths)
    return [*_inputs(problem).values(), *(_optional(t, Tensor.contiguous) for t in lengths)]


def _native(module: Any, problem: AttentionProblem, reads: list[Tensor | None]) -> Any:
    return module.AttentionProblem(
        DTYPES[problem.query.dtype],
        *(_view(tensor) for tensor in _inputs(problem).values()),
        *(_optional(tensor, _vector) for tensor in reads[5:]),
        problem.causal,
        problem.window,
        problem.softcap,
        problem.scale,
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, and lie densely."""
    if tensor.numel() == 0:
        return True
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    each = tensor.element_size()
    return tensor.stride(-1) == 1 and all(
        n % _ALIGNMENT == 0 for n in (tensor.data_ptr(), *(s * each for s in strides))
    )


def _empty_like(tensor: Tensor, own: bool) -> Tensor:
    """Uninitialised, in memory [batch, token, head, size] for a sequence's own tensors."""
    return empty_token_major(tensor, *tensor.shape) if own else tensor.new_empty(tensor.shape)


def _view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _vector(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _optional(tensor: Tensor | None, use: Any) -> Any:
    return None if tensor is None else use(tensor)
