"""Generation with a prefix against transformers' own generation from the concatenated sequence."""

import threading

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, embed_prefix, generate, prepare
from softprompt_kernels.prompts.prefix import Prefix

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def test_greedy_equals_the_concatenated_run(family, build, tokens):
    context, ids = tokens(9), tokens(3, 6, seed=1)
    expected = build(family).generate(torch.cat([context.expand(3, -1), ids], dim=1), **GREEDY)[:, 9:]
    model = build(family)
    prepare(model)
    got = generate(model, ids, capture(model, context[None]), **GREEDY)
    assert torch.equal(got, expected)


def test_left_padded_batch_equals_each_row_on_its_own(family, build, tokens, padded):
    context, rows = tokens(9), [tokens(length, seed=length) for length in (3, 7, 1)]
    unprepared, model = build(family), build(family)
    prepare(model)
    ids, mask = padded(rows, "left")
    got = generate(model, ids, capture(model, context[None]), attention_mask=mask, **GREEDY)
    assert torch.equal(got[:, :7], ids)
    for out, row in zip(got, rows, strict=True):
        expected = unprepared.generate(torch.cat([context, row])[None], **GREEDY)[0, 9 + len(row) :]
        assert torch.equal(out[7:], expected)


def test_scores_of_a_left_padded_batch_equal_the_concatenated_run(family, build, tokens, padded):
    # Greedy tokens could agree by chance. The logits of every step cannot.
    context, rows = tokens(4), [tokens(length, seed=length) for length in (2, 8)]
    unprepared, model = build(family), build(family)
    prepare(model)
    ids, mask = padded(rows, "left")
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    got = generate(model, ids, capture(model, context[None]), attention_mask=mask, **options).logits
    for b, row in enumerate(rows):
        expected = unprepared.generate(torch.cat([context, row])[None], **options).logits
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine[b], theirs[0], atol=2e-5, rtol=0)


def test_each_row_generates_after_its_own_prompt(build, tokens, padded):
    model, unprepared = build("gpt2"), build("gpt2")
    prepare(model)
    long, short = tokens(6), tokens(3, seed=1)
    layers = []
    for (a, b), (c, d) in zip(capture(model, long[None]).layers, capture(model, short[None]).layers, strict=True):
        pad = (0, 0, 0, 3)
        layers.append(
            (
                torch.cat([a, torch.nn.functional.pad(c, pad, value=torch.nan)]),
                torch.cat([b, torch.nn.functional.pad(d, pad, value=torch.nan)]),
            )
        )
    bank, index = Prefix(tuple(layers), torch.tensor([6, 3])), torch.tensor([1, 0, 1])
    rows = [tokens(length, seed=length) for length in (5, 2, 4)]
    ids, mask = padded(rows, "left")
    got = generate(model, ids, bank, attention_mask=mask, prompt_index=index, **GREEDY)
    for out, row, i in zip(got, rows, index, strict=True):
        expected = unprepared.generate(torch.cat([(long, short)[i], row])[None], **GREEDY)[0, -8:]
        assert torch.equal(out[-8:], expected)


def test_samples_of_one_input_read_the_prompt_of_that_input(build, tokens):
    # Row b reads prompt b, and transformers makes two neighbouring rows of each input.
    model = build("llama")
    prepare(model)
    contexts, ids = tokens(2, 6), tokens(2, 4, seed=1)
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 8}
    got = generate(model, ids, capture(model, contexts), **options)
    for b in range(2):
        expected = generate(model, ids[b : b + 1], capture(model, contexts[b : b + 1]), **options)
        assert torch.equal(got[2 * b : 2 * b + 2], expected)


def test_without_prefix_it_equals_transformers_own_generation(build, tokens):
    ids = tokens(2, 6)
    expected = build("mistral").generate(ids, **GREEDY)
    model = build("mistral")
    prepare(model)
    assert torch.equal(generate(model, ids, None, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": 3, "eos_token_id": 5},
    ],
    ids=["sampling", "several-samples", "beams", "several-beams", "stopping"],
)
def test_options_of_transformers_work_as_without_a_prefix(options, build, tokens, padded):
    # Compare the context as a prefix with the context as input tokens and no prefix, padded in the same way.
    model = build("llama")
    prepare(model)
    context, rows = tokens(6), [tokens(length, seed=length) for length in (5, 3)]
    ids, mask = padded(rows, "left")
    joined, joined_mask = padded([torch.cat([context, row]) for row in rows], "left")
    results = []
    for prefix, inputs, attention_mask in ((capture(model, context[None]), ids, mask), (None, joined, joined_mask)):
        torch.manual_seed(3)
        new = generate(model, inputs, prefix, attention_mask=attention_mask, max_new_tokens=8, **options)
        results.append(new[:, inputs.shape[1] :])
    assert torch.equal(results[0], results[1])


def test_streamer_receives_inputs_and_every_new_token(build, tokens):
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.seen, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, streamer = build("llama"), Collect()
    prepare(model)
    out = generate(model, tokens(1, 4), capture(model, tokens(1, 6)), streamer=streamer, **GREEDY)
    assert streamer.seen == out[0].tolist() and streamer.ended


def test_generation_after_an_embedding_prompt_equals_concatenated_embeddings(build, tokens):
    model, unprepared = build("qwen3"), build("qwen3")
    prepare(model)
    prompt, ids = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), tokens(2, 4)
    joined = torch.cat([prompt.expand(2, -1, -1), unprepared.get_input_embeddings()(ids)], dim=1)
    expected = unprepared.generate(inputs_embeds=joined, **GREEDY)
    assert torch.equal(generate(model, ids, embed_prefix(model, prompt), **GREEDY)[:, 4:], expected)


