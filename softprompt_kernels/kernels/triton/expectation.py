"""What a head's distribution expects of its own weights: a sweep over tiles of the vocabulary, products by cuBLAS.

For a chunk of tokens and a tile of words: one product for the logits, in fp32; row work that turns them into
exponentials e = exp(z − m) and rescales what was summed with an older m (`expectation_rows.py`); and e W, added to the
mean in fp32.

In units of one product of the head's size: 1 for the logits, and for the mean 1 in fp32, 2 with a 16-bit head, where e
is multiplied in two parts: e rounded to 16 bits, and what that lost. In one part (bf16) the gradient E_p[W] − m of a
student is off by 1 to 3 % at a divergence of 1e-3 and by 20 to 40 % at 5e-6; in two parts by 5e-5 and 6e-4 (V = 4000,
d = 256, largest probability 0.01 and 0.2 on average). fp16 has no small numbers, so there e is scaled by 2¹⁵.

Memory: 4 bytes for each word and token of a tile, 8 with a 16-bit head; the logits of the whole vocabulary never
exist. Tokens of weight 0 are passed over by the row work. A label beyond the vocabulary is an error on the device, as
in PyTorch's own losses: nothing waits for it.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.expectation import State
from softprompt_kernels.kernels.loss_problem import Expectation, ExpectationProblem
from softprompt_kernels.kernels.triton import products, runtime
from softprompt_kernels.kernels.triton.memory import aligned, chunk_size
from softprompt_kernels.kernels.triton.rows import Parts, device_rows, plan_exponentials
from softprompt_kernels.kernels.triton.targets import target_of

# Words. A tile adds each of its parts to the mean, 8 bytes for 2 · _TILE FLOP: 5 % of an H100's time for the product.
_TILE = 16384
_FP16_SCALE = 32768.0  # of e


def unsupported(problem: ExpectationProblem) -> str | None:
    """It serves every head in fp32, bf16 and fp16."""
    return runtime.unsupported_tensor("hidden states", problem.hidden)


def forward(problem: ExpectationProblem) -> Expectation:
    """lse(z) in float64, z of the label, E_p[W] and E_p[bias], row by row."""
    hidden, weight = problem.hidden, problem.head.weight
    tokens, vocab, target = hidden.shape[0], weight.shape[0], target_of(hidden.device)
    scale = problem.head.logit_scale / problem.temperature
    bias, weights = device_rows(problem.head.bias), device_rows(problem.weights)
    if problem.labels is not None:
        torch._assert_async((problem.labels < vocab).all(), f"labels must be below the vocabulary's size {vocab}")
    state = _initial_state(problem)
    tile = min(_TILE, vocab)
    split = problem.need_mean and hidden.dtype in products.SIXTEEN_BITS
    size = chunk_size(tokens, problem.chunk_tokens, (8 if split else 4) * aligned(tile))
    logits = hidden.new_empty(size, aligned(tile), dtype=torch.float32)
    narrow = hidden.new_empty(2, size, aligned(tile)) if split else None
    part_scale = _FP16_SCALE if split and hidden.dtype == torch.float16 else 1.0
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        part = _part(state, rows)
        for first in range(0, vocab, tile):
            words = slice(first, min(first + tile, vocab))
            columns = words.stop - first
            z = logits[: rows.stop - start, :columns]
            products.head_logits(z, hidden[rows], weight[words])
            parts = Parts(z, None)
            if narrow is not None:
                high, low = narrow[:, : rows.stop - start, :columns]
                parts = Parts(high, low, part_scale)
            plan_exponentials(
                z,
                None if bias is None else bias[words],
                scale,
                first,
                None if weights is None else weights[rows],
                part,
                parts,
                target,
            ).run()
            if part.mean is not None:
                for e in (parts.high, parts.low):
                    if e is not None:
                        products.pull_back(e, weight[words], out=part.mean)
    return _expectation(problem, state, part_scale)


def _initial_state(problem: ExpectationProblem) -> State:
    hidden = problem.hidden

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape, dtype=dtype)

    tokens = hidden.shape[0]
    return State(
        hidden.new_full((tokens,), -torch.inf, dtype=torch.float32),
        zeros(tokens, dtype=torch.float64),
        zeros(*hidden.shape, dtype=torch.float32) if problem.need_mean else None,
        zeros(tokens, dtype=torch.float64) if problem.head.bias is not None else None,
        problem.labels,
        zeros(tokens, dtype=torch.float32) if problem.labels is not None else None,
    )


def _part(state: State, rows: slice) -> State:
    fields = (state.largest, state.total, state.mean, state.bias_total, state.labels, state.label_logit)
    return State(*(None if f is None else f[rows] for f in fields))  # type: ignore[arg-type]


def _expectation(problem: ExpectationProblem, state: State, part_scale: float) -> Expectation:
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
