"""Trap: queries restart at position 0, as some cartridges do. Here they continue at position P, as in PEFT.

The two conventions differ in every score with rotary positions, and in every token with learned positions. P is the
prompt's own length, not the padded length of a bank. A saved prompt records the convention.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, generate, prefix_of, prepare, prompted_logits
from softprompt_kernels.prompts import KVPrompt, load, save
from softprompt_kernels.prompts.prefix import Prefix

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    ),
    "gpt2": GPT2Config(
        vocab_size=61, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=None, eos_token_id=None
    ),
}
CONTEXT, IDS = torch.arange(2, 11)[None], torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(params=CONFIGS)
def models(request):
    """The same random model twice: prepared, and unprepared."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        pair.append(model)
    prepare(pair[0])
    return pair


def logits_at(unprepared, prefix: Prefix, first: int) -> torch.Tensor:
    """The unprepared model's logits with the prefix as its cache and queries from position `first`."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prefix.layers):
        cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
    positions = torch.arange(first, first + IDS.shape[1])[None]
    return unprepared(IDS, past_key_values=cache, position_ids=positions).logits


def test_queries_continue_at_the_length_of_the_prompt(models):
    model, unprepared = models
    prefix = capture(model, CONTEXT)
    got = prompted_logits(model, IDS, prefix)
    torch.testing.assert_close(got, logits_at(unprepared, prefix, 9), atol=1e-5, rtol=0)
    assert (got - logits_at(unprepared, prefix, 0)).abs().max() > 1e-2


def test_padding_of_a_bank_does_not_move_the_queries(models):
    model, unprepared = models
    prefix = capture(model, CONTEXT)
    padded = Prefix(prefix.layers, torch.tensor([6]))
    got = prompted_logits(model, IDS, padded)
    torch.testing.assert_close(got, logits_at(unprepared, prefix.slice(0, 6), 6), atol=1e-5, rtol=0)


def test_generation_continues_at_the_length_of_the_prompt(models):
    model, unprepared = models
    got = generate(model, IDS, capture(model, CONTEXT), max_new_tokens=6, do_sample=False)
    expected = unprepared.generate(torch.cat([CONTEXT.expand(2, -1), IDS], dim=1), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected[:, 9:])


def test_a_saved_prompt_records_its_position_convention_and_keeps_it(models, tmp_path: Path) -> None:
    model, unprepared = models
    save(tmp_path / "prompt", KVPrompt.from_prefix(capture(model, CONTEXT)), model=model)
    record = json.loads((tmp_path / "prompt" / "softprompt.json").read_text())
    assert record["positions"] == "prompt at 0..k-1, the sequence continues at k"
    prefix = prefix_of(model, load(tmp_path / "prompt", model)[0])
    with torch.no_grad():
        got = prompted_logits(model, IDS, prefix)
        torch.testing.assert_close(got, logits_at(unprepared, prefix, 9), atol=1e-5, rtol=0)


def test_a_saved_prompt_of_the_other_convention_is_refused(models, tmp_path: Path) -> None:
    model, _ = models
    save(tmp_path / "prompt", KVPrompt.from_prefix(capture(model, CONTEXT)), model=model)
    file = tmp_path / "prompt" / "softprompt.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"positions": "the sequence restarts at 0"}))
    with pytest.raises(SoftPromptError, match="positions are 'the sequence restarts at 0'"):
        load(tmp_path / "prompt", model)