def test_a_model_with_caching_switched_off_still_generates(build, tokens):
    # Training scripts set use_cache = False.
    model = build("llama")
    prepare(model)
    prefix, ids = capture(model, tokens(1, 6)), tokens(2, 4)
    expected = generate(model, ids, prefix, **GREEDY)
    model.config.use_cache = model.generation_config.use_cache = False
    assert torch.equal(generate(model, ids, prefix, **GREEDY), expected)


def test_a_static_cache_in_the_models_own_settings_is_overridden(build, tokens):
    model = build("llama")
    prepare(model)
    prefix, ids = capture(model, tokens(1, 6)), tokens(2, 4)
    expected = generate(model, ids, prefix, **GREEDY)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(generate(model, ids, prefix, cache_implementation=None, **GREEDY), expected)


def test_an_interrupted_call_leaves_no_hook_on_the_model(build, tokens):
    model = build("llama")
    prepare(model)
    ids, prefix = tokens(2, 4), capture(model, tokens(1, 6))
    expected = model(ids).logits

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, prefix, stopping_criteria=[interrupt], **GREEDY)
    assert not model._forward_pre_hooks
    assert torch.equal(model(ids).logits, expected)


def test_a_call_inside_a_call_sees_its_own_prompt(build, tokens):
    model = build("llama")
    prepare(model)
    outer, inner = capture(model, tokens(1, 6)), capture(model, tokens(1, 6, seed=1))
    ids, seen = tokens(1, 4), []
    expected_outer, expected_inner = generate(model, ids, outer, **GREEDY), generate(model, ids, inner, **GREEDY)
    without_prefix = model(ids).logits

    def nested(*_: object) -> torch.Tensor:
        seen.append((generate(model, ids, inner, **GREEDY), model(ids).logits))
        return torch.tensor([False])

    assert torch.equal(generate(model, ids, outer, stopping_criteria=[nested], **GREEDY), expected_outer)
    assert all(torch.equal(got, expected_inner) and torch.equal(logits, without_prefix) for got, logits in seen)
    assert not torch.equal(expected_outer, expected_inner)


def test_threads_do_not_affect_each_other(build, tokens):
    model = build("llama")
    prepare(model)
    prefixes, ids = [capture(model, tokens(1, 6, seed=seed)) for seed in range(4)], tokens(2, 4)
    expected = [generate(model, ids, prefix, **GREEDY) for prefix in prefixes]
    got: dict[int, list[torch.Tensor]] = {}

    def work(i: int) -> None:
        got[i] = [generate(model, ids, prefixes[i], **GREEDY) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[i]) for i in range(4) for one in got[i])


def test_a_hook_that_is_called_before_its_registration_ends_does_nothing(build, tokens, monkeypatch):
    """A forward of another thread may call it in that moment, without keywords."""
    model, results = build("llama"), []
    prepare(model)
    register = model.register_forward_pre_hook

    def call_then_register(hook, **options):
        results.append(hook(model, ()))
        return register(hook, **options)

    monkeypatch.setattr(model, "register_forward_pre_hook", call_then_register)
    generate(model, tokens(2, 4), capture(model, tokens(1, 6)), **GREEDY)
    assert results == [None]


def test_buffers_of_the_cache_grow_past_their_first_size(build, tokens, padded):
    unprepared, model = build("gemma2", max_position_embeddings=96), build("gemma2", max_position_embeddings=96)
    prepare(model)
    context, rows = tokens(5), [tokens(4), tokens(2, seed=1)]
    ids, mask = padded(rows, "left")
    got = generate(model, ids, capture(model, context[None]), attention_mask=mask, do_sample=False, max_new_tokens=72)
    for out, row in zip(got, rows, strict=True):
        expected = unprepared.generate(torch.cat([context, row])[None], do_sample=False, max_new_tokens=72)
        assert torch.equal(out[4:], expected[0, -72:])


def test_arguments_that_would_replace_cache_or_positions_are_refused(build, tokens):
    model = build("llama")
    prepare(model)
    for name, value in {"past_key_values": object(), "position_ids": tokens(1, 4), "assistant_model": model}.items():
        with pytest.raises(SoftPromptError, match=name):
            generate(model, tokens(1, 4), None, **{name: value})


def test_right_padding_is_refused(build, tokens, padded):
    model = build("llama")
    prepare(model)
    ids, mask = padded([tokens(4), tokens(2)], "right")
    with pytest.raises(SoftPromptError, match="left padding"):
        generate(model, ids, None, attention_mask=mask, **GREEDY)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 55}, {"max_length": 59}, {"generation_config": GenerationConfig(max_new_tokens=55)}],
    ids=["max_new_tokens", "max_length", "generation_config"],
)
def test_generation_beyond_the_window_is_refused(options, build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match=r"6 prompt \+ 4 input \+ 55 new tokens, the model's window is 64"):
        generate(model, tokens(1, 4), capture(model, tokens(1, 6)), **options)


def test_the_window_is_checked_against_the_default_number_of_new_tokens(build, tokens):
    model = build("gpt2")
    prepare(model)
    assert generate(model, tokens(1, 4), capture(model, tokens(1, 40))).shape == (1, 24)
    with pytest.raises(SoftPromptError, match=r"41 prompt \+ 4 input \+ 20 new tokens, the model's window is 64"):
        generate(model, tokens(1, 4), capture(model, tokens(1, 41)))
