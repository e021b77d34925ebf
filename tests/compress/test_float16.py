"""A model that needs larger numbers than float16 has is refused by a run with one sentence that names the dtype."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softprompt_kernels.compress import CompressConfig, compress, plan
from softprompt_kernels.compress.evaluate.distance import check_context_matters
from softprompt_kernels.errors import SoftPromptError

FACTORS = {
    "hidden states": {"mlp.up_proj": 1e3, "mlp.down_proj": 1e4},
    "logits": {"lm_head": 3e4, "model.norm": 100},
}


@pytest.fixture(params=FACTORS)
def overflowing(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path: Path) -> str:
    """The folder of a model that computes numbers beyond the range of float16."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in FACTORS[request.param].items():
        for key in tensors:
            if name in key:
                tensors[key] *= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("outputs", ["sampled", "given"])
@pytest.mark.parametrize("call", [compress, plan])
def test_a_run_in_float16_names_it(
    call: Callable[..., object], outputs: str, overflowing: str, make_config: Callable[..., CompressConfig]
) -> None:
    config = make_config(model=overflowing, dtype="float16", steps=2)
    if outputs == "given":
        lines = [json.loads(line) | {"output": "mill"} for line in config.queries.read_text().splitlines()]
        config.queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SoftPromptError, match=r"float16|load the model in bfloat16 or float32"):
        call(config)


def test_a_kl_that_is_no_number_is_not_a_context_that_does_not_matter() -> None:
    with pytest.raises(SoftPromptError, match=r"dtype: the KL without context is not a number"):
        check_context_matters(float("nan"))
