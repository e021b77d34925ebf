"""Trap: if only an attention function is registered, transformers silently drops padding masks.

The name must also be registered with `AttentionMaskInterface`. Otherwise the attention gets no mask.
"""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from softprompt_kernels.models import prepare
from softprompt_kernels.models.attention import NAME


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


IDS = torch.tensor([[0, 0, 0, 7, 8, 9], [2, 3, 4, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def test_a_padded_row_equals_the_unpadded_row(model):
    unpadded = model(IDS[:1, 3:]).logits
    prepare(model)
    assert NAME in AttentionInterface().valid_keys() and NAME in AttentionMaskInterface().valid_keys()
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, attention_mask=MASK, position_ids=positions).logits[:1, 3:]
    torch.testing.assert_close(padded, unpadded, atol=1e-6, rtol=0)


def test_without_the_mask_registration_padding_changes_the_logits(model, monkeypatch):
    unpadded = model(IDS[:1, 3:]).logits
    prepare(model)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    padded = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits[:1, 3:]
    assert (padded - unpadded).abs().max() > 1e-3


@pytest.mark.parametrize("word", ["sdpa", "flash", "flex_attention", "eager", "paged"])
def test_the_name_contains_no_name_that_transformers_treats_specially(word):
    assert word not in NAME
