"""Activations that do not fit into the model's dtype are named, where they would give nonsense."""

import pytest
import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, embed_prefix, generate, prepare, sample

FLOAT16 = r"in float16 are not finite, accepted are finite numbers: float16 ends at 65504, .* load it in bfloat16"


@pytest.fixture(params=["hidden states", "logits"])
def overflowing(request, build):
    """A model whose numbers fit into fp32 and bf16, and not into fp16."""
    model = build("llama")
    with torch.no_grad():
        if request.param == "logits":
            model.lm_head.weight.mul_(3e4)
            model.model.norm.weight.mul_(100)
        else:
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(1e3)
                layer.mlp.down_proj.weight.mul_(1e4)
    prepare(model)
    return model


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}])
def test_generate_names_the_dtype(overflowing, options, tokens):
    ids = tokens(2, 5)
    for dtype in (torch.float32, torch.bfloat16):
        assert generate(overflowing.to(dtype), ids, None, max_new_tokens=3, **options).shape == (2, 8)
    with pytest.raises(SoftPromptError, match=r"model: its logits " + FLOAT16):
        generate(overflowing.half(), ids, None, max_new_tokens=3, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_names_the_dtype(overflowing, temperature, tokens):
    ids = tokens(2, 5).tolist()
    assert len(list(sample(overflowing, ids, None, new_tokens=3, temperature=temperature))) == 2
    with pytest.raises(SoftPromptError, match=r"model: its logits after inputs\[\d\] and 0 new tokens " + FLOAT16):
        list(sample(overflowing.half(), ids, None, new_tokens=3, temperature=temperature))


def test_a_context_that_overflows_is_not_captured(build, tokens):
    model = build("llama")
    prepare(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e3)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    capture(model, tokens(1, 9), chunk_tokens=4)
    with pytest.raises(SoftPromptError, match=r"model: its hidden states of the context " + FLOAT16):
        capture(model.half(), tokens(1, 9), chunk_tokens=4)


def test_an_embedding_prompt_that_overflows_is_named(build):
    model = build("llama")
    prepare(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e3)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    bank, lengths = torch.ones(2, 4, 32), torch.tensor([4, 2])
    embed_prefix(model, bank, lengths)
    model.half()
    with pytest.raises(SoftPromptError, match=r"model: its hidden states of the embedding prompt " + FLOAT16):
        embed_prefix(model, bank, lengths)
    embed_prefix(model, bank.requires_grad_(), lengths)  # a training finds it in its loss, without a look here


def test_settings_that_remove_what_is_not_finite_do_not_hide_it(build, tokens):
    model = build("llama")
    prepare(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.generation_config.remove_invalid_values = True
    for options in ({}, {"remove_invalid_values": True}, {"generation_config": model.generation_config}):
        with pytest.raises(SoftPromptError, match="its logits in float32 are not finite"):
            generate(model, tokens(1, 4), None, max_new_tokens=2, do_sample=False, **options)


def test_other_dtypes_are_named_without_the_advice(build, tokens):
    model = build("llama")
    prepare(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(SoftPromptError, match=r"its logits in float32 are not finite, .*: check its weights"):
        generate(model, tokens(1, 4), None, max_new_tokens=2, do_sample=False)


def test_tokens_without_probability_and_the_callers_processors_still_work(build, tokens):
    model = build("llama")
    prepare(model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([5]), -torch.inf))

    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    for options in ({"do_sample": False}, {"do_sample": True}):
        found = generate(model, tokens(1, 4), None, max_new_tokens=3, logits_processor=[only_seven], **options)
        assert found[0, 4:].tolist() == [7, 7, 7]
        assert generate(model, tokens(1, 4), None, max_new_tokens=3, **options).shape == (1, 7)
