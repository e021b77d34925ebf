"""Tiny models of transformers, with prompts of PEFT."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import CartridgeConfig, PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels import patch
from tests.models.conftest import build, padded, tokens  # noqa: F401

K = 4
KINDS = {"PREFIX_TUNING": PrefixTuningConfig, "CARTRIDGE": CartridgeConfig, "PROMPT_TUNING": PromptTuningConfig}

Pair = tuple[PeftModelForCausalLM, PeftModelForCausalLM]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each PEFT type that can be patched."""
    return request.param


def _with_prompt(base: PreTrainedModel, kind: str, seed: int = 1, **options: object) -> PeftModelForCausalLM:
    options = {"num_virtual_tokens": K, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, KINDS[kind](**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def with_prompt() -> Callable[..., PeftModelForCausalLM]:
    """`with_prompt(base, kind, **options)`: a PEFT model of 4 random virtual tokens, not patched."""
    return _with_prompt


@pytest.fixture
def pair(build: Callable[..., PreTrainedModel]) -> Callable[..., Pair]:  # noqa: F811
    """`pair(kind, family, **options)`: one model twice, as PEFT made it and patched."""

    def make(kind: str, family: str = "llama", **options: object) -> Pair:
        model = _with_prompt(build(family), kind, **options)
        return model, patch(copy.deepcopy(model))

    return make


def _results(model: PeftModelForCausalLM, **inputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of one step."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), output.loss.detach(), gradients


@pytest.fixture
def assert_same_step() -> Callable[..., None]:
    """`assert_same_step(first, second, **inputs)`: logits of real tokens, loss and gradients agree within rounding."""

    def check(first: PeftModelForCausalLM, second: PeftModelForCausalLM, atol: float = 1e-5, **inputs: Tensor) -> None:
        (logits, loss, gradients), (others, other_loss, other_gradients) = (
            _results(one, **inputs) for one in (first, second)
        )
        assert logits.shape == others.shape
        mask = inputs.get("attention_mask")
        if mask is not None:
            prompt = mask.new_ones(mask.shape[0], logits.shape[1] - mask.shape[1])
            real = torch.cat([prompt, mask], dim=1).bool()
            logits, others = logits[real], others[real]
        torch.testing.assert_close(others, logits, atol=atol, rtol=0)
        torch.testing.assert_close(other_loss, loss, atol=atol, rtol=0)
        assert gradients.keys() == other_gradients.keys()
        assert any(bool(gradient.any()) for gradient in gradients.values())
        torch.testing.assert_close(other_gradients, gradients, atol=atol, rtol=0)

    return check
