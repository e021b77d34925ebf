"""The accelerate loop gives what the same loop gives in plain transformers, in one process and in two, and resumes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load
from tests.examples.conftest import time_ratio
from tests.examples.loop_problems import PlainLoss, start

pytest.importorskip("accelerate")
WORDS = "the cat sat on the mat and the dog ran to the red house " * 3


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its precision and its processes for the whole of a process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(problem, prompt=None, accumulate=2, batch_size=2, precision="no", **options) -> tuple[list[float], Tensor]:
    """Losses, and what was trained, in an order of examples that does not depend on the options."""
    from examples import accelerate_loop, plain_loop

    model, text, sequences, _ = problem
    prompt = plain_loop.first_tokens(model, text, 8) if prompt is None else prompt
    moments = plain_loop.teach(model, text, sequences)
    accelerator = accelerate_loop.make_accelerator(accumulate, precision, cpu=True)
    examples = plain_loop.numbered(sequences)
    losses = accelerate_loop.train(accelerator, model, prompt, examples, moments, batch_size=batch_size, **options)
    return losses, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 5e-3)])
def test_losses_are_those_of_plain_transformers(precision, tolerance, problem, monkeypatch) -> None:
    from examples import accelerate_loop

    losses, _ = run(problem, precision=precision, epochs=3)
    monkeypatch.setattr(accelerate_loop, "loss_sum", PlainLoss(problem))
    expected, _ = run(problem, precision=precision, epochs=3)
    assert len(losses) == 6 and losses[0] > 0.1
    assert losses == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_model_of_16_bits_under_mixed_precision(kind, problem) -> None:
    from examples import plain_loop

    problem = problem._replace(model=problem.model.bfloat16())
    model, text, sequences, _ = problem
    prompt = plain_loop.first_tokens(model, text, 8)
    if kind == "embedding":
        prompt = EmbeddingPrompt(model.get_input_embeddings()(text[0, :8]))
    examples, moments = plain_loop.numbered(sequences), plain_loop.teach(model, text, sequences)
    expected = plain_loop.train(model, copy.deepcopy(prompt), examples, moments, epochs=3, batch_size=8)
    losses, _ = run(problem, prompt, accumulate=1, batch_size=8, precision="bf16", epochs=3)
    assert losses == pytest.approx(expected, rel=5e-3)


def test_losses_are_those_of_the_plain_loop(problem) -> None:
    """One batch of all examples a step: the order plays no part, the number of tokens does."""
    from examples import plain_loop

    model, text, sequences, _ = problem
    prompt, moments = plain_loop.first_tokens(model, text, 8), plain_loop.teach(model, text, sequences)
    expected = plain_loop.train(model, prompt, plain_loop.numbered(sequences), moments, epochs=3, batch_size=8)
    losses, trained = run(problem, accumulate=4, batch_size=2, epochs=3)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert close(trained, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()]))


def test_each_epoch_takes_all_examples_in_another_order(problem, monkeypatch) -> None:
    from examples import accelerate_loop, plain_loop

    seen = []
    monkeypatch.setattr(
        accelerate_loop,
        "collate",
        lambda examples: seen.extend(len(ids) for ids, _ in examples) or plain_loop.collate(examples),
    )
    run(problem, epochs=2)
    first, second = seen[:8], seen[8:]
    assert sorted(first) == sorted(second) == sorted(len(ids) for ids in problem.sequences)
    assert first != second


def test_gradient_checkpointing_changes_no_bit(problem) -> None:
    losses, trained = run(problem)
    problem.model.activation_checkpointing_enable()
    problem.model.train()
    again, other = run(problem)
    assert again == losses and torch.equal(trained, other)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_resumed_training_gives_the_same_bits(frozen, problem, tmp_path: Path) -> None:
    key = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = KVPrompt(key, key.flip(0), frozen_tokens=frozen)
    losses, trained = run(problem, copy.deepcopy(prompt), epochs=3)
    stopped, _ = run(problem, copy.deepcopy(prompt), epochs=2, checkpoint=tmp_path / "state", save_every=3)
    assert stopped == losses[:4]  # the checkpoint is of the third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    assert (tmp_path / "state" / "model.safetensors").exists()
    again, other = run(problem, copy.deepcopy(prompt), epochs=3, checkpoint=tmp_path / "state")
    assert again == losses and torch.equal(other, trained)


def test_a_checkpoint_of_another_prompt_is_refused(problem, tmp_path: Path) -> None:
    run(problem, checkpoint=tmp_path / "state", save_every=1)
    key = torch.zeros(2, 2, 5, 8)
    with pytest.raises(RuntimeError, match="size mismatch for key"):
        run(problem, KVPrompt(key, key), checkpoint=tmp_path / "state")


def test_a_prompt_of_another_model_is_refused(problem) -> None:
    key = torch.zeros(3, 2, 8, 8)
    with pytest.raises(SoftPromptError, match="prefix: got 3 layers, 2 key heads of size 8, the model has 2, 2 and 8"):
        run(problem, KVPrompt(key, key))


def test_a_step_is_no_slower_than_plain_transformers(larger_problem, monkeypatch) -> None:
    from examples import accelerate_loop, plain_loop

    model, text, sequences, _ = larger_problem
    prompt, moments = plain_loop.first_tokens(model, text, 16), plain_loop.teach(model, text, sequences)
    plain_loss = PlainLoss(larger_problem)

    def train() -> None:
        accelerator = accelerate_loop.make_accelerator(cpu=True)
        accelerate_loop.train(accelerator, model, prompt, plain_loop.numbered(sequences), moments)

    def train_plain() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(accelerate_loop, "loss_sum", plain_loss)
            train()

    assert time_ratio(train, train_plain) < 1  # about .55 is usual


def test_command_line(tiny_model_folder: Path, problem, tmp_path: Path, monkeypatch, capsys) -> None:
    from examples import accelerate_loop

    (tmp_path / "text.txt").write_text(WORDS)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["", str(tiny_model_folder), str(tmp_path / "text.txt"), str(tmp_path / "prompt")])
    accelerate_loop.main()
    assert "KL per token in the first step" in capsys.readouterr().out
    assert load(tmp_path / "prompt", problem.model)[0].length == 16


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_the_same_as_one(tiny_model_folder: Path, problem, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    start(Path(__file__).with_name("accelerate_ranks.py"), tiny_model_folder, tmp_path)
    results = torch.load(tmp_path / "results.pt")
    assert results["processes"] == 2
    for name, options in (("all", {"epochs": 3}), ("embedding", {"epochs": 1, "prompt": embedding(problem)})):
        losses, trained = run(problem, **options)  # batches of two examples, where each process has batches of one
        assert results[name][0] == pytest.approx(losses, rel=1e-6), name
        assert close(results[name][1], trained), name
    assert results["stopped"][0] == results["all"][0][:4]
    assert results["resumed"][0] == results["all"][0]
    assert torch.equal(results["resumed"][1], results["all"][1])
    assert load(tmp_path / "prompt", problem.model)[0].length == 16


def embedding(problem) -> EmbeddingPrompt:
    return EmbeddingPrompt(problem.model.get_input_embeddings()(problem.text[0, :8]))
