"""What a user changes in a model or tokenizer without changing what a prompt means does not refuse the prompt."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import KVPrompt, load, save
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint

MakeModel = Callable[..., PreTrainedModel]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def model_differences(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    saved = json.loads(json.dumps(model_fingerprint(one)))
    return differences(saved, model_fingerprint(other, saved))


def tokenizer_differences(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[str]:
    saved = json.loads(json.dumps(tokenizer_fingerprint(one)))
    return differences(saved, tokenizer_fingerprint(other, saved))


def resized(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    model.resize_token_embeddings(tokens)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_more_tokens_is_the_same_model(make_model: MakeModel, family: str, tied: bool) -> None:
    def make(**changes: object) -> PreTrainedModel:
        return make_model(family, tie_word_embeddings=tied, **changes)

    for tokens in (54, 64, 200):
        assert model_differences(make(), resized(make(), tokens)) == [], "made with fewer"
        assert model_differences(resized(make(), tokens), make()) == [], "made with more"
    assert model_differences(make(), resized(make(), 64).bfloat16()) == []
    more, fewer = (
        f"weights ({counts} tokens, and those of both with other values)"
        for counts in ("53 against 64", "64 against 53")
    )
    assert model_differences(make(), resized(make(seed=1), 64)) == [more]
    assert model_differences(resized(make(), 64), make(seed=1)) == [fewer]
    changed = resized(make(), 64)
    with torch.no_grad():
        changed.get_input_embeddings().weight[:53].mul_(1.02)
    assert model_differences(make(), changed) == [more], "known tokens count"
    assert model_differences(changed, make()) == [fewer], "known tokens count"
    if not tied:
        redrawn = make()
        torch.nn.init.normal_(redrawn.get_output_embeddings().weight)
        assert model_differences(resized(make(), 64), redrawn) == [fewer], "the head counts"


def test_of_a_multimodal_model_the_text_part_counts(make_model: MakeModel) -> None:
    common = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    text = Gemma3TextConfig(**common, num_hidden_layers=2, num_key_value_heads=2)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    wrapped = AutoModelForMultimodalLM.from_config(
        Gemma3Config(
            text_config=text,
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_id=50,
        )
    )
    alone = AutoModelForCausalLM.from_config(text)
    assert model_differences(wrapped, alone) == model_differences(alone, wrapped)
    assert model_differences(wrapped, alone) == ["weights (the same shape with other values)"]
    alone.model.load_state_dict(wrapped.get_decoder().state_dict())
    alone.lm_head.load_state_dict(wrapped.lm_head.state_dict())
    assert model_differences(wrapped, alone) == model_differences(alone, wrapped) == []
    torch.nn.init.normal_(next(wrapped.model.vision_tower.parameters()))
    assert model_differences(alone, wrapped) == []
    torch.nn.init.normal_(wrapped.get_decoder().layers[1].mlp.up_proj.weight)
    assert model_differences(alone, wrapped) == ["weights (the same shape with other values)"]


@pytest.mark.parametrize("more", [{}, {"pad_token": "[PAD]"}], ids=str)
def test_a_known_token_that_was_made_special_is_the_same(
    make_tokenizer: MakeTokenizer, more: dict[str, str], tmp_path: Path
) -> None:
    one, other = make_tokenizer("a", "b"), make_tokenizer("a", "b")
    other.add_special_tokens({"extra_special_tokens": ["b"], **more})
    other.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_added_vocab().keys() != one.get_added_vocab().keys()
    assert tokenizer_differences(one, read) == []
    if not more:
        assert tokenizer_differences(read, one) == []
    assert tokenizer_differences(make_tokenizer("a", "c"), read) != []


def test_a_head_with_a_bias_may_have_more_tokens_too(make_model: MakeModel) -> None:
    def make(seed: int = 0) -> PreTrainedModel:
        model = make_model(seed=seed)
        model.lm_head = torch.nn.Linear(24, 53)
        return model

    torch.manual_seed(3)
    one = make()
    other = make()
    other.load_state_dict(one.state_dict())
    assert model_differences(one, resized(other, 60)) == []
    with torch.no_grad():
        other.lm_head.bias[:53].add_(1)
    assert model_differences(one, other) == ["weights (53 against 60 tokens, and those of both with other values)"]


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token": "<s>"},  # tok.pad_token = tok.eos_token
        {"eos_token": "<s>"},
        {"unk_token": "<s>"},
        {"pad_token": "[PAD]"},  # a new token
        {"extra_special_tokens": ["<|one|>", "<|two|>"]},
    ],
    ids=str,
)
def test_a_tokenizer_with_other_special_tokens_or_more_tokens_is_the_same(
    make_tokenizer: MakeTokenizer, change: dict[str, object]
) -> None:
    one, other = make_tokenizer("a", "b"), make_tokenizer("a", "b")
    other.add_special_tokens(change)
    assert tokenizer_differences(one, other) == []
    assert tokenizer_differences(other, one) == []


def test_a_prompt_is_served_on_a_base_with_a_padding_token(
    make_model: MakeModel, make_tokenizer: MakeTokenizer, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    tokenizer, more = make_tokenizer("a", "b"), make_tokenizer("a", "b")
    more.add_special_tokens({"pad_token": "[PAD]"})
    bigger = resized(make_model(), 64)
    save(tmp_path / "one", random_kv(make_model()), model=make_model(), tokenizer=tokenizer)
    save(tmp_path / "two", random_kv(make_model()), model=bigger, tokenizer=more)
    load(tmp_path / "one", bigger, more)
    load(tmp_path / "two", make_model(), tokenizer)


def test_records_of_the_version_before_are_read(make_model: MakeModel, make_tokenizer: MakeTokenizer) -> None:
    """They have no `body` and `tokens_without_added`, and a hash of the special tokens."""
    model, tokenizer = model_fingerprint(make_model()), tokenizer_fingerprint(make_tokenizer("a"))
    del model["body"], model["rows"], tokenizer["tokens_without_added"]
    tokenizer["special_tokens"] = "0" * 64
    assert differences(model, model_fingerprint(make_model(), model)) == []
    assert differences(model, model_fingerprint(resized(make_model(), 64), model)) == []
    assert differences(tokenizer, tokenizer_fingerprint(make_tokenizer("a"), tokenizer)) == []
    model["vocabulary"] += 1
    assert differences(model, model_fingerprint(make_model(), model)) == ["vocabulary 54 against 53"]


def test_force_turns_a_difference_into_a_warning_and_shapes_must_fit_all_the_same(
    make_model: MakeModel, make_tokenizer: MakeTokenizer, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    save(tmp_path / "p", random_kv(make_model()), model=make_model(), tokenizer=make_tokenizer("a"))
    with pytest.raises(SoftPromptError, match=r"other values\); force \(--force\) loads it all the same"):
        load(tmp_path / "p", make_model(seed=1))
    with pytest.warns(UserWarning, match="made for another model; .* other values"):
        prompt, _ = load(tmp_path / "p", make_model(seed=1), force=True)
    assert prompt.length == 5
    with pytest.warns(UserWarning, match="made for another tokenizer; .* tokens"):
        load(tmp_path / "p", make_model(), make_tokenizer("b"), force=True)
    with pytest.warns(UserWarning), pytest.raises(SoftPromptError, match="this model 2 of 2 of 8"):
        load(tmp_path / "p", make_model(num_hidden_layers=2), force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "p", make_model(), make_tokenizer("a"), force=True)
