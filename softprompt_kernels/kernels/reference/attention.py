"""Attention over [prompt ; own tokens] in plain PyTorch: the definition.

Forward, with S = softcap(scale · Q Kᵀ) over the concatenated keys and `-inf` where a key is not visible:

    lse = log( Σ_k exp(S_k) + exp(sink) ),   A = exp(S − lse),   out = A V

Backward, from the saved out and lse:

    dS  = A ∘ ( dO Vᵀ − rowsum(dO ∘ out) + dlse )
    dV  = Aᵀ dO,   dQ = scale · dS' K,   dK = scale · dS'ᵀ Q,   dS' = dS ∘ (1 − (S / softcap)²)
    dsink = Σ exp(sink − lse) · (dlse − rowsum(dO ∘ out))

A query that sees no key has out 0, lse −inf and gradient 0. Such queries, and padding keys, may hold anything, NaN
included. All arithmetic is fp32 (float64 for float64 inputs). Memory is O(B · Hq · M · (P + N)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs, empty_output
from softprompt_kernels.kernels.reference.visibility import Visibility, prompt_rows, visibility


@dataclass(frozen=True)
class _Inputs:
    """A problem with prompt keys and own keys concatenated to K keys, and query heads split into [Hkv, g]."""

    query: Tensor  # [B, Hkv, g, M, D]
    key: Tensor  # [B, Hkv, 1, K, D]
    value: Tensor  # [B, Hkv, 1, K, Dv]
    visible: Tensor  # [B|1, 1, 1, M, K]
    sees_any: Tensor  # [B|1, 1, 1, M], whether the query sees a key
    sinks: Tensor | None  # [Hkv, g, 1]


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] and lse [B, Hq, M]."""
    inputs = _inputs(problem)
    scores, _ = _scores(problem, inputs)
    lse = torch.logsumexp(scores, dim=-1)  # [B, Hkv, g, M]
    if inputs.sinks is not None:
        lse = torch.where(inputs.sees_any, torch.logaddexp(lse, inputs.sinks), lse)
    probabilities = _probabilities(scores, lse)
    out = empty_output(problem)
    out.copy_((probabilities @ inputs.value).flatten(1, 2))
    return out, lse.flatten(1, 2)


def backward(
    problem: AttentionProblem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of the inputs named in `needs`, each in its input's dtype, prompt gradients summed in fp32."""
    inputs = _inputs(problem)
    scores, tanh = _scores(problem, inputs)
    grad_out = torch.where(inputs.sees_any[..., None], _split_heads(problem, grad_out), 0)
    delta = (grad_out * _split_heads(problem, out)).sum(-1)  # [B, Hkv, g, M]
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype).unflatten(1, delta.shape[1:3])
    lse = lse.unflatten(1, delta.shape[1:3])
    probabilities = _probabilities(scores, lse)

    grad_value = (probabilities.mT @ grad_out).sum(2)  # [B, Hkv, K, Dv]
    grad_scores = probabilities * (grad_out @ inputs.value.mT - delta[..., None])
    if tanh is not None:
        grad_scores = grad_scores * (1 - tanh.square())
    grad_scores = grad_scores * problem.scale
    grad_query = (grad_scores @ inputs.key).flatten(1, 2)
    grad_key = (grad_scores.mT @ inputs.query).sum(2)
    prompt_key, own_key = _split_keys(problem, grad_key)
    prompt_value, own_value = _split_keys(problem, grad_value)
    sinks = _grad_sinks(problem, inputs, lse, delta) if needs.sinks else None
    dtype = problem.query.dtype
    return Gradients(
        grad_query.to(dtype) if needs.query else None,
        own_key.to(dtype) if needs.key else None,
        own_value.to(dtype) if needs.value else None,
        prompt_key.to(dtype) if needs.prompt_key else None,
        prompt_value.to(dtype) if needs.prompt_value else None,
        sinks,
    )


def _split_heads(problem: AttentionProblem, tensor: Tensor) -> Tensor:
    """[B, Hq, M, X] -> [B, Hkv, g, M, X] in the compute dtype."""
    return tensor.to(problem.compute_dtype).unflatten(1, (problem.key.shape[1], problem.group))


def _inputs(problem: AttentionProblem) -> _Inputs:
    mask = visibility(problem)
    sinks = None
    if problem.sinks is not None:
        sinks = problem.sinks.to(problem.compute_dtype).view(problem.key.shape[1], problem.group, 1)
    visible = mask.visible[:, None, None]
    sees_any = visible.any(-1)
    return _Inputs(
        torch.where(sees_any[..., None], _split_heads(problem, problem.query), 0),
        _concatenate(problem, problem.prompt_key, problem.key, mask),
        _concatenate(problem, problem.prompt_value, problem.value, mask),
        visible,
        sees_any,
        sinks,
    )


def _concatenate(problem: AttentionProblem, prompt: Tensor, own: Tensor, mask: Visibility) -> Tensor:
    """The keys (or values) that each sequence may see, [B, Hkv, 1, K, X], with padding set to 0."""
    dtype, batch = problem.compute_dtype, own.shape[0]
    if problem.cu_seqlens is None:
        bank = prompt.to(dtype)[prompt_rows(problem, batch)]  # [B, Hkv, P, X]
    else:
        bank = prompt.to(dtype).transpose(0, 1).flatten(1, 2)[None]  # [1, Hkv, R·P, X]
    both = torch.cat([bank, own.to(dtype)], dim=2)
    return torch.where(mask.key_exists[:, None, :, None], both, 0).unsqueeze(2)


def _split_keys(problem: AttentionProblem, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of concatenated keys -> (bank [R, Hkv, P, X], own [B, Hkv, N, X]): the inverse of `_concatenate`."""
    rows, heads, length, _ = problem.prompt_key.shape
    bank, own = gradient.split([gradient.shape[2] - problem.key.shape[2], problem.key.shape[2]], dim=2)
    if problem.cu_seqlens is not None:
        return bank[0].unflatten(1, (rows, length)).transpose(0, 1).clone(), own
    # The sum over the sequences of each prompt, as a GEMM: unlike index_add, it is deterministic on every device.
    chosen = prompt_rows(problem, gradient.shape[0])[:, None] == torch.arange(rows, device=gradient.device)
    summed = chosen.to(gradient.dtype).mT @ bank.flatten(1)  # [R, Hkv·P·X]
    return summed.view(rows, heads, length, gradient.shape[-1]), own


def _scores(problem: AttentionProblem, inputs: _Inputs) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, Hkv, g, M, K], and tanh(S / softcap) where there is a softcap."""
    scores = inputs.query @ inputs.key.mT * problem.scale
    tanh = None
    if problem.softcap is not None:
        tanh = torch.tanh(scores / problem.softcap)
        scores = tanh * problem.softcap
    return torch.where(inputs.visible, scores, -torch.inf), tanh


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(S − lse), 0 in rows that see no key."""
    return torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])


def _grad_sinks(problem: AttentionProblem, inputs: _Inputs, lse: Tensor, delta: Tensor) -> Tensor:
    assert problem.sinks is not None and inputs.sinks is not None
    share = torch.where(lse == -torch.inf, 0, torch.exp(inputs.sinks - lse))
    return -(share * delta).sum((0, -1)).flatten().to(problem.sinks.dtype)


def unsupported(problem: AttentionProblem) -> str | None:
    """The reference serves every problem."""
    return None
