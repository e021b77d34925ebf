"""The suite `step`: all implementations of a training step do the same work, and their time and memory are measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress import load_model
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.errors import SoftPromptError

pytest.importorskip("peft")
pytest.importorskip("psutil")

REPOSITORY = Path(__file__).parents[2]
CONTEXT = "the cat sat on the mat and the dog ran to the red house " * 2
QUERIES = ["where is the dog?", "what is red?", "who sat?"]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)


def make_problem(model_folder: Path, folder: Path, **sizes: Any) -> Any:
    from benchmarks.step import problem

    model, tokenizer = load_model(str(model_folder), "float32", "cpu")
    queries = [Query(text) for text in QUERIES]
    given = {"tokens": 9, "micro_batch_size": 2, "new_tokens": 6} | sizes
    queries = queries[: given.pop("batch", len(queries))]
    return problem.make_problem(str(model_folder), model, tokenizer, CONTEXT, queries, folder, **given)


def test_all_implementations_have_the_same_loss_and_gradient(tiny_model_folder: Path, tmp_path: Path) -> None:
    from benchmarks.step.first_step import first_step

    problem, preparation = make_problem(tiny_model_folder, tmp_path)
    started = first_step(problem)
    losses = started.losses
    assert list(losses) == ["cached moments", "cached moments, composed", "transformers + PEFT"]
    assert losses["cached moments"] > 0.01
    assert max(losses.values()) - min(losses.values()) <= 1e-4
    assert started.gradient_difference < 1e-4
    assert preparation.context > 0 and preparation.moments_per_sequence > 0
    assert "3 sequences (ours: 2 at once)" in problem.describe()


def test_cost_of_a_step_names_its_parts(tiny_model_folder: Path, tmp_path: Path) -> None:
    from benchmarks.step.first_step import first_step
    from benchmarks.step.floor import measure_cost

    problem, _ = make_problem(tiny_model_folder, tmp_path)
    cost = measure_cost(first_step(problem).implementations["cached moments"], quick=True)
    assert any(name.startswith("attention op: ") for name in cost.parts)
    assert {"model: GEMMs", "loss op: GEMMs", "other operations"} <= set(cost.parts)
    assert 0 < sum(cost.others.values()) <= cost.parts["other operations"]
    assert cost.attention_floor > 0 and cost.loss_floor > 0


@pytest.mark.parametrize("name", ["cached moments", "transformers + PEFT"])
def test_peak_memory_of_a_step_is_measured(tiny_model_folder: Path, tmp_path: Path, name: str) -> None:
    from benchmarks.step.memory import peak_of

    problem, _ = make_problem(tiny_model_folder, tmp_path)
    assert peak_of(name, problem) > 0


def test_different_losses_are_refused() -> None:
    from benchmarks.step.first_step import check_same_loss

    with pytest.raises(SoftPromptError, match="loss"):
        check_same_loss({"cached moments": 1.0, "transformers + PEFT": 1.001})
    with pytest.raises(SoftPromptError, match="loss"):
        check_same_loss({"cached moments": float("nan"), "transformers + PEFT": 1.0})


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 1}, {"tokens": 10_000}], ids=str)
def test_sizes_that_cannot_be_measured_are_refused(
    tiny_model_folder: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    with pytest.raises(SoftPromptError, match="queries: got 0" if "batch" in sizes else "tokens: got"):
        make_problem(tiny_model_folder, tmp_path, **sizes)


@pytest.mark.parametrize("by_kernel", [True, False])
def test_peak_is_seen_after_its_memory_was_freed(monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    from softprompt_kernels.bench import memory

    if not by_kernel:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size = 64 * 2**20
    with memory.PeakResident() as peak:
        for _ in range(5):
            torch.ones(size, dtype=torch.uint8)
    assert size * 0.9 < peak.growth < size * 2
