"""Registering an attention function alone makes transformers drop padding masks without a word.

`AttentionMaskInterface` has to know the name too; where it does not, every model under that name gets no mask.
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


def test_padded_row_equals_the_row_alone(model):
    alone = model(IDS[:1, 3:]).logits
    prepare(model)
    assert NAME in AttentionInterface().valid_keys() and NAME in AttentionMaskInterface().valid_keys()
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    padded = model(IDS, attention_mask=MASK, position_ids=positions).logits[:1, 3:]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


def test_the_trap_is_real_so_this_test_can_see_it(model, monkeypatch):
    alone = model(IDS[:1, 3:]).logits
    prepare(model)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    padded = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits[:1, 3:]
    assert (padded - alone).abs().max() > 1e-3


@pytest.mark.parametrize("word", ["sdpa", "flash", "flex_attention", "eager", "paged"])
def test_the_name_means_nothing_else_to_transformers(word):
    assert word not in NAME
