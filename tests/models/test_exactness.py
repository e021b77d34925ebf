"""A model with a prefix gives the logits of the concatenated sequence: all families, paddings, banks."""

import pytest
import torch
from transformers import DynamicCache

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, embed_prefix, prepare, prompted_hidden, prompted_logits
from softprompt_kernels.prompts.prefix import Prefix

# Absolute error of fp32 logits, whose standard deviation is near 1.
ATOL = 1e-5


def bank(prefixes: list[Prefix]) -> Prefix:
    """A bank of prefixes of one row and different lengths. NaN follows a short row."""
    lengths = torch.tensor([one.length for one in prefixes])
    layers = []
    for pairs in zip(*(one.layers for one in prefixes), strict=True):
        both = []
        for tensors in zip(*pairs, strict=True):
            shape = tensors[0].shape
            rows = torch.full((len(prefixes), shape[1], int(lengths.max()), shape[3]), torch.nan)
            for row, tensor in zip(rows, tensors, strict=True):
                row[:, : tensor.shape[2]] = tensor[0]
            both.append(rows)
        layers.append((both[0], both[1]))
    return Prefix(tuple(layers), lengths)


def test_shared_context_equals_the_concatenated_run(family, build, tokens, concatenated_run):
    context, rows = tokens(9), tokens(3, 7, seed=1)
    expected = torch.stack(concatenated_run(build(family), [context] * 3, list(rows)))
    model = build(family)
    prepare(model)
    got = prompted_logits(model, rows, capture(model, context[None]))
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_and_leaks_nothing(family, side, build, tokens, concatenated_run, padded):
    context, rows = tokens(9), [tokens(length, seed=length) for length in (4, 7, 1)]
    expected = concatenated_run(build(family), [context] * 3, rows)
    model = build(family)
    prepare(model)
    ids, mask = padded(rows, side)
    got = prompted_logits(model, ids, capture(model, context[None]), attention_mask=mask)
    assert got.isfinite().all()
    for one, real, want in zip(got, mask.bool(), expected, strict=True):
        torch.testing.assert_close(one[real], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_reads_its_own_prompt_of_a_ragged_bank(family, side, build, tokens, concatenated_run, padded):
    contexts = [tokens(length, seed=length) for length in (9, 3, 6)]
    rows = [tokens(length, seed=length + 1) for length in (7, 5, 7, 2)]
    index = torch.tensor([2, 0, 1, 0])
    expected = concatenated_run(build(family), [contexts[i] for i in index], rows)
    model = build(family)
    prepare(model)
    prefix = bank([capture(model, context[None]) for context in contexts])
    ids, mask = padded(rows, side)
    got = prompted_logits(model, ids, prefix, attention_mask=mask, prompt_index=index)
    for one, real, want in zip(got, mask.bool(), expected, strict=True):
        torch.testing.assert_close(one[real], want, atol=ATOL, rtol=0)


def test_without_index_row_b_reads_prompt_b(build, tokens, concatenated_run):
    contexts, rows = tokens(2, 6), tokens(2, 4, seed=1)
    expected = torch.stack(concatenated_run(build("llama"), list(contexts), list(rows)))
    model = build("llama")
    prepare(model)
    got = prompted_logits(model, rows, capture(model, contexts))
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def test_no_prefix_gives_the_logits_of_the_unprepared_model(family, build, tokens):
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = build(family)(ids).logits
    model = build(family)
    prepare(model)
    torch.testing.assert_close(prompted_logits(model, ids, None), expected, atol=ATOL, rtol=0)


def test_embedding_prompt_equals_the_concatenated_embeddings(family, build, tokens):
    ids, prompt = tokens(3, 7), torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    unprepared = build(family)
    with torch.no_grad():
        embedded = torch.cat([prompt.expand(3, -1, -1), unprepared.get_input_embeddings()(ids)], dim=1)
        expected = unprepared(inputs_embeds=embedded).logits[:, 6:]
    model = build(family)
    prepare(model)
    prefix = embed_prefix(model, prompt)
    assert (prefix.rows, prefix.length) == (1, 6)
    torch.testing.assert_close(prompted_logits(model, ids, prefix), expected, atol=ATOL, rtol=0)


def test_ragged_embedding_prompts_equal_each_alone(build, tokens):
    prompts = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    prompts[1, 4:] = torch.nan  # padding may hold anything
    ids, lengths = tokens(2, 7), torch.tensor([6, 4])
    model = build("gemma3")
    prepare(model)
    got = prompted_logits(model, ids, embed_prefix(model, prompts, lengths))
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        want = prompted_logits(model, ids[row : row + 1], embed_prefix(model, prompt[:length]))
        torch.testing.assert_close(got[row : row + 1], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 9, 100])
def test_capture_in_chunks_equals_capture_at_once(chunk, family, build, tokens):
    model = build(family)
    prepare(model)
    context = tokens(1, 9)
    whole, chunked = capture(model, context), capture(model, context, chunk_tokens=chunk)
    assert chunked.length == 9 and chunked.lengths is None
    for expected, got in zip(whole.layers, chunked.layers, strict=True):
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def test_capture_behind_a_prefix_equals_capture_at_once(family, build, tokens):
    model = build(family)
    prepare(model)
    context = tokens(1, 9)
    start = capture(model, context[:, :4])
    for expected, got in zip(
        capture(model, context).layers, capture(model, context[:, 4:], 3, before=start).layers, strict=True
    ):
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def test_captured_keys_are_those_of_the_models_own_cache(family, build, tokens):
    context = tokens(1, 9)
    # A DynamicCache without a configuration. With one, sliding layers drop their first tokens.
    with torch.no_grad():
        cache = build(family)(context, past_key_values=DynamicCache(), use_cache=True).past_key_values
    model = build(family)
    prepare(model)
    prefix = capture(model, context)
    assert not any(tensor.requires_grad for pair in prefix.layers for tensor in pair)
    for layer, (key, value) in zip(cache.layers, prefix.layers, strict=True):
        torch.testing.assert_close(key, layer.keys, atol=ATOL, rtol=0)
        torch.testing.assert_close(value, layer.values, atol=ATOL, rtol=0)


