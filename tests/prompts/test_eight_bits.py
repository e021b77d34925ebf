"""Prompts in 16 and 8 bits: how far the numbers move, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load, save
from softprompt_kernels.prompts.eight_bits import pack, unpack
from softprompt_kernels.prompts.weights import rounded

MakeModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("name", ["key", "value", "embedding"])
def test_no_number_moves_by_more_than_half_a_step_of_its_group(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(tokens, 8) if name == "embedding" else torch.randn(2, 3, tokens, 8)
    numbers[..., 5] *= 100  # an outlier channel
    packed = pack(name, numbers)
    assert packed[f"{name}.codes"].dtype == torch.uint8 and packed[f"{name}.codes"].shape == numbers.shape
    groups = numbers.split(32, dim=-2) if name == "key" else [numbers]
    axis = -2 if name == "key" else -1
    steps = torch.cat([((g.amax(axis, True) - g.amin(axis, True)) / 255).expand_as(g) for g in groups], dim=-2)
    error = (unpack("file", name, packed) - numbers).abs()
    assert (error <= steps / 2 + 1e-5 * numbers.abs()).all()
    if name == "key" and tokens > 1:  # the other channels do not pay for the outlier
        assert error[..., :5].max() < 0.05


def test_equal_numbers_and_zeros_are_kept_exactly() -> None:
    for numbers in (torch.zeros(1, 1, 4, 8), torch.full((1, 1, 4, 8), -3.25)):
        for name in ("key", "value"):
            assert torch.equal(unpack("file", name, pack(name, numbers)), numbers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_saved_prompt_is_the_rounded_one(
    kind: str, dtype: Any, make_model: MakeModel, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    prompt = random_kv(make_model(), 40) if kind == "kv" else EmbeddingPrompt(torch.randn(5, 24), frozen_tokens=2)
    save(tmp_path / "p", prompt, model=make_model(), dtype=dtype)
    again, _ = load(tmp_path / "p", make_model())
    assert again.frozen_tokens == prompt.frozen_tokens
    for name, tensor in rounded(prompt, dtype).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    save(tmp_path / "p", prompt, model=make_model())  # a folder of one dtype is replaced by one of another
    assert {file.name for file in (tmp_path / "p").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "softprompt.json",
    }


def test_numbers_too_large_for_float16_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    prompt = EmbeddingPrompt(torch.full((2, 24), 7e4))
    with pytest.raises(SoftPromptError, match=r"got float16 for a prompt with numbers up to 7e\+04.*bfloat16"):
        save(tmp_path / "p", prompt, model=make_model(), dtype="float16")
    assert not (tmp_path / "p").exists()
    with pytest.raises(ValueError, match="dtype: got 'int4', accepted are float32"):
        save(tmp_path / "p", prompt, model=make_model(), dtype="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key.scale", None, "has no tensor key.scale"),
        ("key.codes", lambda t: t.float(), "key.codes is float32"),
        ("value.low", lambda t: t[..., :2, :], "value.low is float32 of shape"),
        ("key.low", lambda t: t * torch.nan, "not finite"),
    ],
)
def test_a_damaged_file_of_8_bits(
    name: str, change: Any, message: str, make_model: MakeModel, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    save(tmp_path / "p", random_kv(make_model(), 40), model=make_model(), dtype="int8")
    file = tmp_path / "p" / "prompt_int8.safetensors"
    tensors = load_file(file)
    changed = tensors.pop(name)
    if change is not None:
        tensors[name] = change(changed).contiguous()
    save_file(tensors, file)
    with pytest.raises(SoftPromptError, match=message):
        load(tmp_path / "p", make_model())
