"""Tiny students and teachers, problems for the training loops, and the losses that a trainer has logged."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from tests.examples.loop_problems import Problem, make_problem, read_problem

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False}
TEXTS = ["the cat sat", "a dog ran to the red house", "on the mat", "where is it?", "the end of the day", "no"] * 3


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples` can be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@pytest.fixture(scope="session")
def folders(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher with one vocabulary."""
    teacher = tmp_path_factory.mktemp("teacher") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(teacher)
    return tiny_model_folder, teacher


@pytest.fixture
def problem(tiny_model_folder: Path) -> Problem:
    return read_problem(tiny_model_folder)


@pytest.fixture
def larger_problem() -> Problem:
    """One whose steps take longer than what surrounds them."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_problem(LlamaForCausalLM(config), 128, [48] * 4)


def logged(trainer: Trainer, name: str = "loss") -> torch.Tensor:
    """The values of one name in the order of the steps."""
    return torch.tensor([record[name] for record in trainer.state.log_history if name in record], dtype=torch.float64)


def time_ratio(first: Callable[[], object], second: Callable[[], object], rounds: int = 5) -> float:
    """Time of `first` over that of `second` on one thread: the shortest of alternating rounds, to be robust to load."""
    taken: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for function, times in zip((first, second), taken, strict=True):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(taken[0]) / min(taken[1])
