"""`softprompt doctor --model` says whether a model is served, and why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from softprompt_kernels.models import registry


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry._families))


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path):
    """`folder(model)`: a folder with the model and the tokenizer of the tiny one."""

    def make(model: transformers.PreTrainedModel) -> Path:
        target = tmp_path / "model"
        shutil.copytree(tiny_model_folder, target)
        for weights in target.glob("*.safetensors"):
            weights.unlink()
        model.save_pretrained(target)
        return target

    return make


def text_config(name: str, **options: object) -> transformers.PreTrainedConfig:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 512}
    return getattr(transformers, name)(**sizes, **options)


def randomised(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gemma3_wrapper() -> transformers.PreTrainedModel:
    options = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text_config("Gemma3TextConfig", **options),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    return randomised(transformers.Gemma3ForConditionalGeneration(config))


def test_a_served_model(run, tiny_model_folder):
    result = run("doctor", "--model", tiny_model_folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("LlamaForCausalLM, family llama, float32 on cpu\n")
    assert result.stdout.count("largest difference") == 5 and result.stdout.endswith("\nServed.\n")


def test_a_multimodal_wrapper(run, folder):
    result = run("doctor", "--model", folder(gemma3_wrapper()))
    assert result.exit_code == 0, result.output
    assert "Gemma3ForConditionalGeneration, family gemma3_text inside gemma3" in result.stdout


def test_a_window_that_the_context_does_not_reach_is_named(run, folder):
    result = run("doctor", "--model", folder(gemma3_wrapper()), "--tokens", 8)
    assert result.exit_code == 0 and "window of 16 tokens was not reached: --tokens 17 tests it too" in result.stdout


def test_a_family_that_nobody_declared_is_tested_all_the_same(run, folder):
    model = randomised(transformers.Jais2ForCausalLM(text_config("Jais2Config")))
    result = run("doctor", "--model", folder(model))
    assert result.exit_code == 1 and "largest difference" in result.stdout
    assert "Not served: it is exact, but nobody has declared its family." in result.stdout
    assert "register_family('jais2')" in result.stdout


def test_a_family_that_is_known_not_to_be_exact(run, folder):
    model = transformers.NemotronForCausalLM(text_config("NemotronConfig"))
    result = run("doctor", "--model", folder(model))
    assert result.exit_code == 1 and "Not served: model: got the family 'nemotron', but its layers" in result.stdout


def test_a_declaration_that_is_wrong(run, folder):
    registry.register_family("jais2", logit_scale=lambda config: 1.1)
    result = run("doctor", "--model", folder(randomised(transformers.Jais2ForCausalLM(text_config("Jais2Config")))))
    assert result.exit_code == 1 and "FAILED" in result.stdout
    assert result.stdout.endswith("Not served: it does not give the same behind a prefix.\n")


def test_input_that_cannot_be_used_has_exit_code_2(run, tiny_model_folder, tmp_path):
    for options in (["--model", tmp_path / "none"], ["--model", tiny_model_folder, "--tokens", 501]):
        result = run("doctor", *options)
        assert result.exit_code == 2 and "Error:" in result.stderr


def test_compress_serves_a_multimodal_wrapper_from_text_to_prompt(run, folder, inputs, tmp_path):
    model = folder(gemma3_wrapper())
    result = run(*inputs.compress(tmp_path / "run", model=model))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    result = run("generate", "--model", model, "--prompt", tmp_path / "run" / "prompt", "--max-new-tokens", 4, "Who?")
    assert result.exit_code == 0, result.output


def test_a_head_that_cannot_be_read_is_not_served(run, folder, monkeypatch):
    """An adapter in the head."""
    from softprompt_kernels.compress.sources import model as source

    loaded = source.load_model

    def with_hook(*arguments):
        model, tokenizer = loaded(*arguments)
        model.lm_head.register_forward_hook(lambda module, args, output: output)
        return model, tokenizer

    monkeypatch.setattr(source, "load_model", with_hook)
    result = run("doctor", "--model", folder(randomised(transformers.LlamaForCausalLM(text_config("LlamaConfig")))))
    assert result.exit_code == 1 and "Not served: model: its head has hooks" in result.stdout


def test_latent_attention_is_not_served(run, folder, monkeypatch):
    monkeypatch.delitem(registry.REFUSED, "glm4_moe_lite")
    sizes = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "n_routed_experts": 4, "n_group": 1}
    options = {"topk_group": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    config = transformers.Glm4MoeLiteConfig(**(text_config("LlamaConfig").to_diff_dict() | sizes | options))
    result = run("doctor", "--model", folder(randomised(transformers.Glm4MoeLiteForCausalLM(config))))
    assert result.exit_code == 1 and "Not served: model: got keys of size" in result.stdout
