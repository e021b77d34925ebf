"""Embedding prompt: k vectors in the place of token embeddings (prompt tuning).

    σ [k, d],  input of the model = [σ ; embed(tokens)]

The model turns it into a prefix by running it once, as a sequence of its own (`models.embed_prefix`): prompt tokens
come first and attention is causal, so nothing that follows changes what they compute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softprompt_kernels.prompts.kv import master


class EmbeddingPrompt(nn.Module):
    """One trainable sequence of embeddings.

    Parameter `embedding [k−n, d]` holds the trainable rows, buffer `frozen [n, d]` the first n = `frozen_tokens`,
    out of reach of gradient and weight decay. Both are fp32 masters, whatever the model computes in.

    Args:
        embedding: `[k, d]`, all rows, frozen ones first. Copied, converted to fp32 (float64 stays). It is what the
            first decoder layer would receive for a token: the output of the model's embedding module.
        frozen_tokens: n, from 0 to k.

    Raises:
        ValueError: not `[k, d]` with k ≥ 1, or `frozen_tokens` out of range.
    """

    def __init__(self, embedding: Tensor, *, frozen_tokens: int = 0) -> None:
        super().__init__()
        if embedding.dim() != 2 or embedding.shape[0] < 1:
            raise ValueError(f"embedding: got shape {tuple(embedding.shape)}, accepted is [k, d] with k ≥ 1")
        if not 0 <= frozen_tokens <= embedding.shape[0]:
            raise ValueError(
                f"frozen_tokens: got {frozen_tokens}, accepted is 0 to {embedding.shape[0]} (the prompt's length)"
            )
        embedding = master(embedding)
        self.embedding = nn.Parameter(embedding[frozen_tokens:].clone())
        self.frozen: Tensor
        self.register_buffer("frozen", embedding[:frozen_tokens].clone())

    @property
    def length(self) -> int:
        """k, frozen rows included."""
        return self.frozen_tokens + self.embedding.shape[0]

    @property
    def frozen_tokens(self) -> int:
        """How many rows at the start are not trained."""
        return self.frozen.shape[0]

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.embedding.shape[1]

    def vectors(self, dtype: torch.dtype | None = None) -> Tensor:
        """All k rows `[k, d]`, differentiable, in `dtype` (None: as stored, fp32)."""
        rows = self.embedding if self.frozen_tokens == 0 else torch.cat((self.frozen, self.embedding))
        return rows.to(dtype)

    def extra_repr(self) -> str:
        return f"tokens={self.length}, hidden_size={self.hidden_size}, frozen={self.frozen_tokens}"
