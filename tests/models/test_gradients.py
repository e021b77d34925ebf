"""Gradients of prompts in float64, against autograd through an unprepared model on the concatenated sequence."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, embed_prefix, prepare, prompted_hidden
from softprompt_kernels.models.families import decoder_of
from softprompt_kernels.prompts.prefix import Prefix

ATOL, RTOL = 1e-9, 1e-7


def output_gradient(hidden: Tensor) -> Tensor:
    """A fixed random gradient of the hidden states."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)


def as_leaves(prefix: Prefix) -> Prefix:
    """A copy of the prefix whose tensors are leaves that require gradients."""
    return Prefix.of((key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in prefix.layers)


def gradients(prefix: Prefix) -> list[Tensor]:
    return [tensor.grad for pair in prefix.layers for tensor in pair]


def test_gradient_of_keys_and_values_sums_over_the_batch(family, build, double, float64_reference, tokens):
    ids = tokens(3, 7)
    model, unprepared = double(build(family)), float64_reference(build(family))
    prepare(model)
    context = capture(model, tokens(1, 5))

    expected = as_leaves(context)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(expected.layers):
        cache.update(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1), layer)
    decoder, positions = decoder_of(unprepared), torch.arange(5, 12)[None]
    hidden = decoder(ids, past_key_values=cache, position_ids=positions).last_hidden_state
    hidden.backward(output_gradient(hidden))

    got = as_leaves(context)
    prompted = prompted_hidden(model, ids, got)
    torch.testing.assert_close(prompted, hidden, atol=ATOL, rtol=RTOL)
    prompted.backward(output_gradient(prompted))
    torch.testing.assert_close(gradients(got), gradients(expected), atol=ATOL, rtol=RTOL)


def test_gradient_of_an_embedding_prompt(family, build, double, float64_reference, tokens):
    ids, start = tokens(3, 7), torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, unprepared = double(build(family)), float64_reference(build(family))
    prepare(model)

    expected = start.clone().requires_grad_()
    joined = torch.cat([expected.expand(3, -1, -1), unprepared.get_input_embeddings()(ids)], dim=1)
    hidden = decoder_of(unprepared)(inputs_embeds=joined).last_hidden_state[:, 5:]
    hidden.backward(output_gradient(hidden))

    got = start.clone().requires_grad_()
    prompted = prompted_hidden(model, ids, embed_prefix(model, got))
    prompted.backward(output_gradient(prompted))
    # Norm layers compute in fp32 in every model. The reference rounds three gradients there, one for each copy of the
    # prompt; the shared prompt has one gradient, their sum, which is rounded once.
    assert (got.grad - expected.grad).norm() <= 5e-7 * expected.grad.norm()


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_gradient_checkpointing_gives_identical_gradients(kind, family, build, tokens, padded):
    model = build(family)
    prepare(model)
    ids, mask = padded([tokens(7), tokens(4, seed=1)], "right")
    context, start = capture(model, tokens(1, 5)), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def run() -> list[Tensor]:
        if kind == "kv":
            prefix = as_leaves(context)
            hidden = prompted_hidden(model, ids, prefix, attention_mask=mask)
            hidden.backward(output_gradient(hidden))
            return gradients(prefix)
        embedding = start.clone().requires_grad_()
        hidden = prompted_hidden(model, ids, embed_prefix(model, embedding), attention_mask=mask)
        hidden.backward(output_gradient(hidden))
        return [embedding.grad]

    expected = run()
    model.activation_checkpointing_enable()
    model.train()
    assert model.is_activation_checkpointing
    got = run()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert all(bool(one.any()) for one in got)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_reentrant_checkpointing_is_refused(kind, build, tokens):
    model = build("llama")
    prepare(model)
    prefix = as_leaves(capture(model, tokens(1, 5)))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(SoftPromptError, match="re-entrant"):
        if kind == "kv":
            prompted_hidden(model, tokens(2, 7), prefix)
        else:
            embed_prefix(model, torch.randn(5, 32, requires_grad=True))


def test_gradients_do_not_depend_on_padding_tokens(build, tokens):
    # The prompt's gradient is the same for any token id at the padding.
    model = build("mistral").double()
    prepare(model)
    ids, mask = tokens(2, 7), torch.ones(2, 7)
    mask[1, 4:] = 0
    context, results = capture(model, tokens(1, 5)), []
    for filler in (0, 9):
        prefix = as_leaves(context)
        hidden = prompted_hidden(model, ids.masked_fill(mask == 0, filler), prefix, attention_mask=mask)
        (hidden * mask[..., None]).square().sum().backward()
        results.append(gradients(prefix))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)


def test_a_prefix_without_gradient_gives_no_graph(build, tokens):
    model = build("llama")
    prepare(model)
    assert not prompted_hidden(model, tokens(2, 7), capture(model, tokens(1, 5))).requires_grad
