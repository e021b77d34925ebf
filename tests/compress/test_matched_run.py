"""A run whose prompt is matched: its figures and files, that it resumes at every stage, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from softprompt_kernels.compress import CompressConfig, Interrupted, compress, teaching
from softprompt_kernels.compress import run as module
from softprompt_kernels.compress.matching import match as matching
from softprompt_kernels.compress.report.curves import save_curves
from softprompt_kernels.compress.report.table import evaluation_table
from softprompt_kernels.compress.sources.queries import load_queries
from softprompt_kernels.compress.teacher.rows import Rows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import KVPrompt, load

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")

READING = "Given answers"
LAYERS = 2  # of the model


def records(folder: Path) -> list[tuple[str, int, int, float]]:
    """Stage, first layer, step and error or loss of each line of the metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["stage"], line.get("first_layer", 0), line["step"], line.get("error", line.get("loss"))) for line in lines
    ]


def row_files(folder: Path) -> list[str]:
    """The files of the rows that matching reads."""
    return sorted(path.name for path in (folder / "cache").glob("rows*"))


def assert_same_run(first: Path, second: Path) -> None:
    """The saved prompts have the same bits, and the metrics and figures are the same, without the seconds."""
    one, other = (load_file(folder / "prompt/adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (first, second)]
    for one_run in figures:
        del one_run["seconds"], one_run["stages"]
    assert figures[0] == figures[1]
    assert records(first) == records(second)
    assert row_files(first) == row_files(second) == []


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is a group of its own."""
    monkeypatch.setattr(matching, "GROUP_BYTES", 1)


# Figures and files


def test_by_default_a_prompt_is_matched_and_then_trained(make_config: Make, recording_reporter: Any) -> None:
    config = make_config()
    reporter = recording_reporter()
    figures = compress(config, reporter)
    assert config.init == "matched"
    assert figures["start"] == "initial"
    assert list(figures["stages"])[2:6] == ["answers", "baselines", "matching", "training"]
    for part in (figures["train"], figures["heldout"]):
        assert {"kl_initial", "top1_agreement_initial", "kl_prompt", "kl_untrained"} <= set(part)
    assert figures["train"]["kl_initial"] != figures["train"]["kl_prompt"]
    assert [(stage, step) for stage, _, step, _ in records(config.output)] == [
        *(("matching", step) for step in range(1, 11)),
        *(("training", step) for step in range(1, 6)),
    ]
    assert (reporter.done["Matching"], reporter.done["Training"]) == (LAYERS * 11, 5)
    assert row_files(config.output) == []
    _, rows = evaluation_table(figures)
    assert [row[0] for row in rows][-3:] == ["prompt before training", "soft prompt", "full context"]


def test_a_matched_prompt_is_nearer_to_the_full_context_than_tokens_of_it(make_config: Make) -> None:
    figures = compress(make_config(tokens=24, matching_steps=100, steps=1))["train"]
    assert figures["kl_initial"] < 0.7 * min(figures["kl_untrained"], figures["kl_truncated"])


def test_the_teacher_does_not_read_what_it_wrote(make_config: Make, recording_reporter: Any) -> None:
    for name, options in {"trained": {}, "untrained": {"steps": 0}, "likelihood": {"objective": "nll"}}.items():
        reporter = recording_reporter()
        compress(make_config(output=make_config().output.with_name(name), **options), reporter)
        assert READING not in reporter.done and not any(stage.startswith("Full context") for stage in reporter.done)


def test_the_teacher_reads_given_outputs_once(make_config: Make, recording_reporter: Any, tmp_path: Path) -> None:
    config = make_config(steps=1)
    compress(config)
    asked = load_queries(config.output / "queries.jsonl")
    given = [query for query in asked if query.input != "What turns it?"]  # one is left to the teacher
    lines = [json.dumps({"input": q.input, **({"output": q.output} if q in given else {})}) for q in asked]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    reporter = recording_reporter()
    figures = compress(make_config(steps=1, output=tmp_path / "given"), reporter)
    assert reporter.done[READING] == len(given) == 5
    assert figures["heldout"]["kl_none"] > 0


@pytest.mark.parametrize("given", [6, 5], ids=["all are given", "one is sampled"])
def test_a_part_of_given_outputs_is_enough_unless_others_are_sampled(
    make_config: Make, recording_reporter: Any, tmp_path: Path, given: int
) -> None:
    """Beside all tokens of sampled answers, those of a part of the given ones would be too few."""
    output = "It is a long answer about the mill, the river and the crowns."
    lines = [{"input": f"Question {i}?"} | ({"output": output} if i < given else {}) for i in range(6)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"input": "Who keeps it?"}))
    reporter = recording_reporter()
    options = {"steps": 0, "matching_rows": 10, "evaluation_sequences": 1, "heldout": tmp_path / "heldout.jsonl"}
    compress(make_config(**options), reporter)
    assert reporter.done[READING] in ({1, 2} if given == 6 else {5})


@pytest.mark.parametrize(("matching_steps", "steps"), [(10, 0), (0, 2), (0, 0)])
def test_stages_of_no_steps_leave_no_figures_and_no_curves(
    make_config: Make, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, matching_steps: int, steps: int
) -> None:
    monkeypatch.setattr(module, "save_curves", save_curves)
    config = make_config(matching_steps=matching_steps, steps=steps)
    figures = compress(config)
    assert ("kl_initial" in figures["heldout"]) == (steps > 0), "it would repeat the figures of the prompt"
    assert figures["start"] == ("initial" if steps else "prompt")
    assert figures["heldout"][f"kl_{figures['start']}"] > 0
    assert figures["train"]["kl_prompt"] < figures["train"]["kl_none"]
    assert (config.output / "metrics.jsonl").exists() == bool(matching_steps or steps)
    assert (config.output / "curves.png").exists() == bool(matching_steps or steps)
    assert (config.output / "checkpoint.safetensors").exists() == (steps > 0)
    if matching_steps or steps:
        stages = [stage for stage, *_ in records(config.output)]
        assert (stages.count("matching"), stages.count("training")) == (matching_steps, steps)
    prompt, record = load(config.output / "prompt", model)
    assert isinstance(prompt, KVPrompt) and prompt.length == config.tokens
    assert record["objective"] == {"name": "kl", "nll_weight": 0.0, "steps": steps, "init": "matched"}
    assert compress(config) == figures


@pytest.mark.parametrize("init", ["first", "strided", "random"])
def test_a_prompt_can_stay_as_it_is_initialised(make_config: Make, init: str) -> None:
    config = make_config(init=init, steps=0)
    figures = compress(config)
    equal = {"first": "truncated", "strided": "untrained", "random": "prompt"}[init]
    assert figures["start"] == equal
    assert figures["heldout"]["kl_prompt"] == pytest.approx(figures["heldout"][f"kl_{equal}"], rel=1e-5)
    assert "kl_initial" not in figures["heldout"]
    assert not (config.output / "metrics.jsonl").exists() and not (config.output / "curves.png").exists()


@pytest.mark.parametrize("tokens", [1, -1], ids=["one token", "one less than the context"])
def test_the_shortest_and_the_longest_prompt_are_matched(make_config: Make, tokens: int) -> None:
    length = compress(make_config(init="first", steps=0, output=make_config().output.with_name("first")))
    config = make_config(tokens=tokens % length["context_tokens"], steps=1 if tokens == 1 else 0)
    figures = compress(config)
    assert figures["prompt_tokens"] == config.tokens
    assert figures["train"]["kl_prompt"] < 10
    if tokens < 0:
        assert figures["train"]["recovered"] > 0.9


def test_more_rows_than_tokens_are_all_tokens(make_config: Make, tmp_path: Path) -> None:
    outputs = [tmp_path / "many", tmp_path / "more"]
    for output, rows in zip(outputs, (1000, 1_000_000), strict=True):
        compress(make_config(matching_rows=rows, output=output))
    one, other = (load_file(output / "prompt/adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model_is_matched_refined_and_trained(make_config: Make, dtype: str) -> None:
    config = make_config(dtype=dtype, steps=2)
    figures = compress(config)
    assert {stage for stage, *_ in records(config.output)} == {"matching", "training"}
    assert 0 < figures["heldout"]["kl_initial"] < figures["heldout"]["kl_none"]
    saved = load_file(config.output / "prompt/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_few_rows_give_the_closed_form_alone(make_config: Make) -> None:
    config = make_config(matching_rows=20, steps=0)
    figures = compress(config)
    assert figures["train"]["kl_prompt"] > 0
    assert not (config.output / "metrics.jsonl").exists()


# The same call after an interruption


@pytest.mark.usefixtures("layer_by_layer")
def test_the_seconds_of_layers_that_an_earlier_call_matched_count(make_config: Make, recording_reporter: Any) -> None:
    config = make_config()
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Matching", 12))
    path = config.output / "cache/matched-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert 0 <= float(metadata["seconds"]) < 60
    save_file(load_file(path), path, metadata | {"seconds": "500"})
    assert 500 <= compress(config)["stages"]["matching"] < 600


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize(
    ("after", "finished"), [(1, 0), (5, 0), (11, 0), (12, 1), (22, 1)], ids=lambda value: str(value)
)
def test_ctrl_c_during_matching_keeps_the_finished_layers(
    make_config: Make, tmp_path: Path, recording_reporter: Any, after: int, finished: int
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    assert len(records(uninterrupted.output)) == LAYERS * 10 + 5
    config = make_config()
    with pytest.raises(Interrupted, match=f"Stopped matching with {finished} of 2 layers done; saved in") as stop:
        compress(config, recording_reporter("Matching", after))
    assert (stop.value.unit, stop.value.step, stop.value.steps) == ("layer", finished, LAYERS)
    assert row_files(config.output), "the teacher need not read its answers again"
    reporter = recording_reporter()
    compress(config, reporter)
    assert READING not in reporter.done
    assert_same_run(config.output, uninterrupted.output)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("stage", ["the teacher's answers", "before the rows are deleted"])
def test_a_run_that_is_interrupted_around_matching_ends_with_the_same_bits(
    make_config: Make, tmp_path: Path, recording_reporter: Any, monkeypatch: pytest.MonkeyPatch, stage: str, steps: int
) -> None:
    uninterrupted = make_config(steps=steps, output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config(steps=steps)
    if stage == "the teacher's answers":
        with pytest.raises(KeyboardInterrupt):
            compress(config, recording_reporter("Teacher's answers", 4))
    else:

        def delete_rows(folder: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "delete_rows", delete_rows)
            with pytest.raises(KeyboardInterrupt):
                compress(config)
        assert row_files(config.output)
    compress(config)
    assert_same_run(config.output, uninterrupted.output)


def test_a_run_that_is_interrupted_during_training_is_not_matched_again(
    make_config: Make, tmp_path: Path, recording_reporter: Any
) -> None:
    uninterrupted = make_config(output=tmp_path / "uninterrupted")
    compress(uninterrupted)
    config = make_config()
    with pytest.raises(Interrupted, match="Stopped at step 3 of 5; saved in"):
        compress(config, recording_reporter("Training", 3))
    reporter = recording_reporter()
    figures = compress(config, reporter)
    assert "Matching" not in reporter.done
    assert figures["stages"]["matching"] > 0
    assert_same_run(config.output, uninterrupted.output)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_line_of_the_metrics_that_a_crash_cut_off_is_dropped(
    make_config: Make, recording_reporter: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "save_curves", save_curves)
    config = make_config(steps=steps)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Matching", 6))
    (config.output / "metrics.jsonl").write_text('{"stage": "mat')
    compress(config)
    assert len(records(config.output)) == 10 + steps


# What is another run, and what is refused


@pytest.mark.parametrize(
    "options", [{"matching_rows": 70}, {"matching_steps": 9}, {"init": "strided", "learning_rate": 5e-3}], ids=str
)
def test_another_way_of_matching_is_another_run(
    make_config: Make, recording_reporter: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(Interrupted):
        compress(make_config(), recording_reporter("Matching", 6))
    with pytest.raises(SoftPromptError, match=f"holds another run, which differs in {next(iter(options))};"):
        compress(make_config(**options))


def test_an_embedding_prompt_is_not_matched(make_config: Make) -> None:
    assert make_config(kind="embedding").init == "strided"
    with pytest.raises(ValueError, match="init: got matched with kind=embedding, accepted are strided, first"):
        make_config(kind="embedding", init="matched")


def test_frequencies_that_depend_on_the_length_are_refused_before_any_work(
    make_config: Make, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.setattr(module, "capture_context", None)
        with pytest.raises(SoftPromptError, match="depend on the length"):
            compress(make_config(model=str(folder)))
    assert not make_config().output.exists()
    figures = compress(make_config(model=str(folder), init="first", steps=1))
    assert figures["start"] == "truncated"


def test_rows_of_which_some_are_not_finite_are_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read = teaching.read_rows

    class Broken(Rows):
        def layer(self, index: int, device: torch.device) -> Any:
            found = super().layer(index, device)
            return replace(found, query=torch.full_like(found.query, torch.nan))

    def broken(folder: Path, key: str) -> Any:
        rows = read(folder, key)
        return None if rows is None else Broken(*(getattr(rows, field.name) for field in fields(rows)))

    monkeypatch.setattr(teaching, "read_rows", broken)
    config = make_config()
    with pytest.raises(SoftPromptError, match=r"model: the queries of a layer's attention .* are not finite"):
        compress(config)
    assert not (config.output / "prompt").exists()
