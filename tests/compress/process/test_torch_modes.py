"""The torch modes of the caller change nothing in a run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softprompt_kernels.compress import CompressConfig, compress, evaluate_prompt, load_model, plan
from softprompt_kernels.compress.process.torch_modes import own_torch_modes

pytestmark = pytest.mark.usefixtures("no_plot")


@contextmanager
def default_device() -> Iterator[None]:
    """A default device that can store nothing, so that a tensor made there cannot be read."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


MODES = [torch.inference_mode, torch.no_grad, autocast, default_device]


@pytest.fixture(params=[{"kind": "kv", "init": "matched"}, {"kind": "embedding", "init": "random"}], ids=str)
def config(request: pytest.FixtureRequest, make_config: Callable[..., CompressConfig]) -> CompressConfig:
    return make_config(steps=2, **request.param)


def _result(config: CompressConfig) -> tuple[dict[str, object], Tensor]:
    figures = {name: value for name, value in compress(config).items() if name not in ("seconds", "stages")}
    return figures, load_file(config.output / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


def test_a_run_gives_the_same(config: CompressConfig, tmp_path: Path) -> None:
    figures, prompt = _result(config)
    for number, mode in enumerate(MODES):
        with mode():
            again = _result(config.model_copy(update={"output": tmp_path / f"run{number}"}))
        assert again[0] == figures, mode
        assert torch.equal(again[1], prompt), mode


@pytest.mark.parametrize("mode", MODES)
def test_a_forecast_and_an_evaluation_work(
    mode: Callable[[], object], make_config: Callable[..., CompressConfig]
) -> None:
    config = make_config(steps=1, matching_steps=2)
    wanted = plan(config).kl_none
    compress(config)
    arguments = (config.model, config.context, config.output / "prompt", config.queries)
    figures = evaluate_prompt(*arguments, new_tokens=4)
    with mode():
        assert plan(config).kl_none == pytest.approx(wanted)
        assert json.dumps(evaluate_prompt(*arguments, new_tokens=4)) == json.dumps(figures)


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_can_be_used_in_training(mode: Callable[[], object], tiny_model_folder: Path) -> None:
    with mode():
        model, _ = load_model(str(tiny_model_folder), "auto", "cpu")
    assert all(parameter.device.type == "cpu" and not parameter.is_inference() for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_callers_modes_come_back() -> None:
    with torch.inference_mode(), autocast(), default_device():
        with own_torch_modes():
            assert torch.empty(1).device.type == "cpu"
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.empty(1).device.type == "meta"
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
