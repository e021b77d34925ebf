"""A prompt that is made, moved or read in inference mode can be trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt_kernels.models import prefix_of, prepare, prompted_logits
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, PromptBank, load, save


def _read(model: PreTrainedModel, prompt: KVPrompt | EmbeddingPrompt, path: Path) -> nn.Module:
    save(path / "prompt", prompt, model=model)
    return load(path / "prompt", model)[0]


def _kv(model: PreTrainedModel, random_kv: Callable[..., KVPrompt]) -> KVPrompt:
    key, value = (tensor.detach() for tensor in random_kv(model).stacked())
    return KVPrompt(key, value)


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "kv": lambda model, kv, path: _kv(model, kv),
    "kv, nothing frozen": lambda model, kv, path: KVPrompt(torch.ones(3, 2, 4, 8), torch.ones(3, 2, 4, 8)),
    "of a prefix": lambda model, kv, path: KVPrompt.from_prefix(Prefix.of([(torch.ones(1, 2, 4, 8),) * 2] * 3)),
    "embedding": lambda model, kv, path: EmbeddingPrompt(torch.ones(4, 24), frozen_tokens=1),
    "a bank": lambda model, kv, path: PromptBank([_kv(model, kv), _kv(model, kv)]),
    "in float64": lambda model, kv, path: _kv(model, kv).double(),
    "an embedding in float64": lambda model, kv, path: EmbeddingPrompt(torch.ones(4, 24)).double(),
    "a read kv": lambda model, kv, path: _read(model, _kv(model, kv), path),
    "a read embedding": lambda model, kv, path: _read(model, EmbeddingPrompt(torch.ones(4, 24)), path),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_of_inference_mode_is_trained(
    name: str, make_model: Callable[..., PreTrainedModel], random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    with torch.inference_mode():
        prompt = MAKERS[name](make_model(), random_kv, tmp_path)
    before = {key: tensor.clone() for key, tensor in prompt.named_parameters()}
    assert before
    optimiser = torch.optim.AdamW(prompt.parameters(), lr=0.1)
    made = prompt.vectors()[0] if isinstance(prompt, EmbeddingPrompt) else prompt.prefix().layers[0][0]
    (made.square().sum() + sum(tensor.square().sum() for tensor in prompt.parameters())).backward()
    optimiser.step()
    for key, tensor in prompt.named_parameters():
        assert tensor.requires_grad and not torch.equal(tensor, before[key])


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_bank_of_unequal_lengths_is_trained_on_a_model(
    kind: str, moved: bool, make_model: Callable[..., PreTrainedModel], ids: torch.Tensor
) -> None:
    model = make_model().requires_grad_(False)
    prepare(model)
    with torch.inference_mode():
        pairs = (torch.ones(3, 2, 4, 8), torch.ones(3, 2, 2, 8))
        bank = PromptBank(
            [KVPrompt(one, one) for one in pairs]
            if kind == "kv"
            else [EmbeddingPrompt(torch.ones(length, 24)) for length in (4, 2)]
        )
        if moved:
            bank.double().float()
    prompted_logits(model, ids, prefix_of(model, bank), attention_mask=torch.ones_like(ids).tril(5)).sum().backward()
    assert all(parameter.grad is not None for parameter in bank.parameters())


def test_tensors_of_inference_mode_make_a_prompt_that_is_trained() -> None:
    with torch.inference_mode():
        key, value = torch.ones(3, 2, 4, 8), torch.ones(3, 2, 4, 8)
        rows = torch.ones(4, 24)
    for prompt in (KVPrompt(key, value, frozen_tokens=0), EmbeddingPrompt(rows)):
        sum(tensor.square().sum() for tensor in prompt.parameters()).backward()
        assert all(tensor.grad is not None for tensor in prompt.parameters())