def test_capture_survives_gradient_checkpointing_in_training_mode(build, tokens):
    # transformers drops caches in this mode. A captured context must still be complete.
    model = build("llama")
    prepare(model)
    expected = capture(model, tokens(1, 9), chunk_tokens=4)
    model.activation_checkpointing_enable()
    model.train()
    got = capture(model, tokens(1, 9), chunk_tokens=4)
    torch.testing.assert_close(got.layers, expected.layers, atol=0, rtol=0)


def test_prompt_of_another_dtype_is_cast_to_the_models(build, tokens):
    model = build("llama").to(torch.bfloat16)
    prepare(model)
    prefix, ids = capture(model, tokens(1, 9)), tokens(2, 7)
    hidden = prompted_hidden(model, ids, prefix.to(dtype=torch.float32))
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden, prompted_hidden(model, ids, prefix), atol=0, rtol=0)


def test_autocast_is_as_accurate_as_the_models_own_attention(family, build, tokens):
    # Under autocast, keys are fp32 after the rotary embedding, and values are bf16.
    context, ids = tokens(1, 9), tokens(2, 7)
    unprepared, model = build(family), build(family)
    prepare(model)
    joined = torch.cat([context.expand(2, -1), ids], dim=1)
    with torch.no_grad():
        exact = unprepared(joined).logits[:, 9:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = unprepared(joined).logits[:, 9:]
            ours = prompted_logits(model, ids, capture(model, context))
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_hidden_states_do_not_run_the_head(build, tokens, monkeypatch):
    model = build("llama")
    prepare(model)
    ids, prefix = tokens(2, 7), capture(model, tokens(1, 9))
    expected = prompted_logits(model, ids, prefix)
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head was run"))
    hidden = prompted_hidden(model, ids, prefix)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_run_through_the_model(side, build, tokens, padded, monkeypatch):
    model = build("gemma3")
    prepare(model)
    prefix = capture(model, tokens(1, 5))
    ids, mask = padded([tokens(n) for n in (3, 9, 1)], side)
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    ids = torch.cat([ids, ids[:1]])
    seen = []
    run = model.base_model.forward

    def recorded(input_ids, **others):
        seen.append((input_ids.tolist(), others["position_ids"].tolist()))
        return run(input_ids=input_ids, **others)

    monkeypatch.setattr(model.base_model, "forward", recorded)
    hidden = prompted_hidden(model, ids, prefix, attention_mask=mask)
    own = [5 + i for n in (3, 9, 1) for i in range(n)]
    assert seen == [([ids[mask.bool()].tolist()], [own])]
    assert hidden.isfinite().all() and (hidden[mask.bool()] != 0).any(dim=1).all()


@pytest.mark.parametrize("name", ["composed", "reference", "cpu"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_every_backend_serves_padded_batches(name, side, build, tokens, concatenated_run, padded, monkeypatch):
    """Backends that are not good at packed sequences get padded batches."""
    model = build("llama")
    prepare(model)
    rows, context = [tokens(n, seed=n) for n in (3, 9, 1)], tokens(5)
    prefix = capture(model, context[None])
    ids, mask = padded(rows, side)
    expected = [prompted_logits(model, row[None], prefix)[0] for row in rows]
    monkeypatch.setenv("SOFTPROMPT_BACKEND", name)
    shapes = []
    run = model.base_model.forward
    monkeypatch.setattr(
        model.base_model,
        "forward",
        lambda input_ids, **others: shapes.append(input_ids.shape) or run(input_ids, **others),
    )
    got = prompted_logits(model, ids, prefix, attention_mask=mask)
    assert shapes == [(1, 13) if name == "cpu" else ids.shape]
    for one, real, want in zip(got, mask.bool(), expected, strict=True):
        torch.testing.assert_close(one[real], want, atol=ATOL, rtol=0)


def test_a_batch_of_padding_only_is_refused(build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match="attention_mask: got only padding, accepted is at least one real token"):
        prompted_hidden(model, tokens(2, 3), None, attention_mask=torch.zeros(2, 3))


def test_rows_of_a_model_that_counts_its_tokens_are_not_packed(build, tokens, concatenated_run, padded):
    """Llama 4 raises its temperature from token 20 of a sequence on. No row is that long, the batch is."""
    context, rows = tokens(9), [tokens(length, seed=length) for length in (8, 9, 7)]
    expected = concatenated_run(build("llama4", floor_scale=20), [context] * 3, rows)
    model = build("llama4", floor_scale=20)
    prepare(model)
    ids, mask = padded(rows, "right")
    got = prompted_logits(model, ids, capture(model, context[None]), attention_mask=mask)
    for one, real, want in zip(got, mask.bool(), expected, strict=True):
        torch.testing.assert_close(one[real], want, atol=ATOL, rtol=0)
