"""A model whose layers lie in different places (accelerate) gives the same run as one in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.sources import model as loading
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.start import compress
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import load


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    """The CPU's memory is too small for half of the model, which stays on the disk."""
    pytest.importorskip("accelerate")
    import transformers.integrations.accelerate as placing

    whole, _ = load_model(str(tiny_model_folder))
    half = sum(parameter.nbytes for parameter in whole.parameters()) * 7 // 10
    monkeypatch.setattr(placing, "get_max_memory", lambda max_memory=None: {"cpu": half})


def test_a_run_with_layers_on_the_disk_is_the_same(short_memory: None, tiny_model_folder: Path, tmp_path: Path) -> None:
    context, queries = tmp_path / "context.txt", tmp_path / "queries.jsonl"
    context.write_text("The red house by the river is number seven. Ada Brook keeps nine geese and a cat named Tom.")
    queries.write_text("".join(json.dumps({"input": f"What is {word}?"}) + "\n" for word in ("red", "Ada", "Tom")))

    def run(device: str, **options: Any) -> torch.Tensor:
        output = tmp_path / device
        config = CompressConfig(
            model=str(tiny_model_folder), context=context, output=output, tokens=8, queries=queries, selfstudy=0,
            new_tokens=2, matching_steps=1, steps=1, batch_size=2, device=device, **options,
        )  # fmt: skip
        compress(config)
        return load(output / "prompt", load_model(str(tiny_model_folder))[0])[0].stacked()[0]

    expected = run("cpu")
    torch.testing.assert_close(run("split", gradient_checkpointing=True), expected, rtol=0, atol=1e-5)


def test_a_part_stays_on_the_disk(short_memory: None, tiny_model_folder: Path) -> None:
    model, _ = load_model(str(tiny_model_folder), device="split")
    places = {parameter.device.type for parameter in model.parameters()}
    assert places == {"cpu", "meta"} and model.device.type == "cpu"


def test_accelerate_is_named_where_it_is_missing(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(SoftPromptError, match="device: got split, for which accelerate must be installed"):
        load_model(str(tiny_model_folder), device="split")
