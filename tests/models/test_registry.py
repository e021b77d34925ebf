"""Families that users declare, and the check that says whether a model is served."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, Jais2Config, NanoChatConfig

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models import (
    capture,
    embed_prefix,
    exactness,
    generate,
    prepare,
    prompted_logits,
    register_family,
    registry,
    sample,
    shift_keys,
)
from softprompt_kernels.models.exactness import check_exactness
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.models.registry import find_family, undeclared_families
from softprompt_kernels.prompts import KVPrompt, Prefix

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    monkeypatch.setattr(registry, "_imported", set())
    yield


def small(config: type) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def test_every_served_family_passes_the_check(family, build):
    model = build(family)
    if family == "ministral3":  # its keys move exactly up to this position
        model.config.rope_parameters["original_max_position_embeddings"] = 64
    prepare(model)
    checks = list(check_exactness(model, 20))
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == (4 if family == "gpt2" else 5)


def test_a_declared_family_is_served(tokens):
    model = small(Jais2Config)
    with pytest.raises(NotServedError, match="got the family 'jais2', accepted are"):
        prepare(model)
    register_family("jais2")
    prepare(model)
    assert prompted_logits(model, tokens(1, 4), capture(model, tokens(1, 6))).shape == (1, 4, 61)
    assert all(check.passed for check in check_exactness(model))


def test_a_declared_window_holds_whatever_the_rotary_settings_say():
    register_family("jais2", window=lambda config: 16)
    config = small(Jais2Config).config
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert max_positions(config) == 16


def test_a_wrong_declaration_fails_the_check():
    register_family("jais2", interleaved=True, logit_scale=lambda config: 2.0)
    model = small(Jais2Config)
    prepare(model)
    failed = {check.name for check in check_exactness(model) if not check.passed}
    assert {"logits behind a prefix", "keys moved to other positions"} <= failed


def test_keys_that_turn_the_other_way_fail_the_check():
    register_family("nanochat")
    model = small(NanoChatConfig)
    prepare(model)
    assert [check.name for check in check_exactness(model) if not check.passed] == ["keys moved to other positions"]


def test_a_model_that_drops_the_prefix_is_refused_even_if_declared(tokens):
    from transformers import StableLmConfig

    register_family("stablelm")
    model = small(StableLmConfig)
    prepare(model)
    prompt = KVPrompt(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)).prefix()
    for run in (
        lambda: capture(model, tokens(1, 6)),
        lambda: embed_prefix(model, torch.randn(4, 32)),
        lambda: prompted_logits(model, tokens(1, 6), prompt),
        lambda: prompted_logits(model, tokens(2, 6), prompt, attention_mask=torch.ones(2, 6).tril(4)),
        lambda: generate(model, tokens(1, 6), prompt, max_new_tokens=2),
        lambda: generate(model, tokens(1, 6), prompt, max_new_tokens=2, num_beams=2),
        lambda: list(sample(model, tokens(1, 6).tolist(), prompt, new_tokens=2)),
    ):
        with pytest.raises(
            NotServedError, match=r"(0 of the 2 layers of StableLmForCausalLM|a layer does not) hand the prefix on"
        ):
            run()


def test_a_model_that_hands_the_prefix_to_some_layers_is_refused(build, tokens):
    model = build("llama")
    prepare(model)
    prefix = capture(model, tokens(1, 4))
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {name: one for name, one in kwargs.items() if name != "softprompt"}),
        with_kwargs=True,
    )
    for run in (
        lambda: prompted_logits(model, tokens(1, 6), prefix),
        lambda: generate(model, tokens(1, 6), prefix, max_new_tokens=2),
    ):
        with pytest.raises(NotServedError, match="1 of the 2 layers of LlamaForCausalLM hand the prefix on"):
            run()


def test_keys_that_are_not_a_number_in_one_layer_fail_the_check(build, monkeypatch):
    def shift(model, prefix, delta):
        first, (key, value) = shift_keys(model, prefix, delta).layers
        return Prefix.of([first, (key.clone().fill_(torch.nan), value)])

    monkeypatch.setattr(exactness, "shift_keys", shift)
    model = build("llama")
    prepare(model)
    assert [check.name for check in check_exactness(model) if not check.passed] == ["keys moved to other positions"]


def test_keys_that_are_all_equal_can_be_checked(build):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.zero_()
    prepare(model)
    assert all(check.passed for check in check_exactness(model))


@pytest.mark.parametrize("name", [None, 3, b"jais2"])
def test_other_names_than_strings_are_a_type_error(name):
    with pytest.raises(TypeError, match=r"model_type: got .*, accepted is a string"):
        register_family(name)
    with pytest.raises(SoftPromptError, match="model_type: got ''"):
        register_family("")


def test_families_of_the_package_cannot_be_declared_again():
    with pytest.raises(SoftPromptError, match="model_type: got 'llama', which is served already"):
        register_family("llama")


def test_declarations_are_read_from_the_module_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "declared_here.py").write_text(
        "from softprompt_kernels.models import register_family\nregister_family('jais2', interleaved=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_family("jais2") is None
    monkeypatch.setenv("SOFTPROMPT_FAMILIES", "declared_here")
    assert find_family("jais2").interleaved
    monkeypatch.setenv("SOFTPROMPT_FAMILIES", "nowhere_to_be_found")
    with pytest.raises(SoftPromptError, match="SOFTPROMPT_FAMILIES: cannot import 'nowhere_to_be_found'"):
        find_family("llama")


def test_undeclared_families_count_as_plain_ones_only_inside_the_block():
    with undeclared_families() as names:
        assert find_family("jais2") == find_family("llama")
        assert find_family("stablelm") is None
    assert names == {"jais2"} and find_family("jais2") is None
