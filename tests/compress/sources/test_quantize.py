"""Models in 8 and 4 bits: they load, teach and train as a model of these weights in full precision, and are told apart.

`make quantized` runs them where bitsandbytes and torchao are installed. What is said without these always runs.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.sources import quantize
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.start import compress
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, head_of, prepare, prompted_logits
from softprompt_kernels.models.exactness import check_exactness
from softprompt_kernels.prompts import KVPrompt, load
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint

BITS = ("8bit", "4bit")
HOW = {"8bit": "torchao Int8WeightOnlyConfig", "4bit": "bitsandbytes 4bit"}
needs_packages = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("torchao") is None, reason="bitsandbytes or torchao is not installed"
)
IDS = torch.arange(3, 33)[None]


def gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits behind a prompt, and their squares' gradient by its keys and values."""
    prompt = KVPrompt.from_prefix(capture(model, IDS[:, :12]))
    logits = prompted_logits(model, IDS[:, 12:], prompt.prefix())
    logits.float().square().mean().backward()
    return logits.detach(), torch.cat([each.grad.flatten() for each in prompt.parameters() if each.grad is not None])


@needs_packages
@pytest.mark.parametrize("bits", BITS)
def test_layers_are_quantised_and_the_head_is_not(bits: str, tiny_model_folder: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), bits)
    whole, _ = load_model(str(tiny_model_folder))
    layers = {type(each.weight).__name__ for each in model.model.layers.modules() if isinstance(each, nn.Linear)}
    assert layers == {"Int8Tensor" if bits == "8bit" else "Params4bit"}
    assert torch.equal(head_of(model).weight, head_of(whole).weight)
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    weight = model.model.layers[0].mlp.up_proj.weight
    numbers = weight.qdata if bits == "8bit" else weight
    assert numbers.nbytes == whole.model.layers[0].mlp.up_proj.weight.numel() * (1 if bits == "8bit" else 0.5)


@needs_packages
@pytest.mark.parametrize("bits", BITS)
def test_a_prefix_gives_what_the_text_in_one_piece_gives(bits: str, tiny_model_folder: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), bits)
    assert all(check.difference <= check.accepted for check in check_exactness(model))


@needs_packages
@pytest.mark.parametrize("bits", BITS)
def test_a_run_with_a_gradient_computes_what_the_teacher_does(bits: str, tiny_model_folder: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), bits)
    before = model_fingerprint(model)
    with torch.no_grad():
        expected = prompted_logits(model, IDS[:, 12:], capture(model, IDS[:, :12]))
    logits, _ = gradient(model)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert model_fingerprint(model) == before


@needs_packages
@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_that_of_the_rounded_weights(bits: str, tiny_model_folder: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), bits)
    logits, found = gradient(model)
    rounded, _ = load_model(str(tiny_model_folder), bits)
    if bits == "8bit":
        for module in rounded.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    else:
        rounded = rounded.dequantize().float()
    prepare(rounded)
    expected_logits, expected = gradient(rounded)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5 * float(expected_logits.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@needs_packages
@pytest.mark.parametrize("bits", BITS)
def test_a_run_behind_a_quantised_model(bits: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    context, queries = tmp_path / "context.txt", tmp_path / "queries.jsonl"
    context.write_text("The red house by the river is number seven. Ada Brook keeps nine geese and a cat named Tom.")
    queries.write_text(
        "".join(json.dumps({"input": f"What is {word}?"}) + "\n" for word in ("red", "Ada", "Tom", "it"))
    )
    config = CompressConfig(
        model=str(tiny_model_folder), context=context, output=tmp_path / "run", tokens=12, queries=queries, selfstudy=0,
        heldout_share=0.25, new_tokens=6, matching_steps=10, steps=4, batch_size=2, dtype=bits,
        gradient_checkpointing=True,
    )  # fmt: skip
    compress(config)
    folder = tmp_path / "run" / "prompt"
    model, tokenizer = load_model(str(tiny_model_folder), bits)
    prompt, record = load(folder, model, tokenizer)
    assert prompt.length == 12 and next(prompt.parameters()).dtype == torch.float32
    assert record["model"]["quantization"] == HOW[bits]
    whole, _ = load_model(str(tiny_model_folder))
    with pytest.raises(SoftPromptError, match=f"quantization {HOW[bits]} against None"):
        load(folder, whole, tokenizer)
    assert load(folder, whole, tokenizer, force=True)[0].length == 12


def stored(folder: Path, tmp_path: Path, how: str) -> Path:
    """A model folder whose weights are stored quantised."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=how == "8bit", load_in_4bit=how == "4bit")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / how)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / how / name)
    if (folder / "chat_template.jinja").exists():
        shutil.copy(folder / "chat_template.jinja", tmp_path / how)
    return tmp_path / how


@needs_packages
@pytest.mark.parametrize("how", [*BITS, "torchao"])
def test_a_model_that_is_stored_quantised(how: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = stored(tiny_model_folder, tmp_path, how)
    model, _ = load_model(str(folder))
    before = model_fingerprint(model)
    with torch.no_grad():
        expected = prompted_logits(model, IDS[:, 12:], capture(model, IDS[:, :12]))
    logits, found = gradient(model)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert found.abs().max() > 0 and model_fingerprint(model) == before
    assert before["quantization"] == (HOW["8bit"] if how == "torchao" else f"bitsandbytes {how}")
    with pytest.raises(SoftPromptError, match=r"dtype: got 4bit .* is stored quantised"):
        load_model(str(folder), "4bit")


@pytest.mark.parametrize("bits", BITS)
def test_a_missing_package_is_named(bits: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(
        SoftPromptError, match=rf"dtype: got {bits}, .*{HOW[bits].split()[0]}.* installed: pip install .*quantize"
    ):
        load_model(str(tiny_model_folder), bits)


def test_a_missing_package_of_a_stored_model_is_named(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SoftPromptError, match=r"is stored quantised \(torchao\), for which torchao .*must be installed"
    ):
        load_model(str(tmp_path / "model"))
    with pytest.raises(SoftPromptError, match=r"dtype: got 8bit for .* is stored quantised \(torchao\)"):
        load_model(str(tmp_path / "model"), "8bit")


def test_a_quantised_model_is_another_model() -> None:
    whole = {"layers": 2, "weights": {"float16": "a"}}
    quantised = {**whole, "quantization": "bitsandbytes 4bit"}
    assert differences(whole, whole) == differences(quantised, quantised) == []
    assert differences(whole, quantised) == ["quantization None against bitsandbytes 4bit"]
    assert differences(quantised, whole) == ["quantization bitsandbytes 4bit against None"]
