"""A whole run: the files it writes, and that it can be resumed at every stage."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, CompressConfig, Interrupted, compress
from softprompt_kernels.compress import run as module
from softprompt_kernels.compress.distill.trainer import Trainer
from softprompt_kernels.compress.report.answers import Comparison, answers_page
from softprompt_kernels.compress.report.curves import save_curves
from softprompt_kernels.compress.sources.queries import load_queries
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, generate, prefix_of
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load

Make = Callable[..., CompressConfig]
FullDisk = Callable[..., AbstractContextManager[None]]

pytestmark = pytest.mark.usefixtures("no_plot")

STAGES = (
    "load",
    "context",
    "answers",
    "baselines",
    "matching",
    "training",
    "evaluation",
    "answers_compared",
)
"""The stages of a run, in order. Without init=matched there is no matching."""


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def steps(folder: Path, stage: str = "training") -> list[int]:
    """The steps of one stage in the metrics."""
    return [record["step"] for record in metrics(folder) if record["stage"] == stage]


def assert_same_run(first: Path, second: Path) -> None:
    """Parameters, optimiser state, metrics and figures have the same bits."""
    assert metrics(first) == metrics(second)
    for name in ("checkpoint.safetensors", "prompt/adapter_model.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (first, second)]
    for one in figures:
        del one["seconds"], one["stages"]
    assert figures[0] == figures[1]
    assert (first / "answers.md").read_text() == (second / "answers.md").read_text()


def check_figures(
    figures: dict[str, Any], config: CompressConfig, sets: tuple[str, ...] = ("train", "heldout")
) -> None:
    """evaluation.json holds `figures` and all that belongs in it."""
    assert json.loads((config.output / "evaluation.json").read_text()) == figures
    assert set(figures) == {"context_tokens", "prompt_tokens", "ratio", "start", "seconds", "stages", *sets}
    assert tuple(figures["stages"]) == tuple(name for name in STAGES if name != "matching" or config.init == "matched")
    assert all(seconds >= 0 for seconds in figures["stages"].values())
    assert figures["seconds"] == pytest.approx(sum(figures["stages"].values()))
    for name, part in ((name, figures[name]) for name in sets):
        assert {"kl_none", "kl_prompt", "recovered", "top1_agreement"} <= set(part)
        assert (set(part) >= {"kl_truncated", "kl_untrained"}) == (name != "test"), "measured on other sets alone"
        assert part["recovered"] == pytest.approx(1 - part["kl_prompt"] / part["kl_none"])
        assert 0 <= part["top1_agreement"] <= 1
        assert part["kl_none"] > 0.01


# The files of a run


def test_a_run_writes_all_its_files(
    make_config: Make,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recording_reporter: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "save_curves", save_curves)
    config = make_config(evaluate_every=2)
    reporter = recording_reporter()
    figures = compress(config, reporter)
    output = config.output
    check_figures(figures, config)
    assert figures["prompt_tokens"] == 8
    assert figures["ratio"] == figures["context_tokens"] / 8
    names = {"config.yaml", "run.json", "queries.jsonl", "cache", "checkpoint.safetensors", "metrics.jsonl"}
    names |= {"chat.json", "stages.json", "curves.png", "prompt", "answers.md", "details.json", "evaluation.json"}
    assert {entry.name for entry in output.iterdir()} == names
    records = [record for record in metrics(output) if record["stage"] == "training"]
    assert steps(output) == [1, 2, 3, 4, 5]
    assert steps(output, "matching") == list(range(1, config.matching_steps + 1))
    assert [record["step"] for record in records if "heldout_kl" in record] == [2, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens"} <= set(records[0])
    asked = load_queries(output / "queries.jsonl")
    assert len(asked) == 6
    assert {query.input for query in asked} == {query.input for query in load_queries(config.queries)}
    prompt, record = load(output / "prompt", model, tokenizer)
    assert isinstance(prompt, KVPrompt)
    assert (prompt.length, prompt.frozen_tokens) == (8, 1)
    assert record["figures"] == figures["heldout"]
    assert record["context"]["tokens"] == figures["context_tokens"]
    assert reporter.done["Training"] == 5


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        ("kv", "matched"),
        *(
            (kind, init)
            for kind in ("kv", "embedding")
            for init in ("strided", "first", "text", "vocabulary", "random")
        ),
    ],
)
def test_every_kind_and_initialisation_is_trained(
    make_config: Make, tmp_path: Path, model: PreTrainedModel, kind: str, init: str
) -> None:
    options: dict[str, Any] = {"kind": kind, "init": init, "steps": 2}
    if init == "text":
        (tmp_path / "start.txt").write_text("Keep this.")
        options["init_text"] = tmp_path / "start.txt"
    config = make_config(**options)
    figures = compress(config)
    check_figures(figures, config)
    prompt, _ = load(config.output / "prompt", model)
    assert isinstance(prompt, KVPrompt if kind == "kv" else EmbeddingPrompt)
    assert ("kl_initial" in figures["heldout"]) == (kind != "kv" or init not in ("strided", "first"))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "reverse_kl"},
        {"objective": "jsd", "beta": 0.3},
        {"objective": "nll"},
        {"nll_weight": 0.3},
        {"loss_temperature": 2.0},
    ],
    ids=str,
)
def test_every_objective_is_trained(make_config: Make, options: dict[str, Any]) -> None:
    config = make_config(steps=2, **options)
    check_figures(compress(config), config)


def test_training_recovers_what_an_untrained_prompt_lost(make_config: Make) -> None:
    figures = compress(make_config(init="strided", steps=40, batch_size=4, learning_rate=0.05))
    assert figures["train"]["kl_prompt"] < 0.8 * figures["train"]["kl_untrained"]


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"micro_batch_size": 1}], ids=str)
def test_options_that_save_memory_change_no_figure(make_config: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = compress(make_config())
    found = compress(make_config(output=tmp_path / "other", **options))
    assert (tmp_path / "run/queries.jsonl").read_text() == (tmp_path / "other/queries.jsonl").read_text()
    for part in ("train", "heldout"):
        assert found[part] == pytest.approx(expected[part], rel=1e-4)


def test_self_study_queries_with_given_held_out_outputs(make_config: Make, tmp_path: Path) -> None:
    lines = [{"input": "Who keeps it?", "output": "Mira."}, {"input": "Where?"}]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = make_config(queries=None, heldout=tmp_path / "heldout.jsonl", selfstudy=5, steps=1)
    figures = compress(config)
    saved = [json.loads(line) for line in (config.output / "queries.jsonl").read_text().splitlines()]
    assert [line["split"] for line in saved] == ["train"] * 5 + ["heldout"] * 2
    assert saved[5] == {**lines[0], "split": "heldout"}
    assert figures["heldout"]["tokens"] > len("Mira.")


def test_several_answers_to_a_query_differ(make_config: Make) -> None:
    config = make_config(samples=3, steps=1)
    compress(config)
    saved = [json.loads(line) for line in (config.output / "queries.jsonl").read_text().splitlines()]
    answers: dict[str, set[str]] = {}
    for line in saved:
        answers.setdefault(f"{line['split']}: {line['input']}", set()).add(line["output"])
    counts = {name: len(found) for name, found in answers.items()}
    assert len(saved) == 3 * sum(name.startswith("train") for name in counts) + sum("heldout" in n for n in counts)
    assert all(count > 1 for name, count in counts.items() if name.startswith("train"))


# The test set


def test_test_queries_are_answered_and_measured_but_not_trained_on(
    make_config: Make, test_file: Path, tmp_path: Path
) -> None:
    config = make_config(test=test_file, steps=2, samples=2)
    check_figures(compress(config), config, ("train", "heldout", "test"))
    saved = [json.loads(line) for line in (config.output / "queries.jsonl").read_text().splitlines()]
    asked = {name: [line["input"] for line in saved if line["split"] == name] for name in ("train", "heldout", "test")}
    assert asked["test"] == [query.input for query in load_queries(test_file)]
    assert not set(asked["test"]) & {*asked["train"], *asked["heldout"]}
    assert (len(asked["train"]), len(asked["heldout"])) == (2 * 3, 2), "one of the six queries is a test query"
    assert saved[-1]["output"] == "Mira's."
    page = (config.output / "answers.md").read_text()
    assert page.count("> ") == page.count("soft prompt  |") == page.count("full context |") + 1 == 2 + 3
    assert all(f"> {question}\n" in page for question in (*asked["heldout"], *asked["test"]))


def test_answers_are_those_of_the_full_context_and_of_the_saved_prompt(
    make_config: Make, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = make_config(steps=2, sample_temperature=0.0)
    compress(config)
    chat = ChatFormat(tokenizer)
    context = capture(model, chat.context_ids(config.context.read_text()))
    prompt = prefix_of(model, load(config.output / "prompt", model)[0]).detach()
    held = [json.loads(line) for line in (config.output / "queries.jsonl").read_text().splitlines()]
    held = [line["input"] for line in held if line["split"] == "heldout"]
    expected = []
    for question in held:
        ids, answers = torch.tensor([chat.query_ids(question)]), {}
        for name, prefix in (("full context", context), ("soft prompt", prompt)):
            tokens = generate(model, ids, prefix, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            answers[name] = tokenizer.decode(tokens, skip_special_tokens=True)
        expected.append(Comparison(question, answers))
    assert (config.output / "answers.md").read_text() == answers_page({"held-out": expected}, 6, 0.0)


def test_a_test_set_changes_other_figures_by_rounding_alone(make_config: Make, test_file: Path, tmp_path: Path) -> None:
    test_file.write_text('{"input": "What is asked nowhere else?"}\n')
    without, with_test = make_config(steps=2), make_config(steps=2, test=test_file, output=tmp_path / "other")
    first, second = compress(without), compress(with_test)
    for name in ("train", "heldout"):  # equal but for rounding: the teacher's answers are sampled in other batches
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5)


def test_no_start_and_no_baseline_of_tokens_is_measured_on_the_test_set(make_config: Make, test_file: Path) -> None:
    figures = compress(make_config(steps=1, test=test_file))
    measured = {name.removeprefix("kl_") for name in figures["test"] if name.startswith("kl_")}
    assert measured == {"none", "prompt"}
    assert {"kl_initial", "kl_truncated", "kl_untrained"} <= set(figures["heldout"])


def test_a_context_that_does_not_matter_for_the_test_is_refused(
    make_config: Make, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = module.measure_tokens

    def measure(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = measured(*arguments, **options)
        return {name: replace(one, kl=0 * one.kl) for name, one in found.items()} if arguments[-1] == "test" else found

    monkeypatch.setattr(module, "measure_tokens", measure)
    config = make_config(test=test_file)
    with pytest.raises(SoftPromptError, match="context does not matter for these queries"):
        compress(config)
    assert not (config.output / "metrics.jsonl").exists()


def test_a_changed_or_added_test_file_is_another_run(make_config: Make, test_file: Path) -> None:
    compress(make_config(steps=1))
    with pytest.raises(SoftPromptError, match="differs in test;"):
        compress(make_config(steps=1, test=test_file))
    config = make_config(steps=1, test=test_file, output=test_file.with_name("other"))
    compress(config)
    test_file.write_text('{"input": "Another?"}')
    with pytest.raises(SoftPromptError, match="differs in test;"):
        compress(config)


# The seconds of a run


def test_a_resumed_run_adds_the_seconds_of_earlier_calls(
    make_config: Make, test_file: Path, tmp_path: Path, recording_reporter: Any
) -> None:
    uninterrupted = make_config(test=test_file, output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config(test=test_file)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    stored = json.loads((config.output / "stages.json").read_text())
    assert tuple(stored) == STAGES[:5], "an interrupted stage does not count"
    (config.output / "stages.json").write_text(json.dumps(stored | {"answers": 1000.0}))
    records = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"seconds": 200.0}) + "\n" for record in records]  # those of matching count nowhere
    (config.output / "metrics.jsonl").write_text("".join(lines))
    figures = compress(config)
    assert_same_run(config.output, uninterrupted.output)
    check_figures(figures, config, ("train", "heldout", "test"))
    assert 1000 <= figures["stages"]["answers"] < 1100
    assert 600 <= figures["stages"]["training"] < 700, "the steps before the checkpoint count once"
    assert stored["load"] < figures["stages"]["load"]


def test_a_run_that_is_stopped_after_training_counts_its_training_once(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "compared_answers", None)
        with pytest.raises(TypeError):
            compress(config)
    stored = json.loads((config.output / "stages.json").read_text())
    assert tuple(stored) == STAGES[:7]
    (config.output / "stages.json").write_text(json.dumps(stored | {"training": 1000.0}))
    figures = compress(config)
    check_figures(figures, config)
    assert figures["stages"]["training"] < 900


# The same call again: after the end, and after an interruption


def test_a_finished_run_returns_its_figures_without_work(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any
) -> None:
    config = make_config(steps=2)
    figures = compress(config)
    for name in ("capture_context", "Teaching", "Training"):
        monkeypatch.setattr(module, name, None)
    reporter = recording_reporter()
    assert compress(config, reporter) == figures
    assert reporter.messages == [f"The run in {config.output} is already finished."]


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    make_config: Make, tmp_path: Path, recording_reporter: Any, kind: str, step: int
) -> None:
    uninterrupted = make_config(kind=kind, evaluate_every=2, output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config(kind=kind, evaluate_every=2)
    with pytest.raises(Interrupted) as stop:
        compress(config, recording_reporter("Training", step))
    assert (stop.value.step, stop.value.steps, stop.value.output) == (step, 5, config.output)
    assert not (config.output / "evaluation.json").exists()
    reporter = recording_reporter()
    compress(config, reporter)
    assert f"Resuming from step {step}." in reporter.messages
    assert_same_run(config.output, uninterrupted.output)


def test_a_killed_run_resumes_from_its_last_checkpoint(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config()
    with pytest.raises(SystemError):
        compress(config, recording_reporter("Training", 3, SystemError))
    assert steps(config.output) == [1, 2, 3]
    with (config.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    reporter = recording_reporter()
    compress(config, reporter)
    assert "Resuming from step 2." in reporter.messages
    assert_same_run(config.output, uninterrupted.output)


@pytest.mark.parametrize("stage", ["Teacher's answers", "No context, training queries", "No context, held-out queries"])
def test_a_run_that_is_interrupted_before_training_ends_with_the_same_bits(
    make_config: Make, tmp_path: Path, recording_reporter: Any, stage: str
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    reporter = recording_reporter()
    compress(uninterrupted, reporter)
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        compress(config, recording_reporter(stage, reporter.done[stage]))
    compress(config)
    assert_same_run(config.output, uninterrupted.output)


def test_a_run_resumes_with_other_checkpoint_micro_batch_and_thread_options(
    make_config: Make, recording_reporter: Any
) -> None:
    with pytest.raises(Interrupted):
        compress(make_config(), recording_reporter("Training", 3))
    reporter = recording_reporter()
    compress(make_config(checkpoint_every=1, micro_batch_size=2, threads=1), reporter)
    assert "Resuming from step 3." in reporter.messages


@pytest.mark.parametrize("damage", ["truncated", "empty", "null"])
def test_a_damaged_file_of_answers_is_made_again(
    make_config: Make, recording_reporter: Any, tmp_path: Path, damage: str
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config()
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    path = config.output / "cache" / "examples.json"
    path.write_text({"truncated": path.read_text()[:-20], "null": "null"}.get(damage, ""))
    compress(config)
    assert_same_run(config.output, uninterrupted.output)


@pytest.mark.parametrize("lost", ["targets", "states", "rows", "all of them", "half of the targets"])
def test_records_that_were_lost_are_made_again(make_config: Make, recording_reporter: Any, lost: str) -> None:
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        compress(config, recording_reporter("No context, training queries", 3))
    cache = config.output / "cache"
    if lost == "half of the targets":
        path = cache / "targets/00000.safetensors"
        path.write_bytes(path.read_bytes()[:-50])
    for name in {"all of them": ("targets", "states", "rows")}.get(lost, (lost,)):
        if name == "rows":
            for path in cache.glob("rows*"):
                path.unlink()
        else:
            shutil.rmtree(cache / name, ignore_errors=True)
    reporter = recording_reporter()
    check_figures(compress(config, reporter), config)
    assert "Teacher's answers" not in reporter.done
    assert reporter.done["Given answers"] == {"states": 5, "all of them": 6}.get(lost, 4)


def test_records_that_cannot_be_kept_end_the_run_with_a_message(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_kernels.compress.teaching.read_targets", lambda *_: None)
    with pytest.raises(SoftPromptError, match=r"cache cannot be read back; delete that folder"):
        compress(make_config())


def test_answers_that_a_version_without_test_sets_stored_are_read(
    make_config: Make, recording_reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        compress(config, recording_reporter("No context, training queries", 3))
    stored = json.loads((config.output / "cache" / "examples.json").read_text())
    assert set(stored) == {"train", "heldout"}
    monkeypatch.setattr("softprompt_kernels.compress.teaching.answer", None)
    check_figures(compress(config), config)


def test_a_truncated_checkpoint_is_refused_with_a_message(make_config: Make, recording_reporter: Any) -> None:
    config = make_config()
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    path = config.output / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SoftPromptError, match=r"checkpoint: .* cannot be read .* delete it to start over"):
        compress(config)
    path.unlink()
    compress(config)
    assert steps(config.output) == [1, 2, 3, 4, 5]


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_can_be_resumed(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: FullDisk
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config()
    path = config.output / "checkpoint.safetensors"
    save = Trainer.save
    contents: list[bytes] = []

    def save_on_a_full_disk(self: Trainer, *arguments: Any) -> None:
        if self.step < 4:
            save(self, *arguments)
            contents.append(path.read_bytes())
            return
        with full_disk():
            save(self, *arguments)

    monkeypatch.setattr(Trainer, "save", save_on_a_full_disk)
    with pytest.raises(OSError, match=re.escape(str(path))):
        compress(config)
    assert path.read_bytes() == contents[-1]
    assert not (config.output / "evaluation.json").exists()
    monkeypatch.setattr(Trainer, "save", save)
    compress(config)
    assert_same_run(config.output, uninterrupted.output)
