"""`head_of` gives the parameters of the model's head."""

import pytest
import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of, prepare, prompted_hidden


def test_head_gives_the_models_logits(family, build, tokens):
    model = build(family)
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
    prepare(model)
    head = head_of(model)
    hidden = prompted_hidden(model, tokens(2, 5), None)
    torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=0)


def test_head_shares_the_models_weight(build):
    model = build("llama")
    head = head_of(model)
    assert head.weight is model.lm_head.weight
    assert (head.bias, head.softcap, head.logit_scale) == (None, None, 1.0)


def test_softcap_is_found(build):
    assert head_of(build("gemma2")).softcap == 1.5
    assert head_of(build("gemma2", final_logit_softcapping=None)).softcap == pytest.approx(30.0)  # the family's default
    assert head_of(build("gemma3")).softcap is None
    assert head_of(build("gemma3", final_logit_softcapping=3.0)).softcap == 3.0


def test_bias_is_found(build, tokens):
    model = build("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.arange(61.0))
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
    prepare(model)
    head = head_of(model)
    assert head.bias is model.lm_head.bias
    torch.testing.assert_close(head.logits(prompted_hidden(model, tokens(2, 5), None)), expected, atol=1e-5, rtol=0)


def test_a_quantised_head_is_refused(build):
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(976, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SoftPromptError, match=r"its head is torch.uint8 of shape \(976, 1\)"):
        head_of(model)
