"""Where a run keeps the keys and values of its context: the budget, the same results, and what the dry run shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from softprompt_kernels.cli.commands.compress import forecast_lines
from softprompt_kernels.compress import CompressConfig, compress, plan
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import load_inputs
from softprompt_kernels.compress.long_context import storage as module
from softprompt_kernels.compress.long_context.storage import free_memory, plan_context
from softprompt_kernels.compress.reporter import SilentReporter
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")

SHORT = {"steps": 2, "matching_steps": 2, "new_tokens": 3}


def without_times(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in ("seconds", "stages")}


def test_a_run_on_disk_has_the_results_of_memory(make_config: Make, tmp_path: Path, recording_reporter: Any) -> None:
    in_memory = compress(make_config(output=tmp_path / "memory", **SHORT))
    reporter = recording_reporter()
    config = make_config(output=tmp_path / "disk", context_memory=0, **SHORT)
    on_disk = compress(config, reporter)
    assert without_times(on_disk) == without_times(in_memory)
    prompts = [(tmp_path / name / "prompt" / "adapter_model.safetensors").read_bytes() for name in ("memory", "disk")]
    assert prompts[0] == prompts[1]
    assert RunFolder(config.output).context.exists()
    assert any("on the disk (context_memory allows 0 B)" in message for message in reporter.messages)
    # The budget is not a part of what the run is; the dtype is.
    assert without_times(compress(make_config(output=tmp_path / "disk", **SHORT))) == without_times(on_disk)
    with pytest.raises(SoftPromptError, match="differs in context_dtype;"):
        compress(make_config(output=tmp_path / "disk", context_dtype="bfloat16", **SHORT))


def test_a_run_in_16_bits_has_a_prompt_in_the_models_dtype(make_config: Make, tmp_path: Path) -> None:
    config = make_config(context_dtype="bfloat16", context_memory=0, **SHORT)
    compress(config)
    with safe_open(RunFolder(config.output).context, framework="pt") as context:
        assert context.get_tensor("key.0").dtype == torch.bfloat16
    with safe_open(config.output / "prompt" / "adapter_model.safetensors", framework="pt") as prompt:
        tensor = prompt.get_tensor("prompt_embeddings")
    assert tensor.dtype == torch.float32
    assert not torch.equal(tensor, tensor.bfloat16().float()), "what was matched is not rounded"


def test_a_dry_run_shows_where_the_context_goes_and_writes_nothing(make_config: Make, tmp_path: Path) -> None:
    files = set(tmp_path.rglob("*"))
    found = plan(make_config(context_memory=0, context_dtype="bfloat16", **SHORT))
    assert set(tmp_path.rglob("*")) == files
    assert found.context_memory_bytes == 0
    assert found.context_disk_bytes == found.context_kv_bytes == found.context_tokens * 2 * 2 * 2 * 8 * 2
    assert found.peak_bytes.keys() == {"context", "answers", "matching"}
    lines = dict(forecast_lines(found))
    assert "in bfloat16, on the disk" in lines["  stored"]
    assert found.prompt_bytes == 8 * 2 * 2 * 2 * 8 * 4, "the prompt has the dtype of the model"


def test_memory_is_chosen_while_half_of_what_is_free_is_enough(make_config: Make, monkeypatch: Any) -> None:
    inputs = load_inputs(make_config())
    folder = RunFolder(inputs.config.output)
    total = inputs.context_tokens * 2 * 2 * 2 * 8 * 4
    for free, on_disk in ((2 * total, False), (2 * total - 2, True), (None, False)):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        found = plan_context(inputs, folder, folder.context, SilentReporter())
        assert (found.memory_bytes, found.disk_bytes) == ((0, total) if on_disk else (total, 0))
        assert (found.storage.file is not None) == on_disk
        assert found.storage.dtype == torch.float32, "16 bits are never chosen by themselves"


def test_a_capture_that_was_begun_on_disk_goes_on_there(make_config: Make, tmp_path: Path) -> None:
    inputs = load_inputs(make_config())
    folder = RunFolder(inputs.config.output)
    folder.cache.mkdir(parents=True)
    folder.context.with_name("context.safetensors.partial").touch()
    assert plan_context(inputs, folder, folder.context, SilentReporter()).disk_bytes > 0


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    files = tuple(tmp_path / name for name in names)
    monkeypatch.setattr(module, "_CGROUPS", (tuple(map(str, files)),))
    unlimited = free_memory(torch.device("cpu"))
    for path, text in zip(files, ("3000000\n", "2000000\n", "anon 1500000\ninactive_file 400000\n"), strict=True):
        path.write_text(text)
    assert free_memory(torch.device("cpu")) == 1_400_000
    files[0].write_text("max\n")
    found = free_memory(torch.device("cpu"))
    assert (found is None) == (unlimited is None)
    assert found is None or found > 10_000_000


def test_the_options_are_checked(make_config: Make) -> None:
    for options in ({"context_memory": -1}, {"context_dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_config(**options)
