"""Trap: accumulated gradients differ from those of the whole batch, or the loss depends on the prompt's length or on
micro-batches. Also: training that does not stop at its last step, and checkpoints that delete other files by a pattern
of names."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from softprompt_kernels.compress.distill.checkpoint import Checkpoints
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Schedule, Trainer
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.models import capture, head_of, prepare
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt

EXAMPLES = [
    Example((1, 2, 3), (4, 5)),
    Example((6,), (7, 8, 9, 10, 11)),
    Example((12, 13), (14,)),
    Example((15, 16, 17, 18), (19, 20, 21)),
    Example((22, 23), (24, 25, 26)),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    prepare(model)
    return model


def make(
    model: PreTrainedModel, kind: str = "kv", micro: int | None = None, tokens: int = 4, steps: int = 1
) -> Trainer:
    ids = torch.arange(30, 30 + tokens)[None]
    prompt: KVPrompt | EmbeddingPrompt = (
        KVPrompt.from_prefix(capture(model, ids))
        if kind == "kv"
        else EmbeddingPrompt(model.get_input_embeddings()(ids[0]).detach(), frozen_tokens=0)
    )
    objective = Objective("nll", head_of(model))
    schedule = Schedule(steps, 0.01)
    return Trainer(model, prompt, EXAMPLES, None, objective, schedule, batch_size=5, micro_batch_size=micro)


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("micro", [1, 2, 5, None])
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    model: PreTrainedModel, kind: str, micro: int | None
) -> None:
    whole, parts = make(model, kind, 5), make(model, kind, micro)
    chosen = [3, 0, 4, 1, 2]
    assert parts.accumulate(chosen) == pytest.approx(whole.accumulate(chosen), rel=1e-6)
    for found, expected in zip(parts.parameters, whole.parameters, strict=True):
        assert expected.grad.abs().max() > 0
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-6 * float(expected.grad.abs().max()))


def test_the_loss_is_a_mean_over_tokens_in_any_batch(model: PreTrainedModel) -> None:
    trainer = make(model)
    alone = [trainer.accumulate([index]) for index in range(5)]
    tokens = [example.targets for example in EXAMPLES]
    for chosen in ([0, 1], [2, 1, 3], [0, 1, 2, 3, 4]):
        mean = sum(alone[i] * tokens[i] for i in chosen) / sum(tokens[i] for i in chosen)
        assert trainer.accumulate(chosen) == pytest.approx(mean, rel=1e-6)
    assert trainer.accumulate([0, 0, 0]) == pytest.approx(alone[0], rel=1e-6)


def test_the_scale_of_the_loss_does_not_depend_on_the_prompts_length(model: PreTrainedModel) -> None:
    """A head of zeros gives every token the probability 1/V, with any prompt and in any batch."""
    trainers = [make(model, tokens=tokens) for tokens in (2, 4, 16)]
    for trainer in trainers:
        trainer.objective = Objective("nll", head_of(model).__class__(torch.zeros(61, 32, dtype=torch.float64)))
        for chosen in ([0], [1, 2], [0, 1, 2, 3, 4]):
            assert trainer.accumulate(chosen) == pytest.approx(float(torch.tensor(61.0).log()), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_training_stops_at_its_last_step_also_when_it_is_resumed(
    model: PreTrainedModel, tmp_path: Path, steps: int
) -> None:
    trainer = make(model, steps=steps)
    done: list[int] = []
    trainer.run(lambda report: done.append(report.step))
    trainer.run(lambda report: done.append(report.step))
    assert done == list(range(1, steps + 1))
    trainer.save(Checkpoints(tmp_path / "checkpoint", "me"))
    again = make(model, steps=steps)
    again.load(Checkpoints(tmp_path / "checkpoint", "me"))
    again.run(lambda report: done.append(report.step))
    assert len(done) == steps


def test_saving_a_checkpoint_changes_no_other_file(model: PreTrainedModel, tmp_path: Path) -> None:
    """There is one checkpoint, replaced in place. No pattern of names decides which files to delete."""
    names = ["checkpoint-2.safetensors", "checkpoint.safetensors.mine", "my-checkpoint.safetensors"]
    for name in names:
        (tmp_path / name).write_text(name)
    trainer = make(model, steps=3)
    trainer.run(lambda report: trainer.save(Checkpoints(tmp_path / "checkpoint.safetensors", "me")))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*names, "checkpoint.safetensors"])
    assert all((tmp_path / name).read_text() == name for name in names)
