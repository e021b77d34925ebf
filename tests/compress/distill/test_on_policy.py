"""On-policy rounds: what the student is asked, what is trained on afterwards, and that a run resumes in any of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, CompressConfig, Interrupted, compress, plan
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.on_policy import Part, parts
from softprompt_kernels.compress.distill.trainer import Schedule, Trainer
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.moments_cache import read_targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, head_of, sample
from softprompt_kernels.ops import teacher_moments
from softprompt_kernels.prompts import KVPrompt, Prefix

Make = Callable[..., CompressConfig]
pytestmark = pytest.mark.usefixtures("no_plot")
ROUNDS: dict[str, Any] = {"rounds": 2, "steps": 6}


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found if record["stage"] == "training"]


def stored(folder: Path, number: int) -> list[Example]:
    examples = json.loads((folder / "cache" / "rounds" / str(number) / "answers.json").read_text())["examples"]
    return [Example(tuple(x), tuple(y)) for x, y in examples]


def test_the_parts_of_a_training_follow_each_other_and_are_equal() -> None:
    assert list(parts(7, 0)) == [Part(0, 0, 7)]
    assert list(parts(7, 2)) == [Part(0, 0, 2), Part(1, 2, 4), Part(2, 4, 7)]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_query_has_the_students_answer_with_the_probability_of_its_share(
    model: PreTrainedModel, context: Prefix, examples: list[Example], make_targets: Any, tmp_path: Path, share: float
) -> None:
    def trainer(examples: list[Example]) -> Trainer:
        prompt, objective = KVPrompt.from_prefix(context.slice(0, 4)), Objective("kl", head_of(model))
        targets = make_targets(examples=examples, folder=tmp_path / str(len(examples[0].output_ids)))
        return Trainer(model, prompt, examples, targets, objective, Schedule(1, 0.1), batch_size=5)

    own = [Example(e.input_ids, (9, *e.output_ids[::-1])) for e in examples]
    plain, alone, mixed = trainer(examples), trainer(own), trainer(examples)
    for _ in range(2):  # what a later round leaves takes the place of what an earlier one left
        mixed.take(own, alone.targets, share)
    drawn = [index for step in range(140) for index in mixed.batch_at(step)]
    assert [index % 7 for index in drawn] == [index for step in range(140) for index in plain.batch_at(step)]
    assert sum(index >= 7 for index in drawn) / len(drawn) == pytest.approx(share, abs=0.05)
    assert len(mixed.examples) == 14
    assert len(mixed.targets.shards) == len(plain.targets.shards) + len(alone.targets.shards)
    assert mixed.accumulate([8, 12]) == pytest.approx(alone.accumulate([1, 5]), rel=1e-5)
    assert mixed.accumulate([1, 5]) == pytest.approx(plain.accumulate([1, 5]), rel=1e-5)


def test_the_student_answers_the_training_queries_with_its_prompt_and_the_teacher_reads_them(
    make_config: Make, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recording_reporter: Any
) -> None:
    config = make_config(**ROUNDS)
    with pytest.raises(Interrupted) as stop:
        compress(config, recording_reporter("Training, part 2 of 3", 0))
    assert stop.value.step == 2
    state = load_file(config.output / "checkpoint.safetensors")
    prompt = KVPrompt.from_prefix(capture(model, torch.zeros(1, 8, dtype=torch.int64)), frozen_tokens=1)
    prompt.load_state_dict({k.removeprefix("prompt."): v for k, v in state.items() if k.startswith("prompt.")})
    found, chat = stored(config.output, 1), ChatFormat(tokenizer)
    teacher = json.loads((config.output / "cache" / "examples.json").read_text())
    assert [list(e.input_ids) for e in found] == [x for x, _ in teacher["train"]], "no held-out query is asked"
    asked = [e.input_ids for e in found]
    answers = sample(model, asked, prompt.prefix(), new_tokens=6, end_tokens=chat.end_tokens, seed=1 << 32)
    assert [e.output_ids for e in found] == [c.tokens for c in sorted(answers, key=lambda c: c.index)]
    context = capture(model, chat.context_ids(config.context.read_text()))
    hidden = hidden_states(model, context, found, recording_reporter(), "Full context")
    folder = config.output / "cache" / "rounds" / "1"
    key = json.loads((folder / "index.json").read_text())["key"]
    targets = read_targets(folder, key, head_of(model), "moments", 1.0)
    expected = teacher_moments(torch.cat(hidden), head_of(model).weight)
    moments = targets.moments(range(len(found)), torch.device("cpu"))
    torch.testing.assert_close(moments.mean, expected.mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "after"),
    [
        ("Training, part 1 of 3", 1),
        ("Student's answers, round 1", 2),
        ("Teacher reads them, round 2", 4),
        ("Training, part 2 of 3", 1),
        ("Training, part 3 of 3", 2),
    ],
)
def test_an_interrupted_run_with_rounds_ends_with_the_same_bits(
    make_config: Make, tmp_path: Path, recording_reporter: Any, stage: str, after: int
) -> None:
    uninterrupted, config = make_config(**ROUNDS, output=tmp_path / "uninterrupted"), make_config(**ROUNDS)
    figures = compress(uninterrupted)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter(stage, after))
    reporter = recording_reporter()
    assert compress(config, reporter)["heldout"] == figures["heldout"]
    assert records(config.output) == records(uninterrupted.output)
    assert [record["round"] for record in records(config.output)] == [0, 0, 1, 1, 2, 2]
    one, other = (load_file(c.output / "checkpoint.safetensors") for c in (config, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in other)
    made = sum(name.startswith("Student's answers") for name in reporter.done)
    assert made == {"Training, part 2 of 3": 1, "Training, part 3 of 3": 0, "Teacher reads them, round 2": 1}.get(
        stage, 2
    )


def test_a_run_that_is_killed_in_a_round_resumes_from_it(make_config: Make, recording_reporter: Any) -> None:
    config = make_config(**ROUNDS, checkpoint_every=100)
    with pytest.raises(SystemError):
        compress(config, recording_reporter("Teacher reads them, round 2", 4, SystemError))
    reporter = recording_reporter()
    compress(config, reporter)
    assert "Resuming from step 4." in reporter.messages
    assert [record["round"] for record in records(config.output)] == [0, 0, 1, 1, 2, 2]


def test_a_round_changes_what_is_trained_on(make_config: Make, tmp_path: Path) -> None:
    compress(make_config(**ROUNDS, student_share=1.0))
    compress(make_config(steps=6, output=tmp_path / "plain"))
    with_rounds, plain = records(tmp_path / "run"), records(tmp_path / "plain")
    assert [r["loss"] for r in with_rounds][:2] == [r["loss"] for r in plain][:2]
    assert not {r["loss"] for r in with_rounds[2:]} & {r["loss"] for r in plain[2:]}
    assert "round" not in plain[0]


def test_a_round_that_was_lost_behind_its_step_is_named(make_config: Make, recording_reporter: Any) -> None:
    config = make_config(**ROUNDS)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training, part 2 of 3", 1))
    (config.output / "cache" / "rounds" / "1" / "00000.safetensors").write_bytes(b"")
    with pytest.raises(SoftPromptError, match=r"rounds.1 cannot be read back; delete the run's checkpoint.safetensors"):
        compress(config)
    (config.output / "checkpoint.safetensors").unlink()
    compress(config)
    assert [record["round"] for record in records(config.output)] == [0, 0, 1, 1, 2, 2]


def test_the_seconds_of_a_round_count_in_a_resumed_run(make_config: Make, recording_reporter: Any) -> None:
    config = make_config(**ROUNDS)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training, part 2 of 3", 1))
    path = config.output / "cache" / "rounds" / "1" / "answers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 500.0}))
    assert 500 < compress(config)["stages"]["training"] < 600


def test_a_plan_knows_what_rounds_cost(make_config: Make) -> None:
    seconds = plan(make_config(**ROUNDS)).estimated_seconds
    assert seconds["rounds"] > 0
    assert "rounds" not in plan(make_config()).estimated_seconds


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rounds": 1, "objective": "nll"}, "rounds: got 1 with objective=nll .* is no label to learn from"),
        ({"rounds": 1, "nll_weight": 0.5}, "rounds: got 1 with objective=kl and nll_weight=0.5"),
        ({"rounds": 5}, "rounds: got 5, accepted is less than steps=5"),
        ({"rounds": 1, "steps": 0}, "rounds: got 1, accepted is less than steps=0"),
        ({"student_share": 0.3}, "student_share: got 0.3, accepted with rounds=0 is 0.5"),
    ],
    ids=str,
)
def test_rounds_that_make_no_sense_are_refused(make_config: Make, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_config(**options)
