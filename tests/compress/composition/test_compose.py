"""Compositions of two runs: what they measure, write and leave alone, and how they resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from softprompt_kernels.cli import app
from softprompt_kernels.compress import Interrupted, SilentReporter, compose, diagnose_run
from softprompt_kernels.compress.composition.documents import SEPARATOR
from softprompt_kernels.compress.composition.settings import composition_of
from softprompt_kernels.compress.composition.teaching import check_queries, joined, teach, unclear_queries
from softprompt_kernels.compress.composition.work import check_joined_window, prepare
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.report.html.run_data import read_run
from softprompt_kernels.compress.saved_prompt import made_from_another
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.ops import teacher_moments
from softprompt_kernels.prompts import load
from tests.compress.composition.conftest import QUESTIONS, TEXTS, make_run

Runs = dict[str, Path]
SHORT: dict[str, Any] = {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "device": "cpu"}


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures_of(run: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return figures


@pytest.fixture(scope="module")
def composed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a composition of both runs, which no test may change."""
    folder = tmp_path_factory.mktemp("composed") / "both"
    before = {name: files_in(run) for name, run in runs.items()}
    compose(list(runs.values()), folder, **SHORT)
    assert {name: files_in(run) for name, run in runs.items()} == before, "the runs are not changed"
    return folder


def test_a_composition_measures_each_text(runs: Runs, composed: Path) -> None:
    figures = figures_of(composed)
    assert figures["prompt_tokens"] == 6 + 6 - 1, "the second prompt has lost its sink"
    assert figures["left_out"] == 2 * 2, "each text was asked for its hue twice in training"
    for one, (name, run) in zip(figures["documents"], runs.items(), strict=True):
        alone = figures_of(run)["heldout"]
        assert one["name"] == f"{name}/run"
        assert one["heldout"]["kl_none"] == pytest.approx(alone["kl_none"], rel=1e-5)
        assert one["heldout"]["kl_alone"] == pytest.approx(alone["kl_prompt"], rel=1e-5)
        assert len({round(one["heldout"][f"kl_{key}"], 9) for key in ("naive", "joined", "prompt", "all")}) == 4
    for key in ("alone", "naive", "joined", "prompt", "all"):
        of_both = [one["heldout"][f"recovered_{key}"] for one in figures["documents"]]
        assert figures["mean"]["heldout"][key] == pytest.approx(sum(of_both) / 2)
    mill, tower = figures["documents"]
    assert "test" not in tower
    assert figures["mean"]["test"]["prompt"] == mill["test"]["recovered_prompt"] == figures["test"]["recovered"]
    assert compose(list(runs.values()), composed, **SHORT) == figures, "a finished one is shown again"
    answers = (composed / "answers.md").read_text()
    assert all(question in answers for questions in QUESTIONS.values() for question in questions[:2])


def test_each_query_is_taught_by_the_model_behind_its_own_text_alone(runs: Runs, tmp_path: Path) -> None:
    work = prepare(composition_of(list(runs.values()), tmp_path / "out", {"device": "cpu"}))
    model, objective = work.inputs.model, work.inputs.objective
    contexts = [capture_context(model, document.inputs.context_ids) for document in work.documents]
    parts = [
        teach(document, objective, 1, RunFolder(tmp_path / name), context, work.unclear, SilentReporter())
        for document, name, context in zip(work.documents, runs, contexts, strict=True)
    ]
    taught, number = joined(parts), 0
    assert taught.targets is not None
    for part, context in zip(parts, contexts, strict=True):
        for example, hidden in zip(
            part.examples["train"],
            hidden_states(model, context, part.examples["train"], SilentReporter(), ""),
            strict=True,
        ):
            assert taught.examples["train"][number] == example
            expected = teacher_moments(hidden, objective.head.weight)
            torch.testing.assert_close(taught.targets.moments([number], model.device).mean, expected.mean)
            number += 1
    assert number == len(work.inputs.train) == 8


def test_an_interrupted_composition_ends_with_the_same_bits(
    runs: Runs, composed: Path, tmp_path: Path, recording_reporter: type[Any]
) -> None:
    with pytest.raises(Interrupted):
        compose(list(runs.values()), tmp_path / "broken", reporter=recording_reporter("Training", 2), **SHORT)
    with pytest.raises(SoftPromptError, match="holds another run, which differs in steps"):
        compose(list(runs.values()), tmp_path / "broken", **SHORT | {"steps": 4})
    reporter = recording_reporter()
    compose(list(runs.values()), tmp_path / "broken", reporter=reporter, **SHORT)
    assert "Resuming from step 2." in reporter.messages
    one, other = (folder / "prompt" / "adapter_model.safetensors" for folder in (composed, tmp_path / "broken"))
    assert one.read_bytes() == other.read_bytes()


def test_a_composition_without_training_is_the_joined_prompts(
    runs: Runs, tmp_path: Path, loaded: tuple[Any, Any]
) -> None:
    order = [runs["tower"], runs["mill"] / "prompt"]
    figures = compose(order, tmp_path / "both", steps=0, device="cpu")
    heldout = [one["heldout"] for one in figures["documents"]]
    assert [one["kl_prompt"] for one in heldout] == [one["kl_joined"] for one in heldout]
    model, tokenizer = loaded
    both, tower = (load(folder, model, tokenizer)[0] for folder in (tmp_path / "both" / "prompt", order[0] / "prompt"))
    start = prefix_of(model, both).slice(0, 6)
    for pair, wanted in zip(start.layers, prefix_of(model, tower).layers, strict=True):
        assert all(torch.equal(tensor, other) for tensor, other in zip(pair, wanted, strict=True))


