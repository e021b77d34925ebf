"""What patch is for: steps that are not slower than PEFT's, and a prompt whose memory the batch does not multiply."""

import copy

import pytest
import torch
import transformers

from softprompt_kernels import patch
from tests.examples.conftest import time_ratio


def test_a_step_is_at_least_as_fast_where_prompts_matter(kind, with_prompt):
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs = with_prompt(transformers.LlamaForCausalLM(config), kind, num_virtual_tokens=128)
    ours = patch(copy.deepcopy(theirs))
    ids = torch.randint(512, (8, 32))

    def step(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    step(theirs), step(ours)
    assert time_ratio(lambda: step(ours), lambda: step(theirs), rounds=9) < 1


def saved_bytes(model, ids):
    """Memory that a forward keeps for its backward."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids).logits[:, -ids.shape[1] :].sum()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "PEFT"])
def test_memory_of_the_prompt_does_not_grow_with_the_batch(patched, kind, pair, tokens):
    def of_prompt(batch):
        """What 24 more virtual tokens cost."""
        few, many = (pair(kind, num_virtual_tokens=k)[patched] for k in (8, 32))
        return saved_bytes(many, tokens(batch, 5)) - saved_bytes(few, tokens(batch, 5))

    growth = of_prompt(8) / of_prompt(2)
    assert growth == pytest.approx(1) if patched else growth > 3
