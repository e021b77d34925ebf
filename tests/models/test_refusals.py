"""Models and inputs that are not supported are refused with one sentence, before the model runs."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models import (
    capture,
    embed_prefix,
    generate,
    head_of,
    prepare,
    prompted_hidden,
    prompted_logits,
    registry,
)
from softprompt_kernels.models.registry import FAMILIES, REFUSED, WRAPPERS
from softprompt_kernels.prompts.prefix import Prefix

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
UNTESTED = {
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 32}),
    "jais2": ("Jais2Config", {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}),
}
NOT_EXACT = {
    "gptj": ("GPTJConfig", {"rotary_dim": 8}, "computes its attention itself"),
    "bloom": ("BloomConfig", {}, "computes its attention itself"),
    "mamba": ("MambaConfig", {}, "keep a state"),
    "lfm2": ("Lfm2Config", {"num_key_value_heads": 2, "intermediate_size": 32}, "keep a state"),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 2, "intermediate_size": 32}, "do not hand the prefix on"),
    "nemotron": ("NemotronConfig", {"num_key_value_heads": 2, "intermediate_size": 32}, "do not hand the prefix on"),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "different sizes",
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {"num_key_value_heads": 4, "intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "selects",
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {"num_key_value_heads": 4, "intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        "rotates the last features",
    ),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1Config",
        {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32},
        "normalises keys after",
    ),
}


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", UNTESTED)
def test_other_families_are_refused_by_name(name):
    config, options = UNTESTED[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL, **options))
    before = model.config._attn_implementation
    with pytest.raises(SoftPromptError, match=rf"got the family '{name}', accepted are apertus, .*qwen3"):
        prepare(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", NOT_EXACT)
def test_families_that_are_not_exact_are_refused_with_the_reason(name):
    config, options, reason = NOT_EXACT[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL, **options))
    with pytest.raises(SoftPromptError, match=rf"got the family '{name}', but .*{reason}.*; accepted are apertus, "):
        prepare(model)


def test_no_family_is_both_served_and_refused():
    assert not REFUSED.keys() & {*FAMILIES, *WRAPPERS}


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(SoftPromptError, match="got the family 't5'"):
        prepare(AutoModelForSeq2SeqLM.from_config(config))


def _gemma3_parts(text: str, **options: object) -> dict[str, object]:
    config = getattr(transformers, text)(**SMALL, intermediate_size=32, head_dim=8, num_key_value_heads=2, **options)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": config, "vision_config": vision | {"image_size": 28, "patch_size": 14}}


def test_wrappers_that_are_not_tested_are_refused_whatever_they_contain():
    model = transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(**_gemma3_parts("LlamaConfig"), vision_feature_layers=[0])
    )
    with pytest.raises(SoftPromptError, match="got a 'llama' inside a 'vipllava', accepted are a 'llama' alone or"):
        prepare(model)


def test_a_wrapper_of_a_family_that_is_not_served_is_refused():
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**_gemma3_parts("StableLmConfig")))
    with pytest.raises(SoftPromptError, match="got the family 'stablelm', but its layers"):
        prepare(model)


def test_a_wrapper_that_reads_both_ways_is_refused():
    parts = _gemma3_parts("GemmaConfig") | {"projection_dim": 32, "image_token_index": 60}
    with pytest.raises(SoftPromptError, match="got the family 'paligemma', but it reads its input in both directions"):
        prepare(transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**parts)))


def test_cross_attention_is_refused(build):
    with pytest.raises(SoftPromptError, match="cross-attention"):
        prepare(build("gpt2", add_cross_attention=True))


def test_bidirectional_attention_is_refused(build):
    with pytest.raises(SoftPromptError, match="bidirectional"):
        prepare(build("gemma3", use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("deepseek_v3", {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}, (16, 8, 8)),
        ("glm4_moe_lite", {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}, (8, 8, 4)),
    ],
)
def test_heads_of_other_sizes_are_refused_even_if_declared(name, options, sizes, monkeypatch):
    monkeypatch.setattr(registry, "_families", registry._families | {name: registry.Family()})
    config, more, _ = NOT_EXACT[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL, **more, **options))
    key, value, head = sizes
    with pytest.raises(
        NotServedError, match=f"keys of size {key} and values of size {value} .* configuration, {head},"
    ):
        prepare(model)


def test_other_types_than_models_are_a_type_error():
    with pytest.raises(TypeError, match="model: got Linear"):
        prepare(torch.nn.Linear(2, 2))


def test_every_family_of_the_list_is_tested(build, families, wrappers):
    text_types = {build(name).config.get_text_config().model_type for name in (*families, *wrappers)}
    assert text_types == set(FAMILIES)
    assert {build(name).config.model_type for name in wrappers} == set(WRAPPERS)


def test_an_unprepared_model_is_refused(build, tokens):
    model = build("llama")
    for call in (
        lambda: prompted_hidden(model, tokens(1, 4), None),
        lambda: prompted_logits(model, tokens(1, 4), None),
        lambda: capture(model, tokens(1, 4)),
        lambda: embed_prefix(model, torch.zeros(3, 32)),
        lambda: generate(model, tokens(1, 4), None, max_new_tokens=2),
    ):
        with pytest.raises(SoftPromptError, match=r"its attention is 'eager', accepted is a model after .*prepare"):
            call()


def test_more_tokens_than_the_window_are_refused(build, tokens):
    model = build("llama")
    prepare(model)
    prefix = capture(model, tokens(1, 60))
    assert prompted_hidden(model, tokens(2, 4), prefix).shape == (2, 4, 32)
    with pytest.raises(SoftPromptError, match=r"60 prompt \+ 5 input tokens, the model's window is 64"):
        prompted_hidden(model, tokens(2, 5), prefix)
    with pytest.raises(SoftPromptError, match=r"0 prompt \+ 65 input tokens, the model's window is 64"):
        capture(model, tokens(1, 65))
    with pytest.raises(SoftPromptError, match=r"65 prompt \+ 0 input tokens"):
        embed_prefix(model, torch.zeros(65, 32))


def test_the_window_of_longrope_ends_where_its_frequencies_change(build, tokens):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    options = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    unprepared, model = build("phi3", **options), build("phi3", **options)
    prepare(model)
    context, ids = tokens(1, 10), tokens(1, 6, seed=1)
    expected = unprepared(torch.cat([context, ids], dim=1)).logits[:, 10:]
    torch.testing.assert_close(prompted_logits(model, ids, capture(model, context)), expected, atol=1e-5, rtol=0)
    with pytest.raises(SoftPromptError, match="the model's window is 16"):
        prompted_logits(model, tokens(1, 7), capture(model, context))


@pytest.mark.parametrize(
    ("changes", "rope", "window"),
    [
        ({"max_position_embeddings": 16}, {"original_max_position_embeddings": 16}, 64),
        ({"max_position_embeddings": 20}, {"original_max_position_embeddings": 16}, 64),
        ({"max_position_embeddings": 64}, {"original_max_position_embeddings": 16}, 64),
        ({"max_position_embeddings": 16}, {}, 64),
        ({"max_position_embeddings": 100}, {"original_max_position_embeddings": 16}, 100),
        ({"max_position_embeddings": 10}, {"original_max_position_embeddings": 10, "factor": 2.5}, 25),
    ],
)
def test_the_window_of_yarn_is_a_multiple_of_the_original_one(changes, rope, window, build, tokens):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0} | rope
    unprepared, model = (build("qwen3", rope_parameters=dict(rope), **changes) for _ in range(2))
    prepare(model)
    context, ids = tokens(1, window - 8), tokens(1, 8, seed=1)
    with torch.no_grad():
        expected = unprepared(torch.cat([context, ids], dim=1)).logits[:, window - 8 :]
    torch.testing.assert_close(prompted_logits(model, ids, capture(model, context)), expected, atol=1e-5, rtol=0)
    with pytest.raises(SoftPromptError, match=f"the model's window is {window}"):
        prompted_logits(model, tokens(1, 9), capture(model, context))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_the_factors_of_other_types_do_not_widen_the_window(rope_type, build, tokens):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=16)
    prepare(model)
    with pytest.raises(SoftPromptError, match="the model's window is 16"):
        capture(model, tokens(1, 17))


@pytest.mark.parametrize(
    ("family", "options", "limit"),
    [
        ("llama4", {"attention_chunk_size": 16}, 16),
        ("llama4", {"floor_scale": 16}, 15),
        ("qwen2_moe", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        (
            "qwen2_moe",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "rope_parameters": YARN},
            16,
        ),
        ("llama4", {"attention_chunk_size": 16, "rope_parameters": YARN}, 16),
    ],
)
def test_the_window_ends_where_something_besides_attention_changes(family, options, limit, build, tokens):
    """Chunks and temperatures of Llama 4; sliding windows that are only in the mask, which a prefix does not have."""
    unprepared, model = build(family, **options), build(family, **options)
    prepare(model)
    context, ids = tokens(1, 10), tokens(1, limit - 10, seed=1)
    expected = unprepared(torch.cat([context, ids], dim=1)).logits[:, 10:]
    torch.testing.assert_close(prompted_logits(model, ids, capture(model, context)), expected, atol=1e-5, rtol=0)
    with pytest.raises(SoftPromptError, match=f"the model's window is {limit}"):
        prompted_logits(model, tokens(1, limit - 9), capture(model, context))


def test_a_prefix_of_another_model_is_refused(build, tokens):
    model, deeper = build("llama"), build("llama", num_hidden_layers=3)
    prepare(model)
    prepare(deeper)
    with pytest.raises(SoftPromptError, match=r"prefix: got 3 layers, 2 key heads of size 8, the model has 2, 2 and 8"):
        prompted_hidden(model, tokens(1, 4), capture(deeper, tokens(1, 5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"input_ids: got shape \(4,\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids: got shape \(2, 0\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: got shape \(2, 5\), accepted is \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask: got shape \(2, 1, 4, 4\)"),
        ({"prompt_index": torch.zeros(3, dtype=torch.int64)}, r"prompt_index: got shape \(3,\), accepted is \(2,\)"),
        ({"prompt_index": torch.tensor([0, 1])}, "prompt_index: got 0 to 1, accepted is 0 to 0"),
        ({"prompt_index": torch.tensor([-1, 0])}, "prompt_index: got -1 to 0, accepted is 0 to 0"),
        ({"prefix": 3}, "prompt_index: got None for 3 prompts and 2 sequences"),
        ({"prefix": None, "prompt_index": torch.zeros(2, dtype=torch.int64)}, "prompt_index: got one without a prefix"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(arguments, message, build, tokens):
    model = build("llama")
    prepare(model)
    given = {"input_ids": tokens(2, 4), "prefix": 1} | arguments
    rows, ids = given.pop("prefix"), given.pop("input_ids")
    prefix: Prefix | None = None if rows is None else capture(model, tokens(rows, 5))
    with pytest.raises(SoftPromptError, match=message):
        prompted_hidden(model, ids, prefix, **given)


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 31), (2, 3, 31)])
def test_embeddings_that_do_not_fit_are_refused(shape, build):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match=r"embedding: got shape .*accepted is \[k, 32\] or \[R, k, 32\]"):
        embed_prefix(model, torch.zeros(shape))


def test_empty_chunks_are_refused(build, tokens):
    model = build("llama")
    prepare(model)
    with pytest.raises(SoftPromptError, match="chunk_tokens: got 0"):
        capture(model, tokens(1, 5), chunk_tokens=0)


def test_a_prefix_before_a_context_has_a_row_for_each_and_no_padding(build, tokens):
    model = build("llama")
    prepare(model)
    start = capture(model, tokens(1, 4))
    with pytest.raises(SoftPromptError, match="before: got 1 rows, accepted is one without padding for each of 2"):
        capture(model, tokens(2, 5), before=start)
    with pytest.raises(SoftPromptError, match="before: got 1 rows with padding"):
        capture(model, tokens(1, 5), before=Prefix(start.layers, torch.tensor([3])))


def test_a_model_without_head_has_hidden_states_but_no_logits(build, tokens):
    model = build("llama")
    prepare(model)
    expected = prompted_hidden(model, tokens(1, 4), None)
    base = model.base_model
    assert torch.equal(prompted_hidden(base, tokens(1, 4), None), expected)
    with pytest.raises(SoftPromptError, match="LlamaModel has no language-model head"):
        head_of(base)
    with pytest.raises(SoftPromptError, match="LlamaModel cannot generate"):
        generate(base, tokens(1, 4), None)
