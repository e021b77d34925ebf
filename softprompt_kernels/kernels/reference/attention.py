"""Attention over [prompt ; own tokens]: the definition, in plain PyTorch.

Forward, with S = softcap(scale · Q Kᵀ) over the concatenated keys and `-inf` where a key is not visible:

    lse = log( Σ_k exp(S_k) + exp(sink) ),   A = exp(S − lse),   out = A V

Backward, from the saved out and lse:

    dS  = A ∘ ( dO Vᵀ − rowsum(dO ∘ out) + dlse )
    dV  = Aᵀ dO,   dQ = scale · dS' K,   dK = scale · dS'ᵀ Q,   dS' = dS ∘ (1 − (S / softcap)²)
    dsink = Σ exp(sink − lse) · (dlse − rowsum(dO ∘ out))

A query that sees no key has out 0, lse −inf and no gradient. It, and padding keys, may hold anything, NaN included.
All work is done in fp32 (float64 for float64 inputs); memory is O(B · Hq · M · (P + N)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs, empty_output
from softprompt_kernels.kernels.reference.visibility import Visibility, prompt_rows, visibility


@dataclass(frozen=True)
class _Joined:
    """A problem with prompt and own keys in one run of K keys, heads folded to [Hkv, g]."""

    query: Tensor  # [B, Hkv, g, M, D]
    key: Tensor  # [B, Hkv, 1, K, D]
    value: Tensor  # [B, Hkv, 1, K, Dv]
    visible: Tensor  # [B|1, 1, 1, M, K]
    seen: Tensor  # [B|1, 1, 1, M], the query sees a key
    sinks: Tensor | None  # [Hkv, g, 1]


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] and lse [B, Hq, M]."""
    joined = _join(problem)
    scores, _ = _scores(problem, joined)
    lse = torch.logsumexp(scores, dim=-1)  # [B, Hkv, g, M]
    if joined.sinks is not None:
        lse = torch.where(joined.seen, torch.logaddexp(lse, joined.sinks), lse)
    weights = _weights(scores, lse)
    out = empty_output(problem)
    out.copy_((weights @ joined.value).flatten(1, 2))
    return out, lse.flatten(1, 2)


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of the inputs named in `needs`, each in its input's dtype, prompt gradients summed in fp32."""
    joined = _join(problem)
    scores, capped = _scores(problem, joined)
    grad_out = torch.where(joined.seen[..., None], _fold(problem, grad_out), 0)
    delta = (grad_out * _fold(problem, out)).sum(-1)  # [B, Hkv, g, M]
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype).unflatten(1, delta.shape[1:3])
    lse = lse.unflatten(1, delta.shape[1:3])
    weights = _weights(scores, lse)

    grad_value = (weights.mT @ grad_out).sum(2)  # [B, Hkv, K, Dv]
    grad_scores = weights * (grad_out @ joined.value.mT - delta[..., None])
    if capped is not None:
        grad_scores = grad_scores * (1 - capped.square())
    grad_scores = grad_scores * problem.scale
    grad_query = (grad_scores @ joined.key).flatten(1, 2)
    grad_key = (grad_scores.mT @ joined.query).sum(2)
    prompt_key, own_key = _split(problem, grad_key)
    prompt_value, own_value = _split(problem, grad_value)
    sinks = _grad_sinks(problem, joined, lse, delta) if needs.sinks else None
    dtype = problem.query.dtype
    return Gradients(
        grad_query.to(dtype) if needs.query else None,
        own_key.to(dtype) if needs.key else None,
        own_value.to(dtype) if needs.value else None,
        prompt_key.to(dtype) if needs.prompt_key else None,
        prompt_value.to(dtype) if needs.prompt_value else None,
        sinks,
    )


def _fold(problem: AttentionProblem, tensor: Tensor) -> Tensor:
    """[B, Hq, M, X] -> [B, Hkv, g, M, X] in the dtype of the computation."""
    return tensor.to(problem.compute_dtype).unflatten(1, (problem.key.shape[1], problem.group))


def _join(problem: AttentionProblem) -> _Joined:
    mask = visibility(problem)
    sinks = None
    if problem.sinks is not None:
        sinks = problem.sinks.to(problem.compute_dtype).view(problem.key.shape[1], problem.group, 1)
    visible = mask.visible[:, None, None]
    seen = visible.any(-1)
    return _Joined(
        torch.where(seen[..., None], _fold(problem, problem.query), 0),
        _concatenate(problem, problem.prompt_key, problem.key, mask),
        _concatenate(problem, problem.prompt_value, problem.value, mask),
        visible,
        seen,
        sinks,
    )


def _concatenate(problem: AttentionProblem, prompt: Tensor, own: Tensor, mask: Visibility) -> Tensor:
    """The keys (or values) that each sequence may see, [B, Hkv, 1, K, X], with padding set to 0."""
    dtype, batch = problem.compute_dtype, own.shape[0]
    if problem.cu_seqlens is None:
        bank = prompt.to(dtype)[prompt_rows(problem, batch)]  # [B, Hkv, P, X]
    else:
        bank = prompt.to(dtype).transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, R·P, X]
    joined = torch.cat([bank, own.to(dtype)], dim=2)
    return torch.where(mask.key_exists[:, None, :, None], joined, 0).unsqueeze(2)


def _split(problem: AttentionProblem, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of joined keys -> (bank [R, Hkv, P, X], own [B, Hkv, N, X]): the inverse of `_concatenate`."""
    rows, heads, length, _ = problem.prompt_key.shape
    bank, own = gradient.split([gradient.shape[2] - problem.key.shape[2], problem.key.shape[2]], dim=2)
    if problem.cu_seqlens is not None:
        return bank[0].unflatten(1, (rows, length)).transpose(0, 1).clone(), own
    # A sum over the sequences of each prompt, as a product: unlike index_add it is deterministic on every device.
    chosen = prompt_rows(problem, gradient.shape[0])[:, None] == torch.arange(rows, device=gradient.device)
    summed = chosen.to(gradient.dtype).mT @ bank.flatten(1)  # [R, Hkv·P·X]
    return summed.view(rows, heads, length, gradient.shape[-1]), own


def _scores(problem: AttentionProblem, joined: _Joined) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, Hkv, g, M, K], and tanh(S / softcap) where there is a softcap."""
    scores = joined.query @ joined.key.mT * problem.scale
    capped = None
    if problem.softcap is not None:
        capped = torch.tanh(scores / problem.softcap)
        scores = capped * problem.softcap
    return torch.where(joined.visible, scores, -torch.inf), capped


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(S − lse), 0 in rows that see no key."""
    return torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])


def _grad_sinks(problem: AttentionProblem, joined: _Joined, lse: Tensor, delta: Tensor) -> Tensor:
    assert problem.sinks is not None and joined.sinks is not None
    share = torch.where(lse == -torch.inf, 0, torch.exp(joined.sinks - lse))
    return -(share * delta).sum((0, -1)).flatten().to(problem.sinks.dtype)


def unsupported(problem: AttentionProblem) -> str | None:
    """The reference serves every problem."""
    return None
