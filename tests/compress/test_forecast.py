"""The dry run: it measures a few queries in memory, and writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress, plan
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"kind": "embedding"}, {"objective": "jsd"}, {"init": "random"}], ids=str)
def test_a_plan_measures_and_writes_nothing(make_config: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    config = make_config(**options)
    before = files_in(tmp_path)
    found = plan(config)
    assert files_in(tmp_path) == before
    assert not config.output.exists()
    assert found.prompt_tokens == 8
    assert found.ratio == found.context_tokens / 8
    # Keys and values of 2 layers, 2 heads of 8 numbers, fp32.
    assert found.prompt_bytes == 8 * 2 * 2 * 2 * 8 * 4
    assert found.context_kv_bytes == found.prompt_bytes * found.context_tokens // 8
    assert (found.train_queries, found.heldout_queries, found.test_queries) == (4, 2, 0)
    assert found.kl_none > 0.01
    assert found.seconds_per_step > 0
    assert found.estimated_seconds["training"] == pytest.approx(found.seconds_per_step * config.steps)
    assert all(seconds >= 0 for seconds in found.estimated_seconds.values())


def test_a_plan_counts_the_test_queries(make_config: Make, test_file: Path) -> None:
    found = plan(make_config(test=test_file))
    assert (found.train_queries, found.heldout_queries, found.test_queries) == (3, 2, 3)


def test_a_plan_has_the_context_length_of_the_run(make_config: Make) -> None:
    config = make_config(steps=1)
    assert plan(config).context_tokens == compress(config)["context_tokens"]


def test_a_plan_refuses_what_the_run_refuses(make_config: Make) -> None:
    with pytest.raises(SoftPromptError, match="tokens: got 10000 for a context of"):
        plan(make_config(tokens=10_000))
