"""The plain loop gives what the same loop gives in plain transformers, in each combination that PyTorch offers."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load
from tests.examples.conftest import time_ratio
from tests.examples.loop_problems import PlainLoss


def run(problem, prompt=None, compile_layers=False, **options) -> tuple[list[float], Tensor]:
    """Losses, and what was trained, of two epochs in the same order of examples."""
    from examples import plain_loop

    model, text, sequences, _ = problem
    prompt = plain_loop.first_tokens(model, text, 8) if prompt is None else prompt
    moments = plain_loop.teach(model, text, sequences)
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    torch.manual_seed(0)
    losses = plain_loop.train(model, prompt, plain_loop.numbered(sequences), moments, epochs=2, **options)
    return losses, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])


def test_losses_and_prompt_are_those_of_plain_transformers(problem) -> None:
    from examples import plain_loop

    plain_loss = PlainLoss(problem)
    losses, trained = run(problem)
    prompt = plain_loop.first_tokens(problem.model, problem.text, 8)
    optimizer = torch.optim.AdamW(prompt.parameters(), 2e-2, betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(0)
    loader = DataLoader(plain_loop.numbered(problem.sequences), 4, shuffle=True, collate_fn=plain_loop.collate)
    expected = []
    for _ in range(2):
        for batch in loader:
            loss = plain_loss(None, prompt, None, batch) / (batch[1] >= 0).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    assert len(losses) == 4 and losses[0] > 0.1
    assert losses == pytest.approx(expected, rel=1e-5)
    plain = torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])
    # Adam divides by the gradient's own size: where a gradient is rounding alone, its sign may differ.
    assert (trained - plain).norm() <= 1e-4 * plain.norm()


def test_accumulated_batches_equal_a_large_one(problem) -> None:
    losses, trained = run(problem, batch_size=4)
    accumulated, other = run(problem, batch_size=1, accumulate=4)
    assert accumulated == pytest.approx(losses, rel=1e-6)
    assert (trained - other).norm() <= 1e-6 * trained.norm()


def test_autocast_gives_the_losses_of_plain_transformers_under_it(problem, monkeypatch) -> None:
    from examples import plain_loop

    exact, _ = run(problem)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = run(problem)
        monkeypatch.setattr(plain_loop, "loss_sum", PlainLoss(problem))
        expected, _ = run(problem)
    assert losses != exact
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses == pytest.approx(exact, rel=5e-3)


def test_gradient_checkpointing_changes_no_bit(problem) -> None:
    losses, trained = run(problem)
    problem.model.activation_checkpointing_enable()
    problem.model.train()
    again, other = run(problem)
    assert again == losses and torch.equal(trained, other)


def test_compiled_loss_changes_no_bit(problem, monkeypatch) -> None:
    from examples import plain_loop

    losses, trained = run(problem)
    compiled = torch.compile(plain_loop.linear_kl_div_from_moments, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(plain_loop, "linear_kl_div_from_moments", compiled)
    again, other = run(problem)
    assert again == losses and torch.equal(trained, other)


def test_compiled_layers_change_no_bit(problem) -> None:
    problem = problem._replace(sequences=problem.text[0].split(10)[:4])  # of one length: two graphs to compile
    losses, trained = run(problem)
    again, other = run(problem, compile_layers=True)
    assert again == losses and torch.equal(trained, other)


def test_an_embedding_prompt_trains_too(problem) -> None:
    start = problem.model.get_input_embeddings()(problem.text[0, :8])
    losses, trained = run(problem, EmbeddingPrompt(start))
    assert losses[0] > 0.1 and not torch.equal(trained, start.flatten())


def test_a_step_is_no_slower_than_plain_transformers(larger_problem, monkeypatch) -> None:
    from examples import plain_loop

    model, text, sequences, _ = larger_problem
    prompt, moments = plain_loop.first_tokens(model, text, 16), plain_loop.teach(model, text, sequences)

    def train() -> None:
        plain_loop.train(model, prompt, plain_loop.numbered(sequences), moments)

    loss_sum, plain_loss = plain_loop.loss_sum, PlainLoss(larger_problem)

    def train_plain() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(plain_loop, "loss_sum", plain_loss)
            train()

    assert time_ratio(train, train_plain) < 1  # .55 on a quiet machine
    assert plain_loop.loss_sum is loss_sum


def test_a_prompt_of_another_model_is_refused(problem) -> None:
    key = torch.zeros(3, 2, 8, 8)
    with pytest.raises(SoftPromptError, match="prefix: got 3 layers, 2 key heads of size 8, the model has 2, 2 and 8"):
        run(problem, KVPrompt(key, key))


def test_a_head_with_a_softcap_is_refused(problem) -> None:
    config = Gemma2Config(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"its head has a softcap of 30.0.*linear_kl_div"):
        run(problem._replace(model=Gemma2ForCausalLM(config).requires_grad_(False).eval()))


def test_a_model_that_is_not_frozen_is_refused(problem) -> None:
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        run(problem._replace(model=problem.model.requires_grad_(True)))


def test_command_line(problem, tiny_model_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from examples import plain_loop

    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran to the red house " * 3)
    monkeypatch.setattr(sys, "argv", ["", str(tiny_model_folder), str(tmp_path / "text.txt"), str(tmp_path / "prompt")])
    plain_loop.main()
    assert "KL per token in the first step" in capsys.readouterr().out
    prompt, _ = load(tmp_path / "prompt", problem.model)
    assert prompt.length == 16
