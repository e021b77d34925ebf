"""A tiny model with its tokenizer, prompts of both kinds, and what their files are read from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.files import read
from softprompt_kernels.models import prefix_of, prompted_logits
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, save

K = 6


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture
def plain_model(tiny_model_folder: Path) -> LlamaForCausalLM:
    """The same model as transformers has it, for other packages."""
    found: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    return found


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(0, 250, (1, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def kv() -> KVPrompt:
    key, value = torch.randn(2, 2, 2, K, 8, generator=torch.Generator().manual_seed(1))
    return KVPrompt(key, value, frozen_tokens=1)


@pytest.fixture
def embedding() -> EmbeddingPrompt:
    return EmbeddingPrompt(torch.randn(K, 32, generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def saved(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """`saved(prompt)`: the folder of a saved prompt with a record. Options go to `save`."""

    def make(prompt: KVPrompt | EmbeddingPrompt, name: str = "saved", **options: Any) -> Path:
        record = {
            "context": {"sha256": "ab" * 32, "tokens": 40},
            "objective": {"name": "kl", "steps": 2},
            "figures": {"kl_prompt": 0.25, "kl_none": 1.0, "recovered": 0.75},
        }
        save(tmp_path / name, prompt, model=model, tokenizer=tokenizer, **(record | options))
        return tmp_path / name

    return make


@pytest.fixture
def content(saved: Callable[..., Path], kv: KVPrompt) -> Content:
    return read(saved(kv))


@pytest.fixture
def logits(model: PreTrainedModel, ids: Tensor) -> Callable[..., Tensor]:
    """`logits(prompt)`: this package's logits behind a prompt."""

    @torch.no_grad()
    def run(prompt: KVPrompt | EmbeddingPrompt) -> Tensor:
        return prompted_logits(model, ids, prefix_of(model, prompt))

    return run
