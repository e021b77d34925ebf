"""Gradients of prompts, in float64, against autograd through the concatenated run of an unprepared model."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, embed_prefix, prepare, prompted_hidden
from softprompt_kernels.prompts.prefix import Prefix

ATOL, RTOL = 1e-9, 1e-7


def cotangent(hidden: Tensor) -> Tensor:
    """A fixed random gradient to send backwards."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)


def leaves(prefix: Prefix) -> Prefix:
    """The same numbers as leaves of a new graph."""
    return Prefix.of((key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in prefix.layers)


def gradients(prefix: Prefix) -> list[Tensor]:
    return [tensor.grad for pair in prefix.layers for tensor in pair]


def test_gradient_of_keys_and_values_sums_over_the_batch(family, build, double, exact, tokens):
    ids = tokens(3, 7)
    model, plain = double(build(family)), exact(build(family))
    prepare(model)
    context = capture(model, tokens(1, 5))

    expected = leaves(context)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(expected.layers):
        cache.update(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1), layer)
    hidden = plain.base_model(ids, past_key_values=cache, position_ids=torch.arange(5, 12)[None]).last_hidden_state
    hidden.backward(cotangent(hidden))

    got = leaves(context)
    prompted = prompted_hidden(model, ids, got)
    torch.testing.assert_close(prompted, hidden, atol=ATOL, rtol=RTOL)
    prompted.backward(cotangent(prompted))
    torch.testing.assert_close(gradients(got), gradients(expected), atol=ATOL, rtol=RTOL)


def test_gradient_of_an_embedding_prompt(family, build, double, exact, tokens):
    ids, start = tokens(3, 7), torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, plain = double(build(family)), exact(build(family))
    prepare(model)

    expected = start.clone().requires_grad_()
    joined = torch.cat([expected.expand(3, -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    hidden = plain.base_model(inputs_embeds=joined).last_hidden_state[:, 5:]
    hidden.backward(cotangent(hidden))

    got = start.clone().requires_grad_()
    prompted = prompted_hidden(model, ids, embed_prefix(model, got))
    prompted.backward(cotangent(prompted))
    # Norms work in fp32 in any model. The oracle rounds the gradient of each of three copies there, we of their sum.
    assert (got.grad - expected.grad).norm() <= 5e-7 * expected.grad.norm()


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_gradient_checkpointing_gives_identical_gradients(kind, family, build, tokens, padded):
    model = build(family)
    prepare(model)
    ids, mask = padded([tokens(7), tokens(4, seed=1)], "right")
    context, start = capture(model, tokens(1, 5)), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def run() -> list[Tensor]:
        if kind == "kv":
            prefix = leaves(context)
            hidden = prompted_hidden(model, ids, prefix, attention_mask=mask)
            hidden.backward(cotangent(hidden))
            return gradients(prefix)
        embedding = start.clone().requires_grad_()
        hidden = prompted_hidden(model, ids, embed_prefix(model, embedding), attention_mask=mask)
        hidden.backward(cotangent(hidden))
        return [embedding.grad]

    expected = run()
    model.activation_checkpointing_enable()
    model.train()
    assert model.is_activation_checkpointing
    got = run()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert all(bool(one.any()) for one in got)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_reentrant_checkpointing_is_refused_rather_than_losing_the_gradient(kind, build, tokens):
    model = build("llama")
    prepare(model)
    prefix = leaves(capture(model, tokens(1, 5)))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(SoftPromptError, match="re-entrant"):
        if kind == "kv":
            prompted_hidden(model, tokens(2, 7), prefix)
        else:
            embed_prefix(model, torch.randn(5, 32, requires_grad=True))


def test_padding_tokens_get_and_give_no_gradient(build, tokens):
    # Whatever id stands at the padding, the prompt's gradient is the same.
    model = build("mistral").double()
    prepare(model)
    ids, mask = tokens(2, 7), torch.ones(2, 7)
    mask[1, 4:] = 0
    context, results = capture(model, tokens(1, 5)), []
    for filler in (0, 9):
        prefix = leaves(context)
        hidden = prompted_hidden(model, ids.masked_fill(mask == 0, filler), prefix, attention_mask=mask)
        (hidden * mask[..., None]).square().sum().backward()
        results.append(gradients(prefix))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)


def test_frozen_prefix_leaves_no_graph(build, tokens):
    model = build("llama")
    prepare(model)
    assert not prompted_hidden(model, tokens(2, 7), capture(model, tokens(1, 5))).requires_grad
