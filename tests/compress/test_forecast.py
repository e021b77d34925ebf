"""The dry run: it measures a few queries in memory, and writes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress import CompressConfig, compress, plan, run
from softprompt_kernels.compress import forecast as module
from softprompt_kernels.compress.initial_prompt import initial_prompt
from softprompt_kernels.compress.inputs import load_inputs
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")


class FixedClock:
    """A second passes between two readings."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_checkpoints": 3, "save_best": True, "evaluate_every": 2},
        {"kind": "embedding"},
        {"objective": "jsd"},
        {"init": "random"},
        {"steps": 0},
    ],
    ids=str,
)
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
    if config.kind == "kv" and config.steps:  # σ without its frozen token, and two moments of it
        files = 3 * config.keep_checkpoints + config.save_best
        assert found.checkpoint_bytes == files * found.prompt_bytes * 7 // 8
    assert ("heldout_evaluations" in found.estimated_seconds) == (config.evaluate_every > 0)
    assert all(seconds >= 0 for seconds in found.estimated_seconds.values())
    assert ("matching" in found.estimated_seconds) == (config.init == "matched")


def test_a_plan_grows_with_the_steps_of_matching(make_config: Make) -> None:
    few, many = (plan(make_config(matching_steps=steps)).estimated_seconds["matching"] for steps in (0, 100_000))
    assert 0 < few < many / 10


def test_a_plan_counts_a_pass_over_given_outputs_alone(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", FixedClock())  # each measurement takes one second
    queries = tmp_path / "given.jsonl"

    def answer_seconds(given: int, **options: Any) -> float:
        lines = [{"input": f"Question {i}?"} | ({"output": "Mira Vale."} if i < given else {}) for i in range(6)]
        queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return plan(make_config(queries=queries, heldout_share=0.34, seed=1, **options)).estimated_seconds["answers"]

    matched = [answer_seconds(given, objective="nll") for given in (0, 6)]
    neither = [answer_seconds(given, init="strided", steps=0) for given in (0, 6)]
    assert matched[0] == neither[0] > 0
    assert matched[1] > neither[1] == 0
    assert answer_seconds(0) > matched[0], "the moments of the answers are computed"


def test_the_tokens_of_a_run_limit_the_rows_that_a_plan_counts(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def matching_seconds(*arguments: Any) -> float:
        counted.append(arguments[-1])
        return 1.0

    monkeypatch.setattr(module, "matching_seconds", matching_seconds)
    for rows in (20, 1_000_000):
        assert plan(make_config(matching_rows=rows)).estimated_seconds["matching"] == 1.0
    assert counted[0] == 20 < counted[1] < 1000


def test_a_plan_counts_the_test_queries(make_config: Make, test_file: Path) -> None:
    found = plan(make_config(test=test_file))
    assert (found.train_queries, found.heldout_queries, found.test_queries) == (3, 2, 3)


def test_a_plan_counts_the_passes_of_an_evaluation(
    make_config: Make, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0

    def measure(model: Any, context: Any, students: Any, examples: Any, *rest: Any, **options: Any) -> Any:
        nonlocal passes
        passes += len(students) * len(examples)
        return measured(model, context, students, examples, *rest, **options)

    measured = run.measure_tokens
    monkeypatch.setattr(run, "measure_tokens", measure)
    config = make_config(test=test_file)
    compress(config)
    monkeypatch.setattr(module, "time", FixedClock())  # teacher and student read each of 5 examples in one second
    assert plan(config).estimated_seconds["evaluation"] == pytest.approx(passes / (2 * 5))


def test_a_plan_has_the_context_length_of_the_run(make_config: Make) -> None:
    config = make_config(steps=1)
    assert plan(config).context_tokens == compress(config)["context_tokens"]


def test_a_plan_refuses_what_the_run_refuses(make_config: Make) -> None:
    with pytest.raises(SoftPromptError, match="tokens: got 10000 for a context of"):
        plan(make_config(tokens=10_000))


def test_a_step_is_timed_for_a_head_with_a_softcap_too(make_config: Make) -> None:
    config = make_config(init="first", batch_size=2)
    inputs = load_inputs(config)
    head = replace(inputs.objective.head, softcap=5.0)
    inputs = replace(inputs, objective=replace(inputs.objective, head=head))
    prompt = initial_prompt(inputs, capture_context(inputs.model, inputs.context_ids))
    before = [parameter.clone() for parameter in prompt.parameters()]
    assert module.seconds_of_step(inputs, prompt, [Example((1, 2), (3, 4))] * 2, None) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, prompt.parameters(), strict=True))
