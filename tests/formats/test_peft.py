"""Exports that PEFT loads with the same logits, and prompts of PEFT that are imported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.importing import import_prompt
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load
from softprompt_kernels.prompts.weights import rounded

Logits = Callable[..., Tensor]
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}


def peft_logits(model: LlamaForCausalLM, folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits
    return found[:, -ids.shape[1] :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_peft_gives_an_export_the_same_logits(
    kind: str,
    dtype: str,
    kv: KVPrompt,
    embedding: EmbeddingPrompt,
    saved: Callable[..., Path],
    plain_model: LlamaForCausalLM,
    ids: Tensor,
    logits: Logits,
    tmp_path: Path,
) -> None:
    prompt: KVPrompt | EmbeddingPrompt = embedding if kind == "PROMPT_TUNING" else kv
    export(read(saved(prompt)), "peft", tmp_path / "p", dtype=dtype, kv_type=kind)  # type: ignore[arg-type]
    assert str(load_file(tmp_path / "p" / "adapter_model.safetensors")["prompt_embeddings"].dtype).endswith(dtype)
    expected = logits(rounded(prompt, dtype))  # type: ignore[arg-type]
    assert (peft_logits(plain_model, tmp_path / "p", ids) - expected).abs().max() <= 1e-5
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["peft_type"] == kind


def test_vectors_are_turned_into_keys_and_values_with_a_model(
    embedding: EmbeddingPrompt,
    saved: Callable[..., Path],
    model: LlamaForCausalLM,
    plain_model: LlamaForCausalLM,
    ids: Tensor,
    logits: Logits,
    tmp_path: Path,
) -> None:
    content = read(saved(embedding))
    with pytest.raises(SoftPromptError, match=r"--type: got PREFIX_TUNING for an embedding prompt.*with --model"):
        export(content, "peft", tmp_path / "p", kv_type="PREFIX_TUNING")
    export(content, "peft", tmp_path / "p", kv_type="PREFIX_TUNING", model=model)
    assert (peft_logits(plain_model, tmp_path / "p", ids) - logits(embedding)).abs().max() <= 1e-5


def test_a_prompt_in_8_bits_is_for_this_package(
    kv: KVPrompt, saved: Callable[..., Path], model: LlamaForCausalLM, plain_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    content = read(saved(kv))
    with pytest.raises(SoftPromptError, match="PEFT cannot read 8 bits"):
        export(content, "peft", tmp_path / "p", dtype="int8")
    export(content, "folder", tmp_path / "p", dtype="int8")
    prompt, _ = load(tmp_path / "p", model)
    assert isinstance(prompt, KVPrompt) and torch.equal(prompt.key, rounded(kv, "int8").key)  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"Repo id|adapter_model"):  # PEFT finds no file there
        PeftModel.from_pretrained(plain_model, str(tmp_path / "p"))


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**COMMON),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**COMMON),
    "a projection": lambda: PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=5),
}


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_an_imported_prompt_of_peft_has_its_logits(
    kind: str,
    safetensors: bool,
    model: LlamaForCausalLM,
    plain_model: LlamaForCausalLM,
    tokenizer: object,
    ids: Tensor,
    logits: Logits,
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    wrapped = get_peft_model(plain_model, CONFIGS[kind]()).eval()
    wrapped.save_pretrained(str(tmp_path / "peft"), safe_serialization=safetensors)
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits[:, -ids.shape[1] :]
    import_prompt(read(tmp_path / "peft"), model, tokenizer, tmp_path / "ours")  # type: ignore[arg-type]
    prompt, record = load(tmp_path / "ours", model)
    assert record is not None and (logits(prompt) - expected).abs().max() <= 1e-5
    assert not json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).get("prefix_projection")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": 5}, "prompt_embeddings is a int, accepted is a dense tensor"),
        ({"prompt_embeddings": torch.zeros(6, 64, device="meta")}, "without numbers"),
        ({"prompt_embeddings": torch.full((6, 64), 1e300, dtype=torch.float64)}, "not finite"),
        ({5: torch.zeros(1), "a": torch.zeros(1)}, "has no tensor prompt_embeddings; it has 5, a"),
    ],
)
def test_a_damaged_file_of_older_versions(
    tensors: dict[object, object], message: str, content: Content, tmp_path: Path
) -> None:
    export(content, "peft", tmp_path / "p")
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(SoftPromptError, match=message):
        read(tmp_path / "p")


def test_other_adapters_of_peft_are_refused(plain_model: LlamaForCausalLM, tmp_path: Path) -> None:
    get_peft_model(plain_model, PromptEncoderConfig(**COMMON)).save_pretrained(str(tmp_path / "p"))
    with pytest.raises(SoftPromptError, match="peft_type is 'P_TUNING', accepted are PROMPT_TUNING"):
        read(tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"peft_type": "PROMPT_TUNING", "num_transformer_submodules": 2}))
    with pytest.raises(SoftPromptError, match="accepted are prompts for CAUSAL_LM"):
        read(tmp_path / "p")
