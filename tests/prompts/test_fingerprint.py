"""Fingerprints agree for one checkpoint in any dtype, and differ for another model or tokenizer."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_has_the_same_fingerprint(
    family: str, dtype: torch.dtype, make_model: Callable[..., PreTrainedModel]
) -> None:
    original, cast = model_fingerprint(make_model(family)), model_fingerprint(make_model(family).to(dtype))
    assert differences(original, cast) == []
    assert differences(cast, original) == []


def test_casts_of_a_bfloat16_checkpoint_agree_with_each_other(make_model: Callable[..., PreTrainedModel]) -> None:
    native = make_model().bfloat16()
    half, full = copy.deepcopy(native).half(), copy.deepcopy(native).float()
    for one in (native, half, full):
        for two in (native, half, full):
            assert differences(model_fingerprint(one), model_fingerprint(two)) == []


def test_a_fingerprint_can_be_stored_as_json(make_model: Callable[..., PreTrainedModel]) -> None:
    fingerprint = model_fingerprint(make_model())
    assert differences(json.loads(json.dumps(fingerprint)), fingerprint) == []


def test_a_change_of_any_parameter_is_found(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    original = model_fingerprint(make_model())
    model = make_model()
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.02)
        found = differences(original, model_fingerprint(model))
        assert found == ["weights (the same shape with other values)"], name
        with torch.no_grad():
            parameter.copy_(kept)
    assert differences(original, model_fingerprint(model)) == []


def test_a_tied_head_and_an_equal_copy_agree(make_model: Callable[..., PreTrainedModel]) -> None:
    tied = make_model(tie_word_embeddings=True)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    assert differences(model_fingerprint(tied), model_fingerprint(untied)) == []
    with torch.no_grad():
        untied.lm_head.weight.mul_(2)
    assert differences(model_fingerprint(tied), model_fingerprint(untied)) != []


def test_differences_of_shape_are_named_and_weights_are_left_out(make_model: Callable[..., PreTrainedModel]) -> None:
    found = differences(
        model_fingerprint(make_model()), model_fingerprint(make_model(num_hidden_layers=2, num_key_value_heads=3))
    )
    assert found == ["layers 3 against 2", "kv heads 2 against 3"]


def test_other_rotary_settings_are_found(make_model: Callable[..., PreTrainedModel]) -> None:
    other = make_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert differences(model_fingerprint(make_model()), model_fingerprint(other)) == [
        "rope rope theta 10000.0 against 500000.0"
    ]


def test_a_setting_that_only_one_fingerprint_has_is_no_difference() -> None:
    assert differences({"rope": {"theta": 1.0}}, {"rope": {"theta": 1.0, "new_default": None}}) == []
    assert differences({"rope": None}, {"rope": {"theta": 1.0}}) != []


def test_a_damaged_record_differs() -> None:
    assert differences({}, {"layers": 3, "weights": {"float16": "a"}}) == ["layers None against 3"]
    assert differences({"weights": 5}, {"weights": {"float16": "a"}}) != []


def test_tokenizers_with_different_vocabularies_differ(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    one = tokenizer_fingerprint(make_tokenizer("a", "b"))
    assert differences(one, tokenizer_fingerprint(make_tokenizer("a", "b"))) == []
    for words, found in (
        (("b", "a"), ["tokens", "tokens without added"]),
        (("a",), ["tokens without added"]),
        (("a", "b", "c"), ["tokens without added"]),
    ):
        assert differences(one, tokenizer_fingerprint(make_tokenizer(*words), one)) == found


def test_tokenizers_of_one_vocabulary_that_split_differently_differ(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    from tokenizers.normalizers import Lowercase

    words = ("hello", "Naïve", "naïve")
    lower = make_tokenizer(*words)
    lower.backend_tokenizer.normalizer = Lowercase()
    assert differences(tokenizer_fingerprint(make_tokenizer(*words)), tokenizer_fingerprint(lower)) == ["splitting"]
