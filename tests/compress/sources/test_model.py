"""Models from folders: frozen, prepared and in the requested dtype, or refused with one message."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from softprompt_kernels.compress import load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prompted_hidden


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_a_model_is_frozen_prepared_and_in_its_dtype(tiny_model_folder: Path, name: str, dtype: torch.dtype) -> None:
    model, tokenizer = load_model(str(tiny_model_folder), name, "cpu")
    assert not model.training
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    assert prompted_hidden(model, ids, None).shape == (1, 3, 32)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_folder_is_refused_with_one_message(
    tiny_model_folder: Path, tmp_path: Path, file: str, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(SoftPromptError, match=r"^(model|tokenizer): ") as error:
        load_model(str(folder), "auto", "cpu")
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_warning(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"extra{index}": 300 + index for index in range(20)}
    path.write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match=r"tokenizer: 20 of its tokens \('extra0', .* which has 300;"):
        load_model(str(folder), "auto", "cpu")


def test_an_unsupported_family_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    with pytest.raises(SoftPromptError, match="model: got the family 'bloom'"):
        load_model(str(folder), "auto", "cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "mps", "xpu", "xla", "hpu"])
def test_a_device_that_does_not_exist_is_refused(tiny_model_folder: Path, device: str) -> None:
    with pytest.raises(SoftPromptError, match=f"device: got '{device}'"):
        load_model(str(tiny_model_folder), "auto", device)
