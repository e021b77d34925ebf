"""A bank of several prompts. Each sequence of a batch can read another prompt.

The prompts are of one kind and one model; their lengths k_r may differ. They are padded at the end to the longest,
K = max k_r, and the lengths are kept. A sequence that reads prompt r continues at position k_r, as without a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.prefix import Prefix


class PromptBank(nn.Module):
    """R prompts. The bank holds the prompts themselves, not copies: training it trains them.

    Args:
        prompts: one or more, all `EmbeddingPrompt` or all `KVPrompt`, of one model's shape.

    Raises:
        ValueError: no prompts, different kinds, or shapes of different models.
    """

    def __init__(self, prompts: Sequence[EmbeddingPrompt | KVPrompt]) -> None:
        super().__init__()
        if not prompts:
            raise ValueError("prompts: got none, accepted is one or more")
        shapes = [(type(prompt).__name__, model_shape(prompt)) for prompt in prompts]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"prompts[{index}]: got {shape[0]} of {shape[1]}, "
                    f"accepted is what the first one is: {shapes[0][0]} of {shapes[0][1]}"
                )
        self.prompts = nn.ModuleList(prompts)
        self.lengths: Tensor
        with torch.inference_mode(False):  # a graph cannot keep a tensor of inference mode
            lengths = torch.tensor([prompt.length for prompt in prompts], device="cpu")
        self.register_buffer("lengths", lengths, persistent=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_kv(self) -> bool:
        """Whether the bank holds KV prompts (use `prefix`) or embedding prompts (use `vectors`)."""
        return isinstance(self.prompts[0], KVPrompt)

    @property
    def length(self) -> int:
        """K, tokens of the longest prompt."""
        return max(cast(EmbeddingPrompt | KVPrompt, prompt).length for prompt in self.prompts)

    def ragged_lengths(self) -> Tensor | None:
        """The prompts' lengths `[R]` int64, or None if all are equal."""
        longest = self.length
        ragged = any(prompt.length != longest for prompt in self.prompts)
        return self.lengths if ragged else None

    def prefix(self, dtype: torch.dtype | None = None) -> Prefix:
        """A prefix of R rows of K tokens, differentiable, in `dtype` (None: fp32). Shorter prompts end with zeros.

        Raises:
            TypeError: the bank holds embedding prompts. Only the model can make a prefix of them.
        """
        if not self.is_kv:
            raise TypeError("prefix: got a bank of EmbeddingPrompt, accepted is KVPrompt (see models.prefix_of)")
        keys, values = [], []
        longest = self.length
        for prompt in self.prompts:
            key, value = cast(KVPrompt, prompt).stacked(dtype)
            padding = (0, 0, 0, longest - key.shape[2])
            keys.append(pad(key, padding))
            values.append(pad(value, padding))
        layers = zip(torch.stack(keys, dim=1).unbind(), torch.stack(values, dim=1).unbind(), strict=True)
        return Prefix.of(layers, self.ragged_lengths())

    def vectors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """The vectors `[R, K, d]`, differentiable, in `dtype` (None: fp32), and `ragged_lengths`.

        Shorter prompts end with zeros.

        Raises:
            TypeError: the bank holds KV prompts, which have no vectors.
        """
        if self.is_kv:
            raise TypeError("vectors: got a bank of KVPrompt, accepted is EmbeddingPrompt")
        rows = [cast(EmbeddingPrompt, prompt).vectors(dtype) for prompt in self.prompts]
        longest = self.length
        return torch.stack([pad(row, (0, 0, 0, longest - row.shape[0])) for row in rows]), self.ragged_lengths()

    def forward(self, dtype: torch.dtype | None = None) -> Prefix | tuple[Tensor, Tensor | None]:
        """As `prefix` or `vectors`. DistributedDataParallel and hooks see a use of the bank only if it is called."""
        return self.prefix(dtype) if self.is_kv else self.vectors(dtype)


def model_shape(prompt: EmbeddingPrompt | KVPrompt) -> tuple[int, ...]:
    """The sizes that all prompts of one model share: `(L, Hkv, D, Dv)` or `(d,)`."""
    if isinstance(prompt, KVPrompt):
        return (*prompt.key.shape[:2], prompt.key.shape[3], prompt.value.shape[3])
    return (prompt.hidden_size,)
