"""Three short texts, and banks of them on the tiny model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softprompt_kernels.compress import CompressConfig
from softprompt_kernels.compress.bank.run import compress_bank
from softprompt_kernels.compress.run import compress_one

TEXTS = {
    "mill": "Mira Vale keeps the blue mill. It grinds 40 sacks a day. The river Osk turns it.",
    "boat": "The boat of Jon Reed is red and leaves at nine. A ticket costs 2 crowns. Dogs travel free on Sundays.",
    "shop": "Ann sells 12 kinds of bread. The oven is from 1920.",
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of the texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def bank(texts: Path, make_config: Callable[..., CompressConfig], loaded: Any, no_plot: None) -> Callable[..., Any]:
    """`bank("out", reporter, steps=3)`: the summary of a bank of `texts`, in a folder beside it."""

    def run(name: str = "bank", reporter: Any = None, **options: Any) -> Any:
        output = texts.parent / name
        config = make_config(**{"context": texts, "output": output, "converged": 0} | options)
        return compress_bank(config, reporter, loaded)

    return run


@pytest.fixture
def alone(texts: Path, make_config: Callable[..., CompressConfig], loaded: Any, no_plot: None) -> Callable[..., Any]:
    """`alone("mill", steps=3)`: the trained tensors of a run of one text."""

    def run(name: str, **options: Any) -> dict[str, Tensor]:
        output = texts.parent / "alone" / name
        shutil.rmtree(output, ignore_errors=True)
        compress_one(make_config(**{"context": texts / f"{name}.txt", "output": output} | options), None, loaded)
        return load_file(output / "prompt" / "adapter_model.safetensors")

    return run


@pytest.fixture
def prompts(texts: Path) -> Callable[[str], dict[str, Tensor]]:
    """`prompts("bank")`: the saved prompt of each context, by name."""

    def read(name: str) -> dict[str, Tensor]:
        files = sorted((texts.parent / name / "runs").glob("*/prompt/adapter_model.safetensors"))
        return {file.parents[1].name: torch.cat([*load_file(file).values()]) for file in files}

    return read
