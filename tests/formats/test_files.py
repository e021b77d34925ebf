"""The format is found from the content. Whatever is wrong with a file gives one sentence, and no code of it runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.importing import import_prompt
from softprompt_kernels.formats.inspection import fit, inspection
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load


class Harmless:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_formats_are_found_whatever_the_name(
    kv: KVPrompt, embedding: EmbeddingPrompt, saved: Callable[..., Path], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    vectors, keys = read(saved(embedding, "e")), read(saved(kv))
    for index, (what, to) in enumerate(
        [
            (keys, "safetensors"),
            (keys, "cartridges"),
            (keys, "folder"),
            (vectors, "safetensors"),
            (vectors, "vllm-embeds"),
        ]
    ):
        place = tmp_path / str(index)
        export(what, to, place, model=model if to == "cartridges" else None)  # type: ignore[arg-type]
        facts = inspection(place, read(place))
        assert (facts["format"], facts["tokens"], facts["dtype"]) == (to, 6, "float32")
        assert facts["kind"] == ("kv" if what is keys else "embedding") and facts["bytes"] > 4 * facts["numbers"]
        if to != "vllm-embeds":  # a tensor alone says nothing else
            assert facts["context"] == {"sha256": "ab" * 32, "tokens": 40} and facts["figures"]["recovered"] == 0.75
            assert facts["frozen_tokens"] == what.prompt.frozen_tokens and facts["base_model"] == keys.base_model
    (tmp_path / "2" / "softprompt.json").unlink()
    assert read(tmp_path / "2").format == "peft"


def test_inspection_says_why_a_prompt_does_not_fit(
    content: Content, model: LlamaForCausalLM, tokenizer: object
) -> None:
    assert fit(content, model, tokenizer) == []  # type: ignore[arg-type]
    other = LlamaForCausalLM(model.config)
    assert fit(content, other) == ["weights (the same shape with other values)"]
    other = LlamaForCausalLM(type(model.config)(**(model.config.to_dict() | {"num_hidden_layers": 1})))
    assert any("2 layers of 2 heads of 8 numbers, this model 1" in reason for reason in fit(content, other))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for index, value in enumerate(({"trainable_keys": Harmless(trace)}, Harmless(trace))):
        torch.save(value, tmp_path / f"{index}.pt")
        with pytest.raises(SoftPromptError, match=r"asks for posix.mkdir.*could run code, so the file is refused"):
            read(tmp_path / f"{index}.pt")
    assert not trace.exists()
    torch.load(tmp_path / "1.pt", weights_only=False)  # it would have run
    assert trace.exists()


def test_a_file_of_peft_with_code_is_refused(content: Content, tmp_path: Path) -> None:
    export(content, "peft", tmp_path / "p")
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    torch.save({"prompt_embeddings": Harmless(tmp_path / "trace")}, tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(SoftPromptError, match="could run code"):
        read(tmp_path / "p")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("to", ["safetensors", "cartridges"])
def test_truncated_files(to: str, content: Content, model: LlamaForCausalLM, tmp_path: Path) -> None:
    place = tmp_path / f"prompt.{to}"
    export(content, to, place, model=model if to == "cartridges" else None)  # type: ignore[arg-type]
    whole = place.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        place.write_bytes(whole[:length])
        with pytest.raises(SoftPromptError) as caught:
            read(place)
        assert str(place) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_and_folders(tmp_path: Path, saved: Callable[..., Path], kv: KVPrompt) -> None:
    (tmp_path / "text").write_text("{}")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    (tmp_path / "run").mkdir()
    shutil.copytree(saved(kv), tmp_path / "run" / "prompt")
    for name, message in {
        "text": "is no prompt; accepted formats are folder, peft, safetensors, cartridges, vllm-embeds",
        "model.safetensors": "has no tensor layers.0.key",
        "model.pt": "torch.save with a dict with weight, so it is no prompt",
        "run": r"so it is no prompt \(it holds one: prompt\)",
        "gone": "does not exist",
    }.items():
        with pytest.raises(SoftPromptError, match=message):
            read(tmp_path / name)
    with pytest.raises(SoftPromptError, match=r"accepted is a cache of Cartridges.*--from folder"):
        read(saved(kv), "cartridges")


def test_a_plain_file_has_documented_names_and_metadata(content: Content, kv: KVPrompt, tmp_path: Path) -> None:
    export(content, "safetensors", tmp_path / "p.safetensors", dtype="bfloat16", base_model="org/base")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        names = [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
        assert sorted(file.keys()) == names
        assert torch.equal(file.get_tensor("layers.1.key"), kv.stacked(torch.bfloat16)[0][1])
        said = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
    assert (said["kind"], said["tokens"], said["frozen_tokens"]) == ("kv", 6, 1)
    assert said["positions"] == "prompt at 0..k-1, the sequence continues at k" and said["base_model"] == "org/base"
    assert said["rope"]["rope_type"] == "default" and said["record"]["context"]["tokens"] == 40


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.key": torch.zeros(2, 3, 8)}, "has no tensor layers.0.value"),
        ({"layers.1.key": torch.zeros(2, 3, 8), "layers.1.value": torch.zeros(2, 3, 8)}, "has no tensor layers.0.key"),
        ({"layers.0.key": torch.zeros(2, 3, 8), "layers.0.value": torch.zeros(2, 4, 8)}, "value of layer 0 has shape"),
        ({f"layers.{layer}.key": torch.zeros(2, 3, 8) for layer in (0, 10**9)}, "has no tensor layers.0.value"),
        ({f"layers.00.{part}": torch.zeros(2, 3, 8) for part in ("key", "value")}, "is no prompt|no tensor"),
        ({"embeddings": torch.full((3, 32), 1e300, dtype=torch.float64)}, "not finite in float32"),
        ({"embeddings": torch.zeros(3, 4, 5)}, r"embeddings is float32 of shape \(3, 4, 5\)"),
        ({"embeddings": torch.full((3, 32), torch.inf)}, "not finite"),
        ({"embeddings": torch.zeros(0, 32)}, "floating-point numbers of shape"),
    ],
)
def test_plain_files_of_wrong_shapes(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SoftPromptError, match=message):
        read(tmp_path / "x.safetensors")


def test_an_existing_output_is_replaced_only_by_its_own_format(
    content: Content, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for to, place in (("safetensors", note), ("cartridges", note), ("folder", note), ("peft", tmp_path / "folder")):
        with pytest.raises(SoftPromptError, match=r"exists and is not|is a file|holds something else"):
            export(content, to, place, model=model)  # type: ignore[arg-type]
    assert note.read_text() == "mine" and [f.name for f in (tmp_path / "folder").iterdir()] == ["mine.txt"]
    for to, name in (("safetensors", "s"), ("folder", "f")):
        export(content, to, tmp_path / name)  # type: ignore[arg-type]
        export(content, to, tmp_path / name, dtype="bfloat16")  # type: ignore[arg-type]
        assert read(tmp_path / name).dtype == "bfloat16"


def test_an_import_of_another_model_is_refused(
    content: Content, model: LlamaForCausalLM, tokenizer: object, tmp_path: Path
) -> None:
    export(content, "safetensors", tmp_path / "p")
    other = LlamaForCausalLM(model.config)
    with pytest.raises(SoftPromptError, match=r"does not fit this model: weights.*--force"):
        import_prompt(read(tmp_path / "p"), other, tokenizer, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="does not fit this model"):
        import_prompt(read(tmp_path / "p"), other, tokenizer, tmp_path / "out", force=True)  # type: ignore[arg-type]
    load(tmp_path / "out", other)
    narrow = LlamaForCausalLM(type(model.config)(**(model.config.to_dict() | {"head_dim": 16})))
    with pytest.raises(SoftPromptError, match="does not fit this model: shape"):
        import_prompt(read(tmp_path / "p"), narrow, tokenizer, tmp_path / "x", force=True)  # type: ignore[arg-type]
