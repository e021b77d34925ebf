"""Attention over [prompt ; own tokens] in CUDA C++: one online softmax over both, prompts read in place.

It serves bf16 and fp16, head sizes 64, 96 and 128, banks, ragged lengths, windows and softcap. The Triton backend
serves the rest. A forward is 1 launch. A backward is 2, and a third one if several blocks share the rows of a prompt:
it adds up their partial sums. The kernels are in `csrc/cuda/attention`: `forward.cu`, `backward_dq.cu` and
`backward_dkdv.cu`.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Launcher
from softprompt_kernels.kernels.problems.attention import (
    AttentionProblem,
    Gradients,
    Needs,
    empty_output,
    empty_token_major,
)
from softprompt_kernels.kernels.problems.tensors import DTYPES
from softprompt_kernels.kernels.ranges import kernel_range

HEAD_SIZES = (64, 96, 128)
_ALIGNMENT = 16  # bytes: the kernels copy rows in chunks of 16 bytes
_TILE = 64  # keys of a block of the dK/dV kernel, rows of a block of the others
_MAX_SPLITS = 64

View = tuple[int, tuple[int, ...], tuple[int, ...]]


class Attention:
    """The CUDA C++ attention kernels of one module: on a GPU (`_native`) or on the host (`_simt`)."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def unsupported(self, problem: AttentionProblem) -> str | None:
        """Why a problem cannot be served, with the name of the argument. None if it can."""
        query, value = problem.query, problem.value
        if query.dtype not in (torch.bfloat16, torch.float16):
            return f"query is {query.dtype}, and it serves torch.bfloat16 and torch.float16"
        if query.shape[3] not in HEAD_SIZES or value.shape[3] != query.shape[3]:
            sizes = f"the head sizes of query and value are {query.shape[3]} and {value.shape[3]}"
            return f"{sizes}, and it serves {', '.join(map(str, HEAD_SIZES))}, the same for both"
        for name, argument in (("sinks", problem.sinks), ("cu_seqlens", problem.cu_seqlens)):
            if argument is not None:
                return f"{name} is given, and it does not serve that"
        for name, tensor in _inputs(problem).items():
            reason = self._launcher.unsupported_tensor(name, tensor)
            if reason is None and not _is_aligned(tensor):
                reason = f"rows of {name} do not begin at multiples of {_ALIGNMENT} bytes"
            if reason is not None:
                return reason
        return None

    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """out [B, Hq, M, D] and lse [B, Hq, M]."""
        out = empty_output(problem)
        lse = problem.query.new_empty(problem.query.shape[:3], dtype=torch.float32)
        inputs = _kernel_inputs(problem)
        with (
            self._launcher.launching(inputs, (out, lse)) as module,
            kernel_range("attention_forward", _TILE, _TILE),
        ):
            _compiled_problem(module, problem, inputs).forward(
                _view(out), _vector(lse), self._launcher.stream(out.device)
            )
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
        """Gradients of the inputs that `needs` names. Those of prompts are summed in fp32, in a fixed order."""
        # Not `contiguous`: it returns a dense tensor as it is, also if its address is not aligned.
        out, grad_out = (
            t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in (out, grad_out)
        )
        lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.float().contiguous()
        delta = torch.empty_like(lse)
        splits = self._splits(problem) if needs.prompt_key or needs.prompt_value else 1
        gradients = [
            _empty_like(tensor, own=index < 3) if need else None
            for index, (tensor, need) in enumerate(zip(_inputs(problem).values(), needs[:5], strict=True))
        ]
        partials = [
            delta.new_empty(splits, *gradient.shape) if gradient is not None and splits > 1 else None
            for gradient in gradients[3:]
        ]
        inputs = _kernel_inputs(problem)
        reads, writes = (*inputs, out, grad_out, lse, grad_lse), (*gradients, *partials, delta)
        other = _TILE if out.shape[3] <= 64 else _TILE // 2  # keys of a tile of dQ, rows of a tile of dK and dV
        with self._launcher.launching(reads, writes) as module, kernel_range("attention_backward", _TILE, other):
            _compiled_problem(module, problem, inputs).backward(
                _view(out),
                _view(grad_out),
                _vector(lse),
                _optional(grad_lse, _vector),
                _vector(delta),
                splits,
                *(_optional(partial, _vector) for partial in partials),
                *(_optional(gradient, _view) for gradient in gradients),
                self._launcher.stream(out.device),
            )
        query, key, value, prompt_key, prompt_value = gradients
        return Gradients(query, key, value, prompt_key, prompt_value, None)

    def _splits(self, problem: AttentionProblem) -> int:
        """Blocks that share the rows of one tile of prompt keys: more if the tiles alone do not fill the GPU."""
        prompts, kv_heads, prompt_keys, _ = problem.prompt_key.shape
        tiles = -(-prompt_keys // _TILE) * prompts * kv_heads
        if tiles == 0:
            return 1
        batch, _, queries, _ = problem.query.shape
        row_tiles = batch * -(-queries * problem.group // _TILE)
        blocks_wanted = 2 * self._launcher.multiprocessors(problem.query.device)
        return max(1, min(-(-blocks_wanted // tiles), row_tiles, _MAX_SPLITS))


def _inputs(problem: AttentionProblem) -> dict[str, Tensor]:
    return {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "prompt_key": problem.prompt_key,
        "prompt_value": problem.prompt_value,
    }


def _kernel_inputs(problem: AttentionProblem) -> list[Tensor | None]:
    """The tensors that the kernels read: `_inputs`, then the three index tensors."""
    lengths = (problem.prompt_index, problem.prompt_lengths, problem.key_lengths)
    return [*_inputs(problem).values(), *(_optional(t, Tensor.contiguous) for t in lengths)]


def _compiled_problem(module: Any, problem: AttentionProblem, inputs: list[Tensor | None]) -> Any:
    return module.AttentionProblem(
        DTYPES[problem.query.dtype],
        *(_view(tensor) for tensor in _inputs(problem).values()),
        *(_optional(tensor, _vector) for tensor in inputs[5:]),
        problem.causal,
        problem.window,
        problem.softcap,
        problem.scale,
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row is dense and begins at a multiple of 16 bytes."""
    if tensor.numel() == 0:
        return True
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    each = tensor.element_size()
    return tensor.stride(-1) == 1 and all(
        n % _ALIGNMENT == 0 for n in (tensor.data_ptr(), *(s * each for s in strides))
    )


def _empty_like(tensor: Tensor, own: bool) -> Tensor:
    """Uninitialised. A sequence's own tensors are laid out as [batch, token, head, size] in memory."""
    return empty_token_major(tensor, *tensor.shape) if own else tensor.new_empty(tensor.shape)


def _view(tensor: Tensor) -> View:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _vector(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _optional(tensor: Tensor | None, use: Any) -> Any:
    return None if tensor is None else use(tensor)
