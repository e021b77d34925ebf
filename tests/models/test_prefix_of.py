"""`prefix_of` turns every kind of prompt into a prefix, and gradients reach the prompt's parameters."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from softprompt_kernels.models import capture, embed_prefix, prefix_of, prepare, prompted_hidden, prompted_logits
from softprompt_kernels.prompts.bank import PromptBank
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.kv import KVPrompt


@pytest.fixture
def model(build):
    model = build("qwen2")
    prepare(model)
    return model


def random_embedding(k: int) -> EmbeddingPrompt:
    return EmbeddingPrompt(torch.randn(k, 32, generator=torch.Generator().manual_seed(k)), frozen_tokens=1)


def test_no_prompt_and_a_prefix_are_returned_as_they_are(model, tokens):
    prefix = capture(model, tokens(1, 4))
    assert prefix_of(model, None) is None
    assert prefix_of(model, prefix) is prefix


def test_kv_prompt_of_a_context_is_that_context(model, tokens):
    context = capture(model, tokens(1, 6))
    got = prefix_of(model, KVPrompt.from_prefix(context))
    torch.testing.assert_close(got.layers, context.layers, atol=0, rtol=0)


def test_embedding_prompt_is_run_through_the_model(model):
    prompt = random_embedding(5)
    expected = embed_prefix(model, prompt.vectors())
    torch.testing.assert_close(prefix_of(model, prompt).layers, expected.layers, atol=0, rtol=0)


def test_prefix_comes_in_the_models_dtype(build, tokens):
    model = build("llama").to(torch.bfloat16)
    prepare(model)
    kv = KVPrompt.from_prefix(capture(model, tokens(1, 6)))
    assert kv.key.dtype == torch.float32
    for prompt in (kv, random_embedding(5)):
        assert prefix_of(model, prompt).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_bank_gives_each_sequence_the_logits_of_its_own_prompt(kind, model, tokens):
    prompts = [
        KVPrompt.from_prefix(capture(model, tokens(1, k))) if kind == "kv" else random_embedding(k) for k in (6, 3)
    ]
    ids, index = tokens(3, 7), torch.tensor([1, 0, 1])
    got = prompted_logits(model, ids, prefix_of(model, PromptBank(prompts)), prompt_index=index)
    for row, i in enumerate(index):
        want = prompted_logits(model, ids[row : row + 1], prefix_of(model, prompts[i]))
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_loss_reaches_the_trainable_tokens_only(kind, model, tokens):
    prompt = KVPrompt.from_prefix(capture(model, tokens(1, 6))) if kind == "kv" else random_embedding(6)
    prompted_hidden(model, tokens(2, 7), prefix_of(model, prompt)).square().sum().backward()
    for parameter in prompt.parameters():
        assert parameter.grad.shape == parameter.shape and bool(parameter.grad.any())
    assert all(not buffer.requires_grad for buffer in prompt.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_types_are_refused(model):
    with pytest.raises(TypeError, match=r"prompt: got Tensor, accepted are Prefix"):
        prefix_of(model, torch.zeros(3, 32))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("kind", ["kv", "embedding", "bank of kv", "bank of embedding"])
def test_a_prompt_in_distributed_data_parallel_is_called_through_it(kind, model, tokens):
    prompt = random_embedding(5) if "embedding" in kind else KVPrompt.from_prefix(capture(model, tokens(1, 6)))
    prompt = PromptBank([prompt, prompt]) if "bank" in kind else prompt
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(prompt)
        reduced = []
        wrapped.register_comm_hook(None, lambda _, bucket: reduced.append(bucket) or allreduce_hook(None, bucket))
        got = prefix_of(model, wrapped)
        torch.testing.assert_close(got.layers, prefix_of(model, prompt).layers, atol=0, rtol=0)
        sum(key.sum() + value.sum() for key, value in got.layers).backward()
    finally:
        dist.destroy_process_group()
    assert reduced and all(parameter.grad.any() for parameter in prompt.parameters())
