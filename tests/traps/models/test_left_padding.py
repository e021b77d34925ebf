"""Trap: with left padding, positions or a window count the padding, or the prompt is put before the padding.

Then queries see the prompt at wrong distances.
"""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from softprompt_kernels.models import capture, generate, prepare, prompted_hidden, prompted_logits

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8]]
CONTEXT = [2, 7, 1, 8, 2, 8]


@pytest.fixture(params=[None, 4], ids=["full", "window"])
def models(request):
    """The same random model twice: prepared, and unprepared."""
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        sliding_window=request.param,
        eos_token_id=None,
    )
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = MistralForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        pair.append(model)
    prepare(pair[0])
    return pair


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    return ids, mask


def test_each_row_of_a_batch_equals_the_row_on_its_own(models):
    model, unprepared = models
    ids, mask = batch()
    got = prompted_logits(model, ids, capture(model, torch.tensor([CONTEXT])), attention_mask=mask)
    for out, row in zip(got, ROWS, strict=True):
        expected = unprepared(torch.tensor([CONTEXT + row])).logits[0, len(CONTEXT) :]
        torch.testing.assert_close(out[-len(row) :], expected, atol=1e-5, rtol=0)


def test_the_amount_of_padding_changes_nothing(models):
    model, _ = models
    prefix = capture(model, torch.tensor([CONTEXT]))
    row = torch.tensor([ROWS[1]])
    expected = prompted_hidden(model, row, prefix)
    for pads in (1, 5, 20):
        ids = torch.nn.functional.pad(row, (pads, 0))
        got = prompted_hidden(model, ids, prefix, attention_mask=(ids != 0).long())[:, pads:]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_nan_in_the_padding_does_not_leak(models):
    model, _ = models
    prefix = capture(model, torch.tensor([CONTEXT]))
    ids, mask = batch()
    expected = prompted_hidden(model, ids, prefix, attention_mask=mask)
    model.get_input_embeddings().weight[0] = torch.nan
    got = prompted_hidden(model, ids, prefix, attention_mask=mask)
    assert torch.equal(got[mask.bool()], expected[mask.bool()])


def test_generated_tokens_equal_those_of_each_row_on_its_own(models):
    model, unprepared = models
    ids, mask = batch()
    options = {"max_new_tokens": 10, "do_sample": False}
    got = generate(model, ids, capture(model, torch.tensor([CONTEXT])), attention_mask=mask, **options)
    for out, row in zip(got, ROWS, strict=True):
        expected = unprepared.generate(torch.tensor([CONTEXT + row]), **options)[0, len(CONTEXT) + len(row) :]
        assert torch.equal(out[ids.shape[1] :], expected)
