"""Suites: named lists of cases with the sizes of real models.

Head counts, sizes and vocabularies are those of the models' published configurations; the numbers of tokens are what
a CPU can run. Attention has three cases a model: training, a long prompt, and decoding (one query a sequence).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softprompt_kernels.testing.attention import PromptAttentionCase
from softprompt_kernels.testing.case import Case
from softprompt_kernels.testing.losses import (
    KlDivCase,
    LinearCrossEntropyCase,
    LinearKlDivCase,
    LinearKlDivFromMomentsCase,
    TeacherMomentsCase,
)


class Model(NamedTuple):
    """Sizes of one model."""

    heads: int  # query heads, Hq
    kv_heads: int  # key heads, Hkv
    head_size: int  # D
    hidden: int  # d
    vocab: int  # V


MODELS = {
    "smollm2": Model(9, 3, 64, 576, 49152),  # SmolLM2-135M
    "qwen3": Model(16, 8, 128, 1024, 151936),  # Qwen3-0.6B
    "llama3": Model(32, 8, 64, 2048, 128256),  # Llama 3.2 1B
    "gemma3": Model(4, 1, 256, 1152, 262144),  # Gemma 3 1B
}


def of_model(model: Model, tokens: int = 512) -> list[Case]:
    """The cases of a model. `tokens` is N of the losses from hidden states; `kl_div` has an eighth of it."""
    heads = (model.heads, model.kv_heads)
    head = (tokens, model.hidden, model.vocab)
    return [
        PromptAttentionCase(8, *heads, 256, 128, model.head_size),
        PromptAttentionCase(4, *heads, 128, 2048, model.head_size),
        PromptAttentionCase(8, *heads, 1, 2048, model.head_size),
        KlDivCase(max(1, tokens // 8), model.vocab),
        LinearKlDivCase(*head),
        LinearKlDivFromMomentsCase(*head),
        LinearCrossEntropyCase(*head),
        TeacherMomentsCase(*head),
    ]


def quick() -> list[Case]:
    """Each op once, and the attention twice, with the sizes of SmolLM2, a quarter of its vocabulary and few tokens."""
    model = MODELS["smollm2"]
    heads, head = (model.heads, model.kv_heads), (64, model.hidden, model.vocab // 4)
    return [
        PromptAttentionCase(2, *heads, 128, 64, model.head_size),
        PromptAttentionCase(4, *heads, 1, 1024, model.head_size),
        KlDivCase(64, model.vocab // 4),
        LinearKlDivCase(*head),
        LinearKlDivFromMomentsCase(*head),
        LinearCrossEntropyCase(*head),
        TeacherMomentsCase(*head),
    ]


def scaling() -> list[Case]:
    """One size grows, the others stay: B, P and M of the attention, N and V of the losses."""
    found: list[Case] = [PromptAttentionCase(batch, 8, 2, 128, 128, 64) for batch in (1, 2, 4, 8, 16)]
    found += [PromptAttentionCase(4, 8, 2, 128, prompt, 64) for prompt in (64, 256, 1024, 4096)]
    found += [PromptAttentionCase(4, 8, 2, queries, 128, 64) for queries in (64, 256, 512, 1024)]
    for loss in (LinearKlDivCase, LinearKlDivFromMomentsCase):
        found += [loss(tokens, 256, 16384) for tokens in (64, 128, 256, 512, 1024)]
        found += [loss(256, 256, vocab) for vocab in (4096, 8192, 32768, 65536)]
    found += [KlDivCase(tokens, 16384) for tokens in (64, 128, 256, 512, 1024)]
    found += [KlDivCase(256, vocab) for vocab in (4096, 8192, 32768, 65536)]
    return found


SUITES = ("quick", *MODELS, "scaling")
"""The names of the suites."""


def suite(name: str) -> Sequence[Case]:
    """The cases of a suite.

    Args:
        name: one of `SUITES`.

    Raises:
        ValueError: there is no suite of this name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    if name in MODELS:
        return of_model(MODELS[name])
    return quick() if name == "quick" else scaling()
