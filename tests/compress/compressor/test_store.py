"""Saved compressors: read back with the same prompts, refused for another model, and adapters of PEFT."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import load_compressor, read_once
from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.store import digest, fingerprints, save_compressor
from softprompt_kernels.errors import SoftPromptError

IDS = torch.arange(30) + 40


@pytest.fixture
def saved(make_compressor: Callable[..., Compressor], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    """`saved(rank)`: folder, and the prompt of `IDS` before it was saved."""

    def save(rank: int = 0) -> tuple[Path, Any]:
        compressor = make_compressor()
        marks = fingerprints(compressor.model, tokenizer)
        if rank:
            compressor = make_compressor(rank)
        prompt = read_once(compressor, IDS)
        save_compressor(tmp_path / "saved", compressor, marks, "base", {"steps": 3}, {"kl": float("nan")})
        if compressor.lora is not None:
            compressor.lora.detach()
        return tmp_path / "saved", prompt

    return save


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_compressor_reads_the_same_prompt(
    saved: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rank: int
) -> None:
    folder, before = saved(rank)
    compressor = load_compressor(folder, model, tokenizer)
    for pair, pair_before in zip(read_once(compressor, IDS).layers, before.layers, strict=True):
        assert all(map(torch.equal, pair, pair_before))
    if compressor.lora is not None:
        compressor.lora.detach()


def test_lora_is_an_adapter_of_peft(saved: Any, tiny_model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import PeftModel

    from softprompt_kernels.models import prepare, prompted_hidden

    folder, _ = saved(2)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval(), folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    prepare(plain)
    compressor = load_compressor(folder, plain, tokenizer)
    with torch.no_grad(), compressor.reading():
        ours = prompted_hidden(plain, IDS[None], None)
    with torch.no_grad():
        theirs = peft_model.base_model.model.model(IDS[None]).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_model_or_tokenizer_is_refused(
    saved: Any, tiny_model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder, _ = saved(2)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(SoftPromptError, match=r"was trained for another model; .* weights \(the same shape"):
        load_compressor(folder, other, tokenizer)
    record = json.loads((folder / "compressor.json").read_text())
    record["tokenizer"]["splitting"] = "0" * 64
    (folder / "compressor.json").write_text(json.dumps(record))
    with pytest.raises(SoftPromptError, match="was trained for another tokenizer"):
        load_compressor(folder, AutoModelForCausalLM.from_pretrained(tiny_model_folder), tokenizer)


def test_damaged_folders_are_refused(
    saved: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def refused(match: str) -> None:
        with pytest.raises(SoftPromptError, match=match):
            load_compressor(folder, model, tokenizer)
        assert not any("lora" in name for name, _ in model.named_parameters())

    with pytest.raises(SoftPromptError, match=r"has no compressor.json, accepted is a folder that"):
        load_compressor(tmp_path, model, tokenizer)
    folder, _ = saved(2)
    first = digest(folder)
    record = json.loads((folder / "compressor.json").read_text())
    assert record["figures"] == {"kl": None}
    for change, match in (
        ({"format": 2}, "format 2, accepted is 1"),
        ({"state": "kept"}, "state is 'kept', accepted are replaced and accumulated"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 4}, "does not hold `summary` of 4 tokens"),
        ({"lora_rank": 3}, "does not fit the model: 28 tensors differ, .* LoRA layers of rank 3"),
    ):
        (folder / "compressor.json").write_text(json.dumps(record | change))
        refused(match)
    assert digest(folder) != first, "a prompt of another form is another prompt"
    (folder / "compressor.json").write_text(json.dumps(record))
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    refused("truncated or not a safetensors file")
