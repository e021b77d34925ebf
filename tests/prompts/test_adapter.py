"""Save and load. Whatever is wrong with a folder gives a message of one sentence, and keeps the last good folder."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, check_destination, describe, load, save
from softprompt_kernels.prompts import atomic_folder as folder

MakeModel = Callable[..., PreTrainedModel]
MakeKV = Callable[..., KVPrompt]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def saved(make_model: MakeModel, random_kv: MakeKV, make_tokenizer: MakeTokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "prompt"
    save(path, random_kv(make_model()), model=make_model(), tokenizer=make_tokenizer("a", "b"))
    return path


def edit(file: Path, **changes: object) -> None:
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value != "remove"}))


def refusal(path: Path, model: PreTrainedModel, *tokenizer: PreTrainedTokenizerFast) -> str:
    """The message of the SoftPromptError that `load` raises. Any other exception fails the test."""
    with pytest.raises(SoftPromptError) as caught:
        load(path, model, *tokenizer)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# Saved prompts load unchanged


@pytest.mark.parametrize("kv_type", ["CARTRIDGE", "PREFIX_TUNING"])
@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_a_saved_kv_prompt_loads_bit_for_bit(
    kv_type: str, frozen: int, make_model: MakeModel, random_kv: MakeKV, tmp_path: Path
) -> None:
    prompt = random_kv(make_model(), frozen_tokens=frozen)
    save(tmp_path / "prompt", prompt, model=make_model(), kv_type=kv_type)
    again, _ = load(tmp_path / "prompt", make_model())
    assert isinstance(again, KVPrompt) and again.frozen_tokens == frozen
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_saved_embedding_prompt_loads_bit_for_bit(make_model: MakeModel, tmp_path: Path) -> None:
    prompt = EmbeddingPrompt(torch.randn(4, 24), frozen_tokens=1)
    save(tmp_path / "prompt", prompt, model=make_model())
    again, _ = load(tmp_path / "prompt", make_model())
    assert isinstance(again, EmbeddingPrompt) and again.frozen_tokens == 1
    assert torch.equal(again.vectors(), prompt.vectors())


def test_a_prompt_loads_into_its_model_in_another_type(saved: Path, make_model: MakeModel) -> None:
    prompt, _ = load(saved, make_model().bfloat16())
    assert isinstance(prompt, KVPrompt) and prompt.key.dtype == torch.float32


def test_the_saved_record_is_loaded(make_model: MakeModel, random_kv: MakeKV, tmp_path: Path) -> None:
    save(
        tmp_path / "prompt",
        random_kv(make_model(), 5),
        model=make_model(),
        context={"sha256": "ab" * 32, "tokens": 616},
        objective={"objective": "kl", "nll_weight": 0.0},
        figures={"recovered": torch.tensor(0.5), "curve": [1, 2.5], "kl_none": math.nan, "folder": Path("x")},
    )
    _, record = load(tmp_path / "prompt", make_model())
    assert record is not None
    assert (record["format"], record["prompt_tokens"], record["frozen_tokens"]) == (1, 5, 1)
    assert record["positions"] == "prompt at 0..k-1, the sequence continues at k"
    assert record["context"] == {"sha256": "ab" * 32, "tokens": 616}
    assert record["objective"] == {"objective": "kl", "nll_weight": 0.0}
    assert record["figures"] == {"recovered": 0.5, "curve": [1, 2.5], "kl_none": None, "folder": "x"}
    assert record["tokenizer"] is None and record["model"]["family"] == "llama"
    config, same = describe(tmp_path / "prompt")
    assert config["peft_type"] == "CARTRIDGE" and same == record


def test_a_record_that_json_cannot_hold_is_refused_before_anything_is_written(
    make_model: MakeModel, random_kv: MakeKV, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=r"figures\.a\[1\]: got object"):
        save(tmp_path / "prompt", random_kv(make_model()), model=make_model(), figures={"a": [1, object()]})
    assert list(tmp_path.iterdir()) == []


# Prompts that do not fit


def test_a_prompt_of_another_shape_is_not_saved(make_model: MakeModel, random_kv: MakeKV, tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="3 layers of 2 heads of 8 numbers, this model 3 of 4 of 6"):
        save(tmp_path / "prompt", random_kv(make_model()), model=make_model("gpt2"))
    with pytest.raises(SoftPromptError, match="vectors have 7 numbers, this model's embeddings 24"):
        save(tmp_path / "prompt", EmbeddingPrompt(torch.zeros(2, 7)), model=make_model())
    with pytest.raises(ValueError, match="kv_type: got 'LORA'"):
        save(tmp_path / "prompt", random_kv(make_model()), model=make_model(), kv_type="LORA")  # type: ignore[arg-type]


def test_a_prompt_that_diverged_does_not_replace_a_good_one(
    saved: Path, make_model: MakeModel, random_kv: MakeKV
) -> None:
    before = (saved / "adapter_model.safetensors").read_bytes()
    prompt = random_kv(make_model())
    with torch.no_grad():
        prompt.value[0, 0, 0, 0] = math.nan
    with pytest.raises(SoftPromptError, match="not finite"):
        save(saved, prompt, model=make_model())
    assert (saved / "adapter_model.safetensors").read_bytes() == before


def test_another_model_is_refused_with_what_differs(saved: Path, make_model: MakeModel) -> None:
    message = refusal(saved, make_model("gpt2"))
    assert "another model" in message and "family llama against gpt2" in message
    assert "the same shape with other values" in refusal(saved, make_model(seed=1))
    assert "layers 3 against 2" in refusal(saved, make_model(num_hidden_layers=2))


def test_another_tokenizer_is_refused_and_no_tokenizer_is_not_compared(
    saved: Path, make_model: MakeModel, make_tokenizer: MakeTokenizer
) -> None:
    load(saved, make_model(), make_tokenizer("a", "b"))
    load(saved, make_model())
    message = refusal(saved, make_model(), make_tokenizer("a", "b", "c"))
    assert "another tokenizer" in message and "against this one: tokens without added;" in message


# Broken folders


def test_a_missing_folder_and_one_without_a_prompt_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    assert "has no adapter_config.json" in refusal(tmp_path / "nowhere", make_model())
    assert "has no adapter_config.json" in refusal(tmp_path, make_model())


@pytest.mark.parametrize("length", [0, 4, 100, 0.5, -1])
def test_truncated_weights_are_refused(length: float, saved: Path, make_model: MakeModel) -> None:
    file = saved / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * length) if isinstance(length, float) else length])
    assert "truncated or not a safetensors file" in refusal(saved, make_model())


def test_missing_weights_are_refused(saved: Path, make_model: MakeModel) -> None:
    (saved / "adapter_model.safetensors").unlink()
    assert "safetensors only" in refusal(saved, make_model())


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"lora_A": torch.zeros(5, 96)}, "no tensor prompt_embeddings; it has lora_A"),
        ({"prompt_embeddings": torch.zeros(5)}, "shape (5,)"),
        ({"prompt_embeddings": torch.zeros(5, 96, dtype=torch.int32)}, "is int32"),
        ({"prompt_embeddings": torch.zeros(4, 96)}, "says 5 tokens"),
        ({"prompt_embeddings": torch.zeros(5, 95)}, "rows of 95 numbers"),
        ({"prompt_embeddings": torch.full((5, 96), math.inf)}, "not finite"),
    ],
)
def test_weights_that_are_no_prompt_are_refused(
    tensors: dict[str, torch.Tensor], what: str, saved: Path, make_model: MakeModel
) -> None:
    save_file(tensors, saved / "adapter_model.safetensors")
    assert what in refusal(saved, make_model())


@pytest.mark.parametrize("name", ["adapter_config.json", "softprompt.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe", b'{"peft_type": NaN}', b"[" * 100_000]
)
def test_broken_json_is_refused(name: str, content: bytes, saved: Path, make_model: MakeModel) -> None:
    (saved / name).write_bytes(content)
    refusal(saved, make_model())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"peft_type": "remove"}, "peft_type is None"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5'"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": "remove"}, "num_layers is None"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_attention_heads": 4}, "3 layers of 4 heads of 4 numbers"),
        ({"token_dim": 10**30}, "rows of 96 numbers"),
        ({"token_dim": None}, "token_dim is None"),
    ],
)
def test_an_inconsistent_configuration_is_refused(
    changes: dict[str, object], what: str, saved: Path, make_model: MakeModel
) -> None:
    edit(saved / "adapter_config.json", **changes)
    assert what in refusal(saved, make_model())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": 2}, "a later version"),
        ({"positions": "the sequence restarts at 0"}, "'the sequence restarts at 0'"),
        ({"frozen_tokens": 6}, "6 frozen tokens of 5"),
        ({"frozen_tokens": 1.5}, "frozen_tokens is 1.5"),
        ({"model": "remove"}, "no fingerprint of the model"),
        ({"model": {}}, "family None against llama"),
    ],
)
def test_an_inconsistent_record_is_refused(
    changes: dict[str, object], what: str, saved: Path, make_model: MakeModel
) -> None:
    edit(saved / "softprompt.json", **changes)
    assert what in refusal(saved, make_model())


def test_without_a_record_the_shapes_are_still_checked(saved: Path, make_model: MakeModel) -> None:
    (saved / "softprompt.json").unlink()
    with pytest.warns(UserWarning, match="make sure that it belongs"):
        assert "this model 2 of 2 of 8" in refusal(saved, make_model(num_hidden_layers=2))


# A failed save


def test_a_full_disk_keeps_the_last_good_prompt(
    saved: Path, make_model: MakeModel, random_kv: MakeKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail_after_ten_bytes(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_file", fail_after_ten_bytes)
    with pytest.raises(SoftPromptError, match=r"No space left on device; what was there is unchanged"):
        save(saved, random_kv(make_model(), seed=9), model=make_model())
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["prompt"]


def test_a_saved_prompt_is_replaced_completely(saved: Path, make_model: MakeModel, random_kv: MakeKV) -> None:
    prompt = random_kv(make_model(), k=3, seed=9)
    save(saved, prompt, model=make_model())
    again, _ = load(saved, make_model())
    assert isinstance(again, KVPrompt) and torch.equal(again.key, prompt.key)
    assert [entry.name for entry in saved.parent.iterdir()] == ["prompt"]


def test_a_folder_with_other_files_is_not_changed(make_model: MakeModel, random_kv: MakeKV, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    with pytest.raises(SoftPromptError, match=r"something else \(adapter_config\.json\)"):
        save(lora, random_kv(make_model()), model=make_model())
    with pytest.raises(SoftPromptError, match="something else"):
        check_destination(lora)
    assert [entry.name for entry in lora.iterdir()] == ["adapter_config.json"]
    check_destination(tmp_path / "new" / "folder")
