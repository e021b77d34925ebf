"""Float64 oracles, written from the formulas, without any code of the package."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _attention_oracle(
    query, key, value, prompt_key, prompt_value, *, prompt_index=None, prompt_lengths=None, key_lengths=None,
    causal=True, window=None, softcap=None, sinks=None, scale=None,
):  # fmt: skip
    """out and lse, query by query and key by key: no mask, no tensor of scores. Differentiable."""
    query, key, value, prompt_key, prompt_value = (t.double() for t in (query, key, value, prompt_key, prompt_value))
    batch, heads, queries, size = query.shape
    kv_heads, own = key.shape[1:3]
    rows, _, prompt, _ = prompt_key.shape
    scale = 1 / math.sqrt(size) if scale is None else scale
    out, lse = [], []
    for b in range(batch):
        r = int(prompt_index[b]) if prompt_index is not None else (0 if rows == 1 else b)
        length = prompt if prompt_lengths is None else int(prompt_lengths[r])
        kept = own if key_lengths is None else int(key_lengths[b])
        for h in range(heads):
            group = h // (heads // kv_heads)
            for i in range(queries):
                position = length + own - queries + i
                seen = [(p, prompt_key[r, group, p], prompt_value[r, group, p]) for p in range(length)]
                seen += [(length + j, key[b, group, j], value[b, group, j]) for j in range(kept)]
                if causal or window is not None:
                    seen = [s for s in seen if s[0] <= position]
                if window is not None:
                    seen = [s for s in seen if position - s[0] < window]
                if not seen:
                    out.append(query.new_zeros(value.shape[3]))
                    lse.append(query.new_tensor(-math.inf))
                    continue
                scores = torch.stack([scale * (query[b, h, i] * k).sum() for _, k, _ in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                terms = scores if sinks is None else torch.cat([scores, sinks[h].double()[None]])
                total = torch.logsumexp(terms, 0)
                out.append((torch.exp(scores - total)[:, None] * torch.stack([v for _, _, v in seen])).sum(0))
                lse.append(total)
    shape = (batch, heads, queries)
    return torch.stack(out).view(*shape, value.shape[3]), torch.stack(lse).view(shape)


def _divergence_oracle(student: Tensor, teacher: Tensor, kind="forward", beta=0.5, temperature=1.0) -> Tensor:
    """Loss of each row of finite logits, as a sum of p log(p / q) in float64. Differentiable."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    mixture = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    loss = {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }[kind]()
    return loss * temperature**2


@pytest.fixture
def attention_oracle() -> Callable[..., tuple[Tensor, Tensor]]:
    return _attention_oracle


@pytest.fixture
def divergence_oracle() -> Callable[..., Tensor]:
    return _divergence_oracle


@pytest.fixture
def attention_tensors() -> Callable[..., list[Tensor]]:
    """Makes query, key, value, prompt_key and prompt_value of given sizes."""

    def make(
        batch=2, heads=4, kv_heads=2, queries=5, own=5, rows=1, prompt=3, size=8, value_size=None,
        dtype=torch.float64, grad=False,
    ) -> list[Tensor]:  # fmt: skip
        value_size = size if value_size is None else value_size
        shapes = [
            (batch, heads, queries, size),
            (batch, kv_heads, own, size),
            (batch, kv_heads, own, value_size),
            (rows, kv_heads, prompt, size),
            (rows, kv_heads, prompt, value_size),
        ]
        return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]

    return make
