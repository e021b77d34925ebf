"""What a head's distribution expects of its own weights: a sweep over tiles of the vocabulary, products by cuBLAS.

For a chunk of tokens and a tile of words: one product for the logits, in fp32; row work that turns them into
exponentials e = exp(z − m) and rescales what was summed with an older m, by a backend; and e W, added to the
mean in fp32.

In units of one product of the head's size: 1 for the logits, and for the mean 1 in fp32, 2 with a 16-bit head, where e
is multiplied in two parts: e rounded to 16 bits, and what that lost. In one part (bf16) the gradient E_p[W] − m of a
student is off by 1 to 3 % at a divergence of 1e-3 and by 20 to 40 % at 5e-6; in two parts by 5e-5 and 6e-4 (V = 4000,
d = 256, largest probability 0.01 and 0.2 on average). fp16 has no small numbers, so there e is scaled by 2¹⁵.

Memory: 4 bytes for each word and token of a tile, 8 with a 16-bit head and a mean; no more of the logits ever
exists. Tokens of weight 0 are passed over by the row work. A label beyond the vocabulary is an error on the device, as
in PyTorch's own losses: nothing waits for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.device import gemm as products
from softprompt_kernels.kernels.device.memory import aligned, chunk_size
from softprompt_kernels.kernels.device.rows import Launch, Parts, RowWork, device_rows
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, ExpectationState

# Words. A tile adds each of its parts to the mean, 8 bytes for 2 · _TILE FLOP: 5 % of an H100's time for the product.
_TILE = 16384
_FP16_SCALE = 32768.0  # of e


def forward(problem: ExpectationProblem, row_work: RowWork[Any]) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    hidden, weight = problem.hidden, problem.head.weight
    vocab = weight.shape[0]
    if problem.labels is not None:
        torch._assert_async((problem.labels < vocab).all(), f"labels must be below the vocabulary's size {vocab}")
    state, workspace = _initial_state(problem), Workspace.of(problem)
    for tokens in _slices(hidden.shape[0], workspace.tokens):
        for words in _slices(vocab, workspace.words):
            launch, logits, parts = plan_tile(problem, workspace, state, tokens, words, row_work)
            products.head_logits(logits, hidden[tokens], weight[words])
            row_work.run([launch], hidden.device)
            if state.mean is not None:
                for e in (parts.high, parts.low):
                    if e is not None:
                        products.pull_back(e, weight[words], out=state.mean[tokens])
    return _expectation(problem, state, workspace.part_scale)


def plan(problem: ExpectationProblem, row_work: RowWork[Launch]) -> list[Launch]:
    """The launches for the first tile of the first chunk, as `linear_kl_div.plan`."""
    workspace = Workspace.of(problem)
    tokens = next(_slices(problem.hidden.shape[0], workspace.tokens))
    words = next(_slices(problem.head.weight.shape[0], workspace.words))
    return [plan_tile(problem, workspace, _initial_state(problem), tokens, words, row_work)[0]]


@dataclass(frozen=True)
class Workspace:
    """What a tile of a chunk needs beside its hidden states and its state."""

    tokens: int  # of a chunk, at most
    words: int  # of a tile, at most
    logits: Tensor  # [tokens, words] fp32, rows aligned; becomes e with an fp32 head
    parts: Tensor | None  # [2, tokens, words] in 16 bits
    part_scale: float
    bias: Tensor | None  # [V] fp32
    weights: Tensor | None  # [N] fp32

    @classmethod
    def of(cls, problem: ExpectationProblem) -> "Workspace":
        """As large as memory allows."""
        hidden, words = problem.hidden, min(_TILE, problem.head.weight.shape[0])
        narrow = problem.need_mean and hidden.dtype in products.SIXTEEN_BITS
        tokens = chunk_size(hidden.shape[0], problem.chunk_tokens, (8 if narrow else 4) * aligned(words))
        return cls(
            tokens,
            words,
            hidden.new_empty(tokens, aligned(words), dtype=torch.float32),
            hidden.new_empty(2, tokens, aligned(words)) if narrow else None,
            _FP16_SCALE if narrow and hidden.dtype == torch.float16 else 1.0,
            device_rows(problem.head.bias),
            device_rows(problem.weights),
        )


def plan_tile(
    problem: ExpectationProblem,
    workspace: Workspace,
    state: ExpectationState,
    tokens: slice,
    words: slice,
    row_work: RowWork[Launch],
) -> tuple[Launch, Tensor, Parts]:
    """The row work of a tile, where it expects the products, and where it leaves e."""
    count, columns = tokens.stop - tokens.start, words.stop - words.start
    logits = workspace.logits[:count, :columns]
    parts = Parts()
    if workspace.parts is not None:
        high, low = workspace.parts[:, :count, :columns]
        parts = Parts(high, low, workspace.part_scale)
    elif problem.need_mean:
        parts = Parts(logits)
    launch = row_work.exponentials(
        logits,
        None if workspace.bias is None else workspace.bias[words],
        problem.head.logit_scale / problem.temperature,
        words.start,
        None if workspace.weights is None else workspace.weights[tokens],
        _part(state, tokens),
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


def _part(state: ExpectationState, rows: slice) -> ExpectationState:
    fields = (state.largest, state.total, state.mean, state.bias_total, state.labels, state.label_logit)
    return ExpectationState(*(None if f is None else f[rows] for f in fields))  # type: ignore[arg-type]


def _expectation(problem: ExpectationProblem, state: ExpectationState, part_scale: float) -> Expectation:
    log_partition = state.largest.double() + state.total.log()
    total = state.total
    if problem.weights is not None:
        skipped = problem.weights == 0
        log_partition = torch.where(skipped, 0.0, log_partition)
        total = torch.where(skipped, 1.0, total)
    mean, bias_mean = state.mean, None
    if mean is not None:
        mean.div_((total * part_scale).float()[:, None])
    if state.bias_total is not None:
        bias_mean = (state.bias_total / total).float()
    return Expectation(log_partition, state.label_logit, mean, bias_mean)
