"""A prepared model without a prefix works as before: forward, caches, padding, generation, gradients."""

import pytest
import torch
from transformers import DynamicCache

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prepare, release

ATOL = 1e-5


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_forward(family, side, build, tokens, concatenated_run, padded):
    rows = [tokens(length, seed=length) for length in (4, 9, 2)]
    empty = torch.zeros(0, dtype=torch.int64)
    expected = concatenated_run(build(family), [empty] * 3, rows)
    model = build(family)
    prepare(model)
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    for one, real, want in zip(logits, mask.bool(), expected, strict=True):
        torch.testing.assert_close(one[real], want, atol=ATOL, rtol=0)


# No sliding cache with padding on the right: it drops tokens by column, so padding changes which tokens it keeps.
@pytest.mark.parametrize(
    ("side", "sliding"),
    [("left", False), ("right", False), ("left", True)],
    ids=["left", "right", "left-sliding-cache"],
)
def test_decoding_with_a_cache_after_a_padded_prefill(family, side, sliding, build, tokens, concatenated_run, padded):
    # Right padding leaves a hole between the prefill and what follows.
    rows, new = [tokens(length, seed=length) for length in (4, 8)], tokens(2, 5, seed=9)
    empty = torch.zeros(0, dtype=torch.int64)
    expected = concatenated_run(build(family), [empty] * 2, [torch.cat(pair) for pair in zip(rows, new, strict=True)])
    model = build(family)
    prepare(model)
    ids, mask = padded(rows, side)
    cache = DynamicCache(config=model.config) if sliding else DynamicCache()
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        chunk = new[:, part]
        mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -chunk.shape[1] :]
        logits = model(chunk, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for b, row in enumerate(rows):
            want = expected[b][len(row) + part.start : len(row) + part.stop]
            torch.testing.assert_close(logits[b], want, atol=ATOL, rtol=0)


def test_transformers_own_generate(family, build, tokens, padded):
    ids, mask = padded([tokens(3), tokens(8, seed=1)], "left")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    expected = build(family).generate(ids, **options)
    model = build(family)
    prepare(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_loss_and_its_gradient(build, tokens):
    unprepared, model = build("gemma2"), build("gemma2")
    prepare(model)
    ids, gradients = tokens(2, 9), []
    for one in (unprepared, model):
        one.requires_grad_(True)
        one(ids, labels=ids).loss.backward()
        gradients.append(one.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=ATOL, rtol=0)


def test_prepare_is_idempotent_and_release_undoes_it(build, tokens):
    model = build("llama")
    before = model(tokens(1, 5)).logits
    release(model)
    prepare(model)
    prepare(model)
    assert model.config._attn_implementation == "softprompt"
    release(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(tokens(1, 5)).logits, before)


def test_saving_a_prepared_model_saves_a_normal_model(build, tmp_path, tokens):
    from transformers import AutoModelForCausalLM

    model = build("llama")
    expected = model(tokens(1, 5)).logits
    prepare(model)
    model.save_pretrained(tmp_path)
    assert "softprompt" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens(1, 5)).logits, expected, atol=ATOL, rtol=0)


def test_a_4d_mask_is_refused(family, build, tokens):
    model = build(family)
    prepare(model)
    with pytest.raises(SoftPromptError, match=r"attention_mask: got shape \(1, 1, 5, 5\)"):
        model(tokens(1, 5), attention_mask=torch.zeros(1, 1, 5, 5))


def test_packed_sequences_are_refused(build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match="packed sequences"):
        model(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    boundaries = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(SoftPromptError, match="packed sequences"):
        model(tokens(1, 6), cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)


def test_a_cache_of_fixed_size_is_refused(build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match="cache of fixed size"):
        model.generate(tokens(1, 5), cache_implementation="static", max_new_tokens=3, do_sample=False)


def test_attention_dropout_is_refused_in_training_mode(build, tokens):
    model = build("gpt2", attn_pdrop=0.1)
    prepare(model)
    model(tokens(1, 5))
    model.train()
    with pytest.raises(SoftPromptError, match=r"attention dropout: got 0\.1 in training mode"):
        model(tokens(1, 5))


def test_attention_weights_are_refused(build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match="output_attentions"):
        model(tokens(1, 5), output_attentions=True)
