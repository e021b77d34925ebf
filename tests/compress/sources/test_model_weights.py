"""A model's files must give it each of its weights. Adapters are put on their model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt_kernels.compress import load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, prompted_logits
from softprompt_kernels.prompts import KVPrompt, save

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def changed(tiny_model_folder: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], str]:
    """`changed(change)`: a copy of the tiny model's folder, after `change` of its tensors."""

    def make(change: Callable[[dict[str, Tensor]], object]) -> str:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return make


def _prefixed(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[f"base_model.model.{key}"] = tensors.pop(key)


MISMATCHES = {
    r"missing: lm_head.weight\)": lambda tensors: tensors.pop("lm_head.weight"),
    rf"missing: {QUERY}.weight\)": lambda tensors: tensors.pop(f"{QUERY}.weight"),
    r"missing: lm_head.weight, model.embed_tokens.weight, model\S+ and \d+ more\)": _prefixed,
    rf"of another shape: {QUERY}.weight \(16, 32\) for \(32, 32\)\)": lambda tensors: tensors.update(
        {f"{QUERY}.weight": torch.zeros(16, 32)}
    ),
    r"not used: lm_head.bias\)": lambda tensors: tensors.update({"lm_head.bias": torch.zeros(300)}),
    r"not used: model.layers.0.self_attn.q_norm.weight, model.layers.2.mlp.up_proj.weight\)": lambda tensors: (
        tensors.update(
            {
                "model.layers.0.self_attn.q_norm.weight": torch.zeros(8),
                "model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32),
            }
        )
    ),
    rf"not used: {QUERY}.lora_A.weight\)": lambda tensors: tensors.update(
        {f"{QUERY}.lora_A.weight": torch.ones(2, 32)}
    ),
}


@pytest.mark.parametrize("message", MISMATCHES)
def test_weights_that_do_not_match_the_model_are_refused_by_name(message: str, changed) -> None:
    folder = changed(MISMATCHES[message])
    with pytest.raises(SoftPromptError, match=r"model: the weights in .* do not match its configuration .*" + message):
        load_model(folder, "auto", "cpu")


@pytest.mark.parametrize(
    ("config", "experts", "lost", "named"),
    [
        ("MixtralConfig", "num_local_experts", "experts.3.w3", "mlp.experts.gate_up_proj"),
        ("Qwen3MoeConfig", "num_experts", "experts.3.up_proj", "mlp.experts.gate_up_proj"),
        (
            "Qwen3MoeConfig",
            "num_experts",
            "experts.1",
            "mlp.experts.down_proj \\(3, 32, 24\\) for",
        ),
    ],
)
def test_a_missing_expert_is_named(config, experts, lost, named, tiny_model_folder, tmp_path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    folder = tmp_path / "experts"
    shutil.copytree(tiny_model_folder, folder)
    AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **{experts: 4})).save_pretrained(folder)
    load_model(str(folder), "auto", "cpu")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1." not in key or lost not in key}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SoftPromptError, match=rf"do not match its configuration \(.*: model.layers.1.{named}"):
        load_model(str(folder), "auto", "cpu")


@pytest.mark.parametrize(
    "extra", ["vision_tower.embed.weight", "model.mtp.weight", "score.weight", f"{QUERY}.scale", f"{QUERY}.masked_bias"]
)
def test_weights_of_other_parts_may_lie_beside_the_models(extra: str, changed) -> None:
    load_model(changed(lambda tensors: tensors.update({extra: torch.zeros(3)})), "auto", "cpu")


def test_tied_weights_are_not_missing(changed) -> None:
    folder = changed(lambda tensors: tensors.pop("lm_head.weight"))
    config = Path(folder) / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model, _ = load_model(folder, "auto", "cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the tiny model, without a tokenizer."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    settings = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_put_on_its_model_with_the_models_tokenizer(adapter: Path, tiny_model_folder: Path) -> None:
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(adapter)(ids).logits
        model, tokenizer = load_model(str(adapter), "auto", "cpu")
        torch.testing.assert_close(prompted_logits(model, ids, None), expected, atol=1e-5, rtol=0)
        base, _ = load_model(str(tiny_model_folder), "auto", "cpu")
        assert not torch.allclose(prompted_logits(base, ids, None), expected, atol=1e-2)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model_folder).get_vocab()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_prompt_of_a_model_with_an_adapter_loads_in_peft(adapter: Path, tmp_path: Path) -> None:
    import peft

    ids = torch.tensor([[65, 66, 67]])
    model, _ = load_model(str(adapter), "auto", "cpu")
    prompt = KVPrompt.from_prefix(capture(model, torch.tensor([[70, 71, 72, 73]])))
    save(tmp_path / "prompt", prompt, model=model)
    with torch.no_grad():
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "prompt").eval()
        expected = prompted_logits(model, ids, prompt.prefix())
        torch.testing.assert_close(loaded(input_ids=ids).logits[:, -3:], expected, atol=1e-4, rtol=0)


def test_an_adapter_that_lacks_a_weight_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SoftPromptError, match=r"adapter' do not match its configuration \(missing: .*lora_B"):
        load_model(str(adapter), "auto", "cpu")


def test_a_soft_prompt_is_not_a_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), "auto", "cpu")
    save(tmp_path / "prompt", KVPrompt.from_prefix(capture(model, torch.tensor([[65, 66, 67]]))), model=model)
    with pytest.raises(SoftPromptError, match=r"prompt' is a soft prompt \(CARTRIDGE\), accepted is the model"):
        load_model(str(tmp_path / "prompt"), "auto", "cpu")


def test_an_adapter_of_no_model_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(SoftPromptError, match="a PEFT adapter that does not name its model"):
        load_model(str(adapter), "auto", "cpu")
    path.write_text('{"peft_type": "LORA", "base_model_name_or_path": "/no/such/model"}')
    with pytest.raises(SoftPromptError, match=r"model: cannot load '.*adapter'"):
        load_model(str(adapter), "auto", "cpu")
