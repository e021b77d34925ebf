"""Embedding prompt: k trainable vectors before the token embeddings (prompt tuning).

    σ [k, d],  input of the model = [σ ; embed(tokens)]

The model turns σ into a prefix in one run over σ alone (`models.embed_prefix`). This is exact: prompt tokens come first
and attention is causal, so their keys and values do not depend on the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from softprompt_kernels.prompts.kv import to_training_dtype


class EmbeddingPrompt(nn.Module):
    """One trainable sequence of embeddings: prompt tuning (arXiv 2104.08691).

    Parameter `embedding [k−n, d]` holds the trainable rows. Buffer `frozen [n, d]` holds the first n = `frozen_tokens`
    rows, which neither gradients nor weight decay change. Both are fp32 whatever dtype the model computes in.

    Args:
        embedding: `[k, d]`, all rows, frozen ones first. Copied and converted to fp32 (float64 stays). The rows take
            the place of the output of the model's embedding module, which is the input of its first decoder layer.
        frozen_tokens: n, from 0 to k.

    Raises:
        ValueError: `embedding` is not `[k, d]` with k ≥ 1, or `frozen_tokens` is out of range.
    """

    def __init__(self, embedding: Tensor, *, frozen_tokens: int = 0) -> None:
        super().__init__()
        if embedding.dim() != 2 or embedding.shape[0] < 1:
            raise ValueError(f"embedding: got shape {tuple(embedding.shape)}, accepted is [k, d] with k ≥ 1")
        if not 0 <= frozen_tokens <= embedding.shape[0]:
            raise ValueError(
                f"frozen_tokens: got {frozen_tokens}, accepted is 0 to {embedding.shape[0]} (the prompt's length)"
            )
        self.frozen: Tensor
        with torch.inference_mode(False):  # a tensor made in inference mode could never be trained
            embedding = to_training_dtype(embedding)
            self.embedding = nn.Parameter(embedding[frozen_tokens:].clone())
            # An empty buffer stays out of the state: in a bank, accelerate would take all of them for one tensor.
            self.register_buffer("frozen", embedding[:frozen_tokens].clone(), persistent=frozen_tokens > 0)

    @property
    def length(self) -> int:
        """k tokens, including frozen rows."""
        return self.frozen_tokens + self.embedding.shape[0]

    @property
    def frozen_tokens(self) -> int:
        """n, the number of rows at the start that are not trained."""
        return self.frozen.shape[0]

    @property
    def hidden_size(self) -> int:
        """d, the size of a vector."""
        return self.embedding.shape[1]

    def vectors(self, dtype: torch.dtype | None = None) -> Tensor:
        """All k rows `[k, d]`, differentiable, in `dtype` (None: as stored, fp32)."""
        rows = self.embedding if self.frozen_tokens == 0 else torch.cat((self.frozen, self.embedding))
        return rows.to(dtype)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """As `vectors`. DistributedDataParallel and hooks see a use of the prompt only if it is called."""
        return self.vectors(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with torch.inference_mode(False):  # `to` makes new parameters
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"tokens={self.length}, hidden_size={self.hidden_size}, frozen={self.frozen_tokens}"
