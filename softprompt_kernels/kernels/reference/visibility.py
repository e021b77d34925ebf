"""Which keys a query sees, as a boolean mask: the definition of causal, window, lengths and packing.

The prompt's keys come first: a mask is [B or 1, M or 1, K] over K = (prompt keys + N) keys. In the padded form, the
prompt keys of a sequence are the P keys of its own prompt. In the packed form they are all R·P keys of the bank, and
the mask selects the prompt of the query's sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem


@dataclass(frozen=True)
class Visibility:
    """`visible` [B|1, M, K]: the query sees the key. `key_exists` [B|1, K]: the key is not padding."""

    visible: Tensor
    key_exists: Tensor


def prompt_rows(problem: AttentionProblem, sequences: int) -> Tensor:
    """[S] int64: the prompt that each sequence sees."""
    if problem.prompt_index is not None:
        return problem.prompt_index
    device = problem.query.device
    if problem.prompt_key.shape[0] == 1:
        return torch.zeros(sequences, dtype=torch.int64, device=device)
    return torch.arange(sequences, device=device)


def visibility(problem: AttentionProblem) -> Visibility:
    """The masks of a problem. Padding is never visible."""
    return _padded(problem) if problem.cu_seqlens is None else _packed(problem)


def _prompt_lengths(problem: AttentionProblem) -> Tensor:
    """Keys of each prompt without padding, [R] int64."""
    if problem.prompt_lengths is not None:
        return problem.prompt_lengths
    rows, _, length, _ = problem.prompt_key.shape
    return torch.full((rows,), length, dtype=torch.int64, device=problem.query.device)


def _in_range(problem: AttentionProblem, query_position: Tensor, key_position: Tensor) -> Tensor:
    """Whether causal rule and window allow a pair of positions, which broadcast."""
    distance = query_position - key_position
    seen = torch.ones_like(distance, dtype=torch.bool)
    if problem.causal or problem.window is not None:
        seen &= distance >= 0
    if problem.window is not None:
        seen &= distance < problem.window
    return seen


def _padded(problem: AttentionProblem) -> Visibility:
    batch, _, queries, _ = problem.query.shape
    own, prompt = problem.key.shape[2], problem.prompt_key.shape[2]
    device = problem.query.device
    length = _prompt_lengths(problem)[prompt_rows(problem, batch)][:, None]  # [B, 1]
    p = torch.arange(prompt, device=device).expand(batch, prompt)
    j = torch.arange(own, device=device).expand(batch, own)
    i = torch.arange(queries, device=device)
    own_exists = j < (own if problem.key_lengths is None else problem.key_lengths[:, None])
    key_exists = torch.cat([p < length, own_exists], dim=1)  # [B, K]
    key_position = torch.cat([p, length + j], dim=1)  # [B, K]
    query_position = length + (own - queries) + i  # [B, M]
    seen = _in_range(problem, query_position[:, :, None], key_position[:, None, :])
    return Visibility(seen & key_exists[:, None, :], key_exists)


def _packed(problem: AttentionProblem) -> Visibility:
    assert problem.cu_seqlens is not None
    starts = problem.cu_seqlens
    sequences = starts.numel() - 1
    tokens, (rows, _, prompt, _) = problem.query.shape[2], problem.prompt_key.shape
    device = problem.query.device
    token = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(starts[1:].contiguous(), token, right=True)  # [M], S past the last sequence
    exists = sequence < sequences
    # One more entry, for the tokens past the last sequence. They see no prompt: -1 equals no row of the bank.
    row_of = torch.cat([prompt_rows(problem, sequences), torch.full((1,), -1, device=device)])[sequence]  # [M]
    lengths = _prompt_lengths(problem)
    length = torch.cat([lengths, lengths.new_zeros(1)])[row_of]  # [M]
    query_position = length + token - starts[sequence]  # the own keys have the same positions

    bank_row = torch.arange(rows, device=device).repeat_interleave(prompt)  # [R·P]
    bank_position = torch.arange(prompt, device=device).repeat(rows)  # [R·P]
    bank_exists = bank_position < lengths.repeat_interleave(prompt)
    sees_prompt = (
        (row_of[:, None] == bank_row) & bank_exists & _in_range(problem, query_position[:, None], bank_position[None])
    )
    sees_own = (
        (sequence[:, None] == sequence) & exists & _in_range(problem, query_position[:, None], query_position[None])
    )
    visible = torch.cat([sees_prompt, sees_own], dim=1)[None]
    return Visibility(visible, torch.cat([bank_exists, exists])[None])
