"""Queries continue at position k, as in PEFT, and do not restart at 0: recorded in the file, honoured by the model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of, prepare, prompted_logits
from softprompt_kernels.prompts import KVPrompt, load, save

K = 4


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_at(prompt: KVPrompt, ids: torch.Tensor, first: int) -> torch.Tensor:
    """transformers alone, with the prompt in its cache and the queries from position `first` on."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prompt.prefix().layers):
        cache.update(key, value, layer)
    positions = torch.arange(first, first + ids.shape[1])[None]
    return model()(ids, past_key_values=cache, position_ids=positions).logits


def test_queries_continue_behind_the_prompt_and_the_file_says_so(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    prompt = KVPrompt(*torch.randn(2, 2, 2, K, 8, generator=generator))
    ids = torch.randint(0, 31, (1, 6), generator=generator)
    save(tmp_path / "prompt", prompt, model=model())
    record = json.loads((tmp_path / "prompt" / "softprompt.json").read_text())
    assert record["positions"] == "prompt at 0..k-1, the sequence continues at k"

    mine = model()
    prepare(mine)
    loaded, _ = load(tmp_path / "prompt", mine)
    with torch.no_grad():
        logits = prompted_logits(mine, ids, prefix_of(mine, loaded))
    assert (logits - logits_at(prompt, ids, K)).abs().max() < 1e-5
    assert (logits - logits_at(prompt, ids, 0)).abs().max() > 1e-2


def test_a_prompt_of_the_other_convention_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "prompt", KVPrompt(*torch.zeros(2, 2, 2, K, 8)), model=model())
    file = tmp_path / "prompt" / "softprompt.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"positions": "the sequence restarts at 0"}))
    with pytest.raises(SoftPromptError, match="positions are 'the sequence restarts at 0'"):
        load(tmp_path / "prompt", model())