def test_the_record_names_each_text_of_a_composition(composed: Path) -> None:
    record = json.loads((composed / "prompt" / "softprompt.json").read_text())
    assert [one["prompt_tokens"] for one in record["context"]["contexts"]] == [6, 5]
    texts = (*TEXTS.values(), SEPARATOR.join(TEXTS.values()), "Another text.")
    assert [made_from_another(record, text) for text in texts] == [False, False, False, True]


def test_a_composition_is_no_run_of_compress(composed: Path, runs: Runs) -> None:
    for call, message in (
        (lambda: compose([composed, runs["mill"]], composed / "out"), "name the runs that it was made of"),
        (lambda: diagnose_run(composed), "diagnose the runs that it was made of"),
        (lambda: read_run(composed), "has no report"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            call()


def test_the_command_shows_the_table_and_a_dry_run_writes_nothing(runs: Runs, tmp_path: Path) -> None:
    command = ["compose", *map(str, runs.values()), "--output", str(tmp_path / "both"), "--steps", "1"]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "11 tokens" in dry.stdout
    assert "4 that do not say which text they mean are left out" in dry.stdout
    assert not (tmp_path / "both").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[1].split("  ")[0] == "recovered, held-out"
    assert [line.split()[0] for line in lines[3:6]] == ["mill/run", "tower/run", "mean"]
    assert len(lines[5].split()) == 6


def test_embedding_prompts_are_composed_too(tiny_model_folder: Path, tmp_path: Path, no_plot: None) -> None:
    given = [make_run(name, tiny_model_folder, tmp_path / name, kind="embedding", init="strided") for name in TEXTS]
    figures = compose(given, tmp_path / "both", **SHORT | {"steps": 1})
    assert figures["prompt_tokens"] == 12
    assert "naive" not in figures["mean"]["heldout"], "vectors have no positions to leave as they are"


# --- refused ----------------------------------------------------------------------------------------------------------


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(run, folder))


def test_runs_that_do_not_fit_together_are_refused(runs: Runs, tmp_path: Path) -> None:
    mill, tower = runs.values()
    (tmp_path / "lone").mkdir()
    lone = Path(shutil.copytree(mill / "prompt", tmp_path / "lone" / "prompt"))
    no_record = copied(mill, tmp_path / "no_record")
    (no_record / "prompt" / "softprompt.json").unlink()
    unfinished = copied(mill, tmp_path / "unfinished")
    (unfinished / "evaluation.json").unlink()
    other_model = copied(mill, tmp_path / "other_model")
    change(other_model / "prompt" / "softprompt.json", lambda record: record["model"].update(layers=7, rope=None))
    other_tokenizer = copied(mill, tmp_path / "other_tokenizer")
    change(other_tokenizer / "prompt" / "softprompt.json", lambda record: record["tokenizer"].update(splitting="x"))
    other_kind = copied(mill, tmp_path / "other_kind")
    change(other_kind / "prompt" / "adapter_config.json", lambda adapter: adapter.update(peft_type="PROMPT_TUNING"))
    other_dtype = copied(mill, tmp_path / "other_dtype")
    config = other_dtype / "config.yaml"
    config.write_text(config.read_text().replace("dtype: auto", "dtype: bfloat16"))
    in_segments = copied(mill, tmp_path / "in_segments")
    config = in_segments / "config.yaml"
    config.write_text(config.read_text().replace("segment_tokens: null", "segment_tokens: 40"))
    other_text = copied(mill, tmp_path / "other_text")
    text = tmp_path / "other.txt"
    text.write_text("Another text that is long enough for a prompt of six tokens.")
    config = other_text / "config.yaml"
    config.write_text(config.read_text().replace(str(mill.parent / "text.txt"), str(text)))
    for given, message in (
        ([mill], "got 1, accepted are two or more"),
        ([mill, mill], "twice"),
        ([mill, mill / "prompt"], "twice"),
        ([mill, tmp_path / "nothing"], "holds no run"),
        ([mill, lone], "a prompt without its run"),
        ([tower, no_record], "has no softprompt.json"),
        ([tower, unfinished], "is not finished"),
        ([tower, other_model], r"another model \(.*layers"),
        ([tower, other_tokenizer], r"another tokenizer \("),
        ([tower, other_kind], "kind embedding against kv"),
        ([tower, other_dtype], "dtype bfloat16 against auto"),
        ([tower, in_segments], "compressed a text in segments"),
        ([tower, other_text], "was made with another context"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            compose(given, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_joined_prompt_beyond_the_window_is_refused(runs: Runs, tmp_path: Path) -> None:
    work = prepare(composition_of(list(runs.values()), tmp_path / "out", {"device": "cpu"}))
    assert work.fits_whole
    with pytest.raises(
        SoftPromptError, match="the joined prompt has 500 tokens, too many for the model's window of 512"
    ):
        check_joined_window(work.inputs, 500)


def test_a_run_without_a_query_that_names_its_text_is_refused(runs: Runs, tmp_path: Path) -> None:
    documents = prepare(composition_of(list(runs.values()), tmp_path / "out", {"device": "cpu"})).documents
    with pytest.raises(SoftPromptError, match="no held-out query that says which document it means"):
        check_queries(documents, unclear_queries(documents) | set(QUESTIONS["tower"][:2]))


def test_options_out_of_range_are_refused(runs: Runs, tmp_path: Path) -> None:
    for options, message in (({"steps": -1}, "steps: got -1"), ({"rounds": 2}, "rounds: unknown, accepted are steps")):
        with pytest.raises(SoftPromptError, match=message):
            compose(list(runs.values()), tmp_path / "out", **options)


def change(file: Path, edit: Any) -> None:
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))
