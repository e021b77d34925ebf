"""`generate` of a patched PEFT model: PEFT's tokens, and rows that do not depend on their padding."""

import pytest
import torch
from transformers import GenerationConfig

from softprompt_kernels import unpatch
from softprompt_kernels.errors import SoftPromptError

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_tokens_of_peft(family, kind, pair, tokens):
    ids = tokens(3, 5)
    expected, got = (model.generate(input_ids=ids, **OPTIONS, num_beams=2) for model in pair(kind, family))
    assert torch.equal(got, expected)


def test_arguments_of_pefts_generate(pair, tokens):
    model, patched = pair("PREFIX_TUNING")
    ids = tokens(1, 5)
    expected = model.generate(input_ids=ids, **OPTIONS)
    for arguments, options in ([ids], {}), ([], {"inputs": ids}), ([], {"input_ids": ids, "use_cache": True}):
        assert torch.equal(patched.generate(*arguments, **options, **OPTIONS), expected)
    model.generation_config.max_new_tokens = patched.generation_config.max_new_tokens = 3
    assert torch.equal(patched.generate(ids), model.generate(ids))
    assert patched.generate(ids).shape == (1, 8)
    patched.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0)  # PEFT gives it to the inner model
    assert patched.generate(ids).shape == (1, 7)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_left_padded_rows_equal_rows_alone(family, with_mask, kind, pair, tokens, padded):
    """Without a mask, transformers takes the padding token for padding."""
    _, model = pair(kind, family)
    rows = [tokens(3), tokens(7, seed=1)]
    ids, mask = padded(rows, "left")
    out = model.generate(input_ids=ids, **OPTIONS, **({"attention_mask": mask} if with_mask else {}))
    for row, new in zip(rows, out[:, ids.shape[1] :], strict=True):
        assert torch.equal(model.generate(row[None], **OPTIONS)[0, len(row) :], new)


def test_after_unpatch_it_is_pefts(kind, pair, tokens):
    model, patched = pair(kind)
    generate = patched.generate
    unpatch(patched)
    for call in (patched.generate, generate):
        assert torch.equal(call(input_ids=tokens(2, 5), **OPTIONS), model.generate(input_ids=tokens(2, 5), **OPTIONS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "input_ids: got NoneType, accepted is"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.int64), "num_return_sequences": 1, "prompt_lookup_num_tokens": 2},
         "prompt_lookup_num_tokens: not accepted by generate"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.int64), "max_new_tokens": 60}, "the sequence is too long"),
    ],
    ids=["embeddings", "look up", "too long"],
)  # fmt: skip
def test_what_a_prompt_does_not_allow_is_refused(arguments, message, pair):
    _, model = pair("CARTRIDGE")
    with pytest.raises(SoftPromptError, match=message):
        model.generate(**arguments)
