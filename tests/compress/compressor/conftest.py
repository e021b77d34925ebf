"""A compressor of the tiny model, with and without LoRA, and what it learns from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, SilentReporter
from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.form import Form
from softprompt_kernels.compress.compressor.lessons import Assignment, Lesson, Teacher
from softprompt_kernels.compress.compressor.lora import Lora
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.models import head_of

TOKENS = 3


def perturb(lora: Lora, dtype: torch.dtype) -> Lora:
    """LoRA as after some training, in `dtype`: B is not 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora.named_parameters().items():
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lora


@pytest.fixture
def make_compressor(model: PreTrainedModel) -> Iterator[Callable[..., Compressor]]:
    """`make_compressor(rank=2, state="accumulated")`; LoRA layers are taken out at the end."""
    attached: list[Lora] = []

    def make(rank: int = 0, state: str = "replaced", segment_tokens: int = 16, model=model) -> Compressor:
        summary = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(3), dtype=model.dtype)
        lora = perturb(Lora(model, rank), model.dtype) if rank else None
        if lora is not None:
            attached.append(lora)
        return Compressor(model, Form(TOKENS, state, segment_tokens, rank), summary, lora)

    yield make
    for lora in attached:
        lora.detach()


@pytest.fixture
def assignments() -> list[Assignment]:
    """Three contexts of different lengths, one of them with a given answer."""
    generator = torch.Generator().manual_seed(4)
    return [
        Assignment(name, torch.randint(0, 250, (tokens,), generator=generator), (Query("Who?"), Query("Why?", answer)))
        for name, tokens, answer in (("one", 20, None), ("two", 14, "So."), ("three", 17, None))
    ]


@pytest.fixture
def make_teacher(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., Teacher]:
    def make(objective: str = "kl") -> Teacher:
        return Teacher(
            model, ChatFormat(tokenizer), Objective(objective, head_of(model)), tmp_path, "key", 4, 1.0, 8, 0
        )

    return make


@pytest.fixture
def lessons(make_teacher: Callable[..., Teacher], assignments: list[Assignment]) -> list[Lesson]:
    return make_teacher().lessons(assignments, evaluated=False, reporter=SilentReporter(), description="")
