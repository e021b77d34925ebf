"""The settings that a model's folder brings change neither results nor types of results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softprompt_kernels.cli.commands.generate import generation_config
from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.models import capture, embed_prefix, generate, prepare, prompted_logits, sample

IDS = torch.tensor([[65, 66, 67, 68]])

GENERATION = {
    "min_p": 0.5,
    "num_beams": 4,
    "return_dict_in_generate": True,
    "output_scores": True,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(100)),
    "forced_eos_token_id": 3,
    "min_new_tokens": 5,
    "num_return_sequences": 2,
    "stop_strings": ["e"],
    "temperature": 9.0,
    "typical_p": 0.2,
    "cache_implementation": "static",
    "use_cache": False,
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "output_attentions": True,
    "prefill_chunk_size": 2,
}
CONFIG = {
    "return_dict": [False, None],
    "output_hidden_states": [True],
    "output_attentions": [True],
    "use_cache": [False],
    "attention_dropout": [0.5],
    "num_beams": [4],
    "_attn_implementation": ["eager"],
    "torch_dtype": ["float16"],
}


@pytest.fixture
def changed(tiny_model_folder: Path, tmp_path: Path) -> Callable[[str, dict[str, object]], str]:
    """`changed(file, settings)`: a copy of the tiny model's folder with these settings in a JSON file."""

    def make(file: str, settings: dict[str, object]) -> str:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_folder, folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | settings))
        return str(folder)

    return make


def _results(folder: str) -> list[Tensor]:
    """Logits and answers of the model in a folder, as the commands make them."""
    model, tokenizer = load_model(folder, "auto", "cpu")
    prefix = capture(model, IDS)
    torch.manual_seed(0)
    with torch.no_grad():
        results = [
            prompted_logits(model, IDS, prefix),
            embed_prefix(model, torch.ones(2, 32)).layers[1][0],
            model(IDS).logits,
            next(iter(sample(model, IDS.tolist(), prefix, new_tokens=6, end_tokens=[257]))).hidden,
        ]
        for temperature in (0.0, 1.0):
            config = generation_config(model, ChatFormat(tokenizer), 6, temperature)
            results.append(generate(model, IDS, prefix, generation_config=config))
    return results


@pytest.fixture(scope="module")
def expected(tiny_model_folder: Path) -> list[Tensor]:
    return _results(str(tiny_model_folder))


@pytest.mark.parametrize("name", GENERATION)
def test_a_generation_setting_of_the_folder_changes_nothing(name: str, changed, expected: list[Tensor]) -> None:
    for found, wanted in zip(
        _results(changed("generation_config.json", {"do_sample": True, name: GENERATION[name]})), expected, strict=True
    ):
        assert torch.equal(found, wanted)


def test_the_tokens_with_a_role_are_taken(changed) -> None:
    model, _ = load_model(
        changed("generation_config.json", {"eos_token_id": [257, 65], "pad_token_id": 9}), "auto", "cpu"
    )
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([257, 65], 9)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CONFIG for value in CONFIG[name]])
def test_a_setting_of_the_configuration_changes_nothing(
    name: str, value: object, changed, expected: list[Tensor]
) -> None:
    for found, wanted in zip(_results(changed("config.json", {name: value})), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_model_that_returns_tuples_can_be_prepared(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, return_dict=False).eval()
    prepare(model)
    assert generate(model, IDS, capture(model, IDS), max_new_tokens=2, do_sample=False).shape == (1, 6)
