"""Expectations of a head's weights under its own distribution: one pass over tiles of the vocabulary, GEMMs by cuBLAS.

Each chunk of tokens and tile of vocabulary entries has three steps:

    1. a GEMM for the logits, in fp32
    2. a backend's row kernel, which turns them into e = exp(z − m) and rescales the sums when m grows
    3. a GEMM that adds e W to the mean in fp32

Cost, in units of one GEMM of the head's size: 1 for the logits. For the mean 1 in fp32 and 2 with a 16-bit head, where
e is multiplied in two parts: e rounded to 16 bits, and the rounding error. With one part (bf16), the gradient E_p[W] −
m of a student is wrong by 1 to 3 % at a divergence of 1e-3 and by 20 to 40 % at 5e-6. With two parts it is wrong by
5e-5 and 6e-4 (V = 4000, d = 256, largest probability 0.01 and 0.2 on average). fp16 has no small numbers, so e is
scaled by 2¹⁵ there.

Memory: 4 bytes per token of a chunk and entry of a tile, 8 with a 16-bit head and a mean. No other logits exist. The
row kernel skips tokens of weight 0. A label that is not in the vocabulary is an error on the device, as in PyTorch's
own losses, so that nothing waits for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.device import gemm
from softprompt_kernels.kernels.device.memory import aligned, chunk_size
from softprompt_kernels.kernels.device.rows import Launch, Parts, RowKernels, device_rows
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, ExpectationState

# Vocabulary entries. A tile adds each part of e to the mean: 8 bytes for 2 · _TILE FLOP, 5 % of the GEMM's time on an
# H100.
_TILE = 16384
_FP16_SCALE = 32768.0  # of e


def forward(problem: ExpectationProblem, row_kernels: RowKernels[Any]) -> Expectation:
    """For each row: lse(z) in float64, z of the label, E_p[W] and E_p[bias]."""
    hidden, weight = problem.hidden, problem.head.weight
    vocab = weight.shape[0]
    if problem.labels is not None:
        torch._assert_async((problem.labels < vocab).all(), f"labels must be below the vocabulary's size {vocab}")
    state, workspace = _initial_state(problem), Workspace.of(problem)
    for tokens in _slices(hidden.shape[0], workspace.tokens):
        for columns in _slices(vocab, workspace.columns):
            launch, logits, parts = plan_tile(problem, workspace, state, tokens, columns, row_kernels)
            gemm.head_logits(logits, hidden[tokens], weight[columns])
            row_kernels.run([launch], hidden.device)
            if state.mean is not None:
                for part in (parts.high, parts.low):
                    if part is not None:
                        gemm.pull_back(part, weight[columns], out=state.mean[tokens])
    return _expectation(problem, state, workspace.part_scale)


def plan(problem: ExpectationProblem, row_kernels: RowKernels[Launch]) -> list[Launch]:
    """The launch of the first tile of the first chunk, for inspection, as `chunked_logits.plan`."""
    workspace = Workspace.of(problem)
    tokens = next(_slices(problem.hidden.shape[0], workspace.tokens))
    columns = next(_slices(problem.head.weight.shape[0], workspace.columns))
    return [plan_tile(problem, workspace, _initial_state(problem), tokens, columns, row_kernels)[0]]


@dataclass(frozen=True)
class Workspace:
    """The buffers of a chunk and its tiles, beside the hidden states and the online softmax state."""

    tokens: int  # of a chunk, at most
    columns: int  # of a tile, at most
    logits: Tensor  # [tokens, columns] fp32, rows aligned; with an fp32 head, e overwrites it
    parts: Tensor | None  # [2, tokens, columns] in 16 bits, both parts of e
    part_scale: float
    bias: Tensor | None  # [V] fp32
    weights: Tensor | None  # [N] fp32

    @classmethod
    def of(cls, problem: ExpectationProblem) -> "Workspace":
        """As large as memory allows."""
        hidden, columns = problem.hidden, min(_TILE, problem.head.weight.shape[0])
        is_16_bit = problem.need_mean and hidden.dtype in gemm.SIXTEEN_BITS
        tokens = chunk_size(hidden.shape[0], problem.chunk_tokens, (8 if is_16_bit else 4) * aligned(columns))
        return cls(
            tokens,
            columns,
            hidden.new_empty(tokens, aligned(columns), dtype=torch.float32),
            hidden.new_empty(2, tokens, aligned(columns)) if is_16_bit else None,
            _FP16_SCALE if is_16_bit and hidden.dtype == torch.float16 else 1.0,
            device_rows(problem.head.bias),
            device_rows(problem.weights),
        )


def plan_tile(
    problem: ExpectationProblem,
    workspace: Workspace,
    state: ExpectationState,
    tokens: slice,
    columns: slice,
    row_kernels: RowKernels[Launch],
) -> tuple[Launch, Tensor, Parts]:
    """The row kernel of a tile, the tensor that it expects h Wᵀ in, and the tensors that get e."""
    count, width = tokens.stop - tokens.start, columns.stop - columns.start
    logits = workspace.logits[:count, :width]
    parts = Parts()
    if workspace.parts is not None:
        high, low = workspace.parts[:, :count, :width]
        parts = Parts(high, low, workspace.part_scale)
    elif problem.need_mean:
        parts = Parts(logits)
    launch = row_kernels.exponentials(
        logits,
        None if workspace.bias is None else workspace.bias[columns],
        problem.head.logit_scale / problem.temperature,
        columns.start,
        None if workspace.weights is None else workspace.weights[tokens],
        _state_of(state, tokens),
        parts,
    )
    return launch, logits, parts


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _initial_state(problem: ExpectationProblem) -> ExpectationState:
    hidden = problem.hidden

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape, dtype=dtype)

    tokens = hidden.shape[0]
    return ExpectationState(
        hidden.new_full((tokens,), -torch.inf, dtype=torch.float32),
        zeros(tokens, dtype=torch.float64),
        zeros(*hidden.shape, dtype=torch.float32) if problem.need_mean else None,
        zeros(tokens, dtype=torch.float64) if problem.head.bias is not None else None,
        problem.labels,
        zeros(tokens, dtype=torch.float32) if problem.labels is not None else None,
    )


def _state_of(state: ExpectationState, rows: slice) -> ExpectationState:
    """The state of some rows, as views."""
    fields = (state.row_max, state.row_sum, state.mean, state.bias_sum, state.labels, state.label_logit)
    return ExpectationState(*(None if f is None else f[rows] for f in fields))  # type: ignore[arg-type]


def _expectation(problem: ExpectationProblem, state: ExpectationState, part_scale: float) -> Expectation:
    log_partition = state.row_max.double() + state.row_sum.log()
    row_sum = state.row_sum
    if problem.weights is not None:
        skipped = problem.weights == 0
        log_partition = torch.where(skipped, 0.0, log_partition)
        row_sum = torch.where(skipped, 1.0, row_sum)
    mean, bias_mean = state.mean, None
    if mean is not None:
        mean.div_((row_sum * part_scale).float()[:, None])
    if state.bias_sum is not None:
        bias_mean = (state.bias_sum / row_sum).float()
    return Expectation(log_partition, state.label_logit, mean, bias_mean)
