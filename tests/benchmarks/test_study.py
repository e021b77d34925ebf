"""The study: its plan, its stored results, its tables, and cells of a tiny model. Nothing here needs kvpress."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.errors import SoftPromptError

pytest.importorskip("psutil")

CONTEXT = "Mira Vale keeps the blue mill. It grinds 40 sacks a day. The river Osk turns it. Visitors pay 3 crowns."
HELDOUT = ("Who keeps it?", "What turns it?", "How many sacks?", "What do visitors pay?", "Which colour?")
TEST = ("Who is the miller?", "What is the river called?")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def write_questions(file: Path, questions: tuple[str, ...]) -> Path:
    file.write_text("".join(json.dumps({"input": question}) + "\n" for question in questions))
    return file


@pytest.fixture
def text(tmp_path: Path) -> Any:
    from benchmarks.study.corpus import Text

    (tmp_path / "mill.txt").write_text(CONTEXT)
    heldout = write_questions(tmp_path / "mill.heldout.jsonl", HELDOUT)
    test = write_questions(tmp_path / "mill.test.jsonl", TEST)
    return Text("mill", tmp_path / "mill.txt", heldout, test, selfstudy=6, short=True)


@pytest.fixture
def study(tiny_model_folder: Path, tmp_path: Path) -> Any:
    from benchmarks.study.teacher import Study

    return Study(str(tiny_model_folder), tmp_path / "work", SilentReporter())


@pytest.fixture
def results(tmp_path: Path) -> Any:
    from benchmarks.study.results import Results

    return Results(tmp_path / "results")


@pytest.fixture
def make_cells(text: Any) -> Callable[..., list[Any]]:
    """`make_cells(["strided"], ratios=[4])`: cells of the text, one seed."""
    from benchmarks.study.cells import grid
    from benchmarks.study.methods import chosen_methods

    def make(methods: list[str], ratios: tuple[int, ...] = (4, 8), seeds: tuple[int, ...] = (0,)) -> list[Any]:
        return grid([text], chosen_methods(methods), ratios, seeds, everything=True)

    return make


def record(method: str, ratio: int, seed: int, recovered: float, test: float | None = None, **more: Any) -> Any:
    return {
        "text": "demo",
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "digest": "0" * 12,
        "context_tokens": 701,
        "prompt_tokens": 701 // ratio,
        "heldout": {"recovered": recovered},
        "test": None if test is None else {"recovered": test},
        "seconds": {"context": 2.0, "training": 8.0},
        "wall": 20.0,
        **more,
    }


# The plan


def test_plan_has_untrained_methods_everywhere_and_trained_ones_where_it_says() -> None:
    from benchmarks.study.cells import RATIOS, SEEDS, TRAINED_RATIOS, TRAINED_TEXTS, grid
    from benchmarks.study.corpus import all_texts

    texts = [replace(all_texts()["demo"], name=name) for name in (*TRAINED_TEXTS, "other")]
    cells = grid(texts)
    assert len({cell.name for cell in cells}) == len(cells)
    counts = {name: sum(cell.method.name == name for cell in cells) for name in ("matched", "kvzip", "today")}
    everywhere = len(texts) * len(RATIOS) * len(SEEDS)
    trained = len(TRAINED_TEXTS) * len(TRAINED_RATIOS) * len(SEEDS)
    assert counts == {"matched": everywhere, "kvzip": everywhere, "today": trained}
    assert len(grid(texts, everything=True)) > len(cells)


def test_cheap_cells_and_the_first_seed_come_first(make_cells: Callable[..., list[Any]]) -> None:
    cells = make_cells(["today", "matched", "strided"], ratios=(8,), seeds=(0, 1))
    order = [(cell.method.name, cell.seed) for cell in cells]
    assert order == [("strided", 0), ("matched", 0), ("strided", 1), ("matched", 1), ("today", 0), ("today", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "mached"], r"method: got 'mached', accepted are truncated, .*matched"),
        (["--text", "novel"], r"text: got 'novel', accepted are demo, license"),
        (["--ratio", "1"], r"ratio: got 1, accepted is 2 or more"),
        (["--seed", "-1"], r"seed: got -1, accepted is 0 or more"),
        (["--minutes", "0"], r"minutes: got 0, accepted is above 0"),
        (["tables"], r"what: got 'tables', accepted are run, table and plot"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from benchmarks.study.__main__ import main

    assert main([*arguments, "--results", str(tmp_path / "none"), "--work", str(tmp_path / "none")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


def test_text_without_its_questions_is_named(monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    from benchmarks.study import corpus

    text.heldout.unlink()
    monkeypatch.setattr(corpus, "all_texts", lambda: {"mill": text})
    with pytest.raises(SoftPromptError, match=r"text: mill: .*mill\.heldout\.jsonl is missing"):
        corpus.chosen_texts(["mill"])


# Results


def test_results_are_sorted_and_a_cell_of_the_same_ratio_and_seed_is_replaced(results: Any) -> None:
    for ratio, seed, recovered in ((8, 1, 0.5), (8, 0, 0.4), (4, 0, 0.6), (8, 1, 0.7)):
        results.put(record("strided", ratio, seed, recovered))
    cells = results.cells("demo", "strided")
    assert [(cell["ratio"], cell["seed"], cell["heldout"]["recovered"]) for cell in cells] == [
        (4, 0, 0.6),
        (8, 0, 0.4),
        (8, 1, 0.7),
    ]
    assert results.find("demo", "strided", 8, 1)["heldout"]["recovered"] == 0.7
    assert results.find("demo", "strided", 8, 2) is None and results.find("demo", "matched", 8, 1) is None


@pytest.mark.parametrize("content", ["[{", "{}", "[1]", '[{"ratio": 8}]', "null"])
def test_damaged_file_is_named_and_not_overwritten(results: Any, content: str) -> None:
    results.put(record("strided", 8, 0, 0.5))
    path = results.path("demo", "strided")
    path.write_text(content)
    for use in (lambda: results.put(record("strided", 4, 0, 0.5)), lambda: list(results.all())):
        with pytest.raises(
            SoftPromptError, match=r"strided\.json cannot be read .*; restore it with git, or delete it"
        ):
            use()
    assert path.read_text() == content


class Measured:
    """Measures no model: counts the cells, and fails at the cells that it is told to."""

    def __init__(self, failures: dict[str, BaseException] | None = None, wall: float = 20.0) -> None:
        self.names: list[str] = []
        self.failures, self.wall, self.now = failures or {}, wall, 0.0

    def __call__(self, study: Any, cell: Any) -> Any:
        from benchmarks.study.cells import digest, settings

        if error := self.failures.get(cell.name):
            raise error
        self.names.append(cell.name)
        self.now += self.wall
        key = digest(settings(cell, study.name))
        return record(cell.method.name, cell.ratio, cell.seed, 0.5, text=cell.text.name, digest=key, wall=self.wall)

    def clock(self) -> float:
        return self.now


def quiet(line: str) -> None:
    pass


def test_stopped_study_goes_on_with_the_missing_cells(make_cells: Any, results: Any) -> None:
    from benchmarks.study.measure import measure_all

    cells, study = make_cells(["truncated", "strided"]), SimpleNamespace(name="model")
    first = Measured({cells[2].name: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        measure_all(study, cells, results, measure=first, say=quiet)
    assert first.names == [cell.name for cell in cells[:2]]
    second = Measured()
    assert measure_all(study, cells, results, measure=second, say=quiet) == {}
    assert second.names == [cell.name for cell in cells[2:]]
    third = Measured()
    measure_all(study, cells, results, measure=third, say=quiet)
    assert third.names == []


def test_cell_is_measured_again_when_its_settings_change(make_cells: Any, results: Any, text: Any) -> None:
    from benchmarks.study.measure import measure_all

    study = SimpleNamespace(name="model")
    measure_all(study, make_cells(["strided"]), results, measure=Measured(), say=quiet)
    write_questions(text.test, (*TEST, "Is there a bridge?"))
    again = Measured()
    measure_all(study, make_cells(["strided"]), results, measure=again, say=quiet)
    assert again.names == ["mill strided-4x-s0", "mill strided-8x-s0"]
    assert len(results.cells("mill", "strided")) == 2


def test_changed_method_changes_the_digest_of_its_cells_alone(make_cells: Any) -> None:
    from benchmarks.study.cells import digest, settings

    strided, matched = make_cells(["strided", "matched"], ratios=(8,))
    defaults = {"init": "matched", "steps": 0}
    for changes, same in (({}, True), ({"matching_rows": 7}, False), ({"learning_rate": 1.0}, False)):
        other = replace(matched, method=replace(matched.method, settings=lambda _, c=changes: defaults | c))
        assert (digest(settings(other, "model")) == digest(settings(matched, "model"))) == same
    assert digest(settings(strided, "model")) == digest(settings(replace(strided), "model"))


def test_cell_that_cannot_run_is_left_out_with_its_reason(make_cells: Any, results: Any) -> None:
    from benchmarks.study.measure import measure_all

    cells = make_cells(["truncated", "strided"], ratios=(8,))
    measured = Measured({cells[0].name: SoftPromptError("method: kvpress is not installed")})
    left_out = measure_all(SimpleNamespace(name="model"), cells, results, measure=measured, say=quiet)
    assert left_out == {cells[0].name: "method: kvpress is not installed"}
    assert measured.names == [cells[1].name]


def test_budget_starts_no_cell_that_is_unlikely_to_end_in_it(make_cells: Any, results: Any) -> None:
    from benchmarks.study.measure import measure_all

    study, measured = SimpleNamespace(name="model"), Measured(wall=10.0)
    results.put(record("today", 4, 9, 0.5, text="mill", wall=500.0))
    cells = [*make_cells(["today"], ratios=(8,)), *make_cells(["strided"], ratios=(4, 8, 16))]
    left_out = measure_all(study, cells, results, seconds=60, measure=measured, clock=measured.clock, say=quiet)
    assert measured.names == [cell.name for cell in cells[1:]]
    assert list(left_out) == [cells[0].name] and "about 500 s" in left_out[cells[0].name]


# Tables and plot


def test_table_has_means_spread_test_figures_and_seconds(results: Any) -> None:
    from benchmarks.study.table import markdown

    for seed, recovered in enumerate((0.5, 0.6, 0.7)):
        results.put(record("matched", 8, seed, recovered, test=0.5))
    results.put(record("truncated", 8, 0, -0.25))
    results.put(record("truncated", 32, 0, 1.5))
    assert markdown(results).splitlines() == [
        "| demo, 701 tokens | 8× (87) | 32× (21) | seconds at 8× |",
        "| --- | --- | --- | --- |",
        "| truncated text | -.250 | 1.50 | 10 |",
        "| matched | .600 ±.100 / .500 |  | 10 |",
    ]
    assert markdown(results, test=False).splitlines()[-1] == "| matched | .600 ±.100 |  | 10 |"


def test_page_gets_the_tables_between_its_markers(results: Any, tmp_path: Path) -> None:
    from benchmarks.study.__main__ import main
    from benchmarks.study.table import BEGIN, END, NOTHING

    page, readme, plot = tmp_path / "page.md", tmp_path / "README.md", tmp_path / "study.svg"
    for path in (page, readme):
        path.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    options = ["table", "plot", "--results", str(results.folder), "--plot", str(plot)]
    options += ["--page", str(page), "--readme", str(readme)]
    assert main(options) == 0
    assert page.read_text() == f"before\n\n{BEGIN}\n\n{NOTHING}\n\n{END}\n\nafter\n" and not plot.exists()
    results.put(record("matched", 8, 0, 0.9))
    results.put(record("truncated", 4, 0, 0.4))
    assert main(options) == 0
    assert "| matched | " in page.read_text() and "](study.svg)" in page.read_text()
    drawn = plot.read_bytes()
    assert b"<svg" in drawn
    assert main(options) == 0
    assert plot.read_bytes() == drawn


def test_committed_pages_show_the_committed_results() -> None:
    from benchmarks.study.results import Results
    from benchmarks.study.table import BEGIN, END, PAGE, README, README_TEXT, content, markdown

    results = Results()
    for page, expected in ((PAGE, content(results)), (README, markdown(results, texts=[README_TEXT]))):
        shown = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
        assert shown == expected, "run python -m benchmarks.study plot table"


# Cells of a tiny model


def test_untrained_cells_are_measured_on_both_sets(study: Any, make_cells: Any) -> None:
    from benchmarks.study.measure import measure_cell

    truncated, strided = (measure_cell(study, cell) for cell in make_cells(["truncated", "strided"], ratios=(4,)))
    for found in (truncated, strided):
        assert found["prompt_tokens"] == found["context_tokens"] // 4
        assert found["heldout"]["tokens"] > 0 and found["test"]["tokens"] > 0
        assert found["heldout"]["kl_none"] == truncated["heldout"]["kl_none"]
        assert found["machine"]["threads"] == torch.get_num_threads() and found["versions"]["transformers"]
        assert "answers" not in found["seconds"]
        json.dumps(found, allow_nan=False)
    assert truncated["wall"] > sum(truncated["seconds"].values())  # strided shares the capture of the text
    assert truncated["heldout"]["kl"] != strided["heldout"]["kl"]
    assert not (study.teacher(make_cells(["strided"])[0].text, 0).folder / "train.json").exists()


def test_runs_share_the_answers_of_their_text_and_seed(
    study: Any, make_cells: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run neither asks the teacher, nor changes what it left, nor leaves its folder behind."""
    from benchmarks.study import measure

    teacher = study.teacher(make_cells(["today"])[0].text, 0)
    folder, seconds = teacher.taught
    assert seconds > 0
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    monkeypatch.setattr("softprompt_kernels.compress.teaching.answer", None)
    monkeypatch.setattr("softprompt_kernels.compress.teaching.watch", None)
    monkeypatch.setattr("softprompt_kernels.compress.run.save_curves", lambda *_: None)
    stages = {"closed_form": "matching", "matched_distilled": "matching training"}
    for cell in make_cells(["closed_form", "matched_distilled", "today", "next_token"], ratios=(4,)):
        short = cell.method.settings(cell.text)
        short |= {"steps": min(2, short["steps"])} | ({"matching_steps": 2} if cell.method.trained else {})
        found = measure.measure_cell(study, replace(cell, method=replace(cell.method, settings=lambda _, s=short: s)))
        assert found["steps"] == short["steps"]
        assert found["seconds"]["answers"] == teacher.taught[1]
        timed = stages.get(cell.method.name, "training").split()
        assert set(timed) <= set(found["seconds"]) <= {"context", "answers", "matching", "training"}
    assert before == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert sorted(path.name for path in teacher.folder.iterdir()) == [
        *("heldout.json", "taught", "test.json", "train.jsonl", "watched.jsonl"),
    ]


def test_training_queries_are_neither_held_out_nor_in_the_test_set(study: Any, text: Any, tmp_path: Path) -> None:
    from softprompt_kernels.compress.sources.queries import load_queries

    queries = write_questions(tmp_path / "train.jsonl", ("Who keeps it?", "Who is the miller?", "Is it old?"))
    text = replace(text, queries=queries, selfstudy=2, samples=2)
    teacher = study.teacher(text, 0)
    config = teacher.run_config(tmp_path / "run", {"tokens": 2})
    asked = [query.input for query in load_queries(config.queries)]
    assert len(asked) == 2 * len(set(asked)) and "Is it old?" in asked
    assert not set(asked) & {*HELDOUT, *TEST}


def test_stored_answers_are_used_again_and_damaged_ones_are_made_again(study: Any, text: Any) -> None:
    from benchmarks.study.teacher import Study

    first = study.teacher(text, 0)
    examples = first.answers("heldout").examples
    other = Study(study.name, study.work, SilentReporter()).teacher(text, 0)
    assert other.answers("heldout").seconds == first.answers("heldout").seconds
    (first.folder / "heldout.json").write_text("{")
    assert Study(study.name, study.work, SilentReporter()).teacher(text, 0).answers("heldout").examples == examples


def test_prompt_is_never_longer_than_its_ratio_allows() -> None:
    from benchmarks.study.teacher import prompt_tokens

    assert [prompt_tokens(701, ratio) for ratio in (4, 8, 16, 32)] == [175, 87, 43, 21]
    with pytest.raises(SoftPromptError, match="ratio: got 8 for a text of 7 tokens"):
        prompt_tokens(7, 8)


# Presses


class KeptPress:
    """A press that keeps the tokens of `kept`, `[1, Hkv, k]` for each layer."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept, self.prefix_length = kept, 0

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        yield


def test_pressed_prefix_gives_the_scores_that_it_has_in_the_context(study: Any, text: Any) -> None:
    """Kept at strided positions in every head, and moved, it equals the strided prompt."""
    from transformers import AutoModelForCausalLM

    from benchmarks.study.press import compressed
    from softprompt_kernels.compress.teacher.context import select_tokens
    from softprompt_kernels.models import shift_keys
    from softprompt_kernels.prompts import Prefix
    from softprompt_kernels.prompts.initialise import strided_indices

    captured, k = study.captured(text), 9
    expected = select_tokens(study.model, captured.prefix, k, "strided")
    plain = AutoModelForCausalLM.from_pretrained(study.name).eval()
    index = strided_indices(captured.ids.shape[1], k).flip(0)[None, None].expand(1, 2, -1)
    press = KeptPress([index] * plain.config.num_hidden_layers)
    found = shift_keys(study.model, Prefix.of(compressed(plain, press, captured.ids, 5)), k - captured.ids.shape[1])
    assert press.prefix_length == 5
    for (key, value), (expected_key, expected_value) in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(key.flip(2), expected_key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(value.flip(2), expected_value, atol=1e-5, rtol=1e-4)


def test_press_is_asked_for_exactly_k_tokens_and_a_window_that_leaves_a_choice() -> None:
    from benchmarks.study.press import make_press

    fake = SimpleNamespace(SnapKVPress=lambda **options: options)
    for tokens in (701, 5662, 5799):
        for ratio in (4, 8, 16, 32):
            k = tokens // ratio
            options = make_press(fake, {"press": "SnapKVPress", "window_size": 64}, tokens, k)
            assert int(tokens * (1 - options["compression_ratio"])) == k
            assert options["window_size"] == min(64, k // 2)


def test_kvzip_keeps_the_best_scores_of_each_head_and_the_sink() -> None:
    from benchmarks.study.press import make_press

    class KVzipPress:
        n_sink = 1

        def __init__(self, compression_ratio: float) -> None:
            self.score_val = torch.tensor([[[[0.0, 0.2, 0.9, 0.5], [0.0, 0.8, 0.1, 0.3]]]])

    press = make_press(SimpleNamespace(KVzipPress=KVzipPress), {"press": "KVzipPress", "heads": "same"}, 4, 2)
    press.compress_post(None)
    assert press.kept[0].tolist() == [[[0, 2], [0, 1]]]


def test_press_fails_with_one_sentence(study: Any, text: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.study import press

    settings = {"press": "SnapKVPress"}
    arguments = (study.model, study.name, study.captured(text).ids, 5, 9, settings, tmp_path / "press")
    monkeypatch.setattr(press, "missing", lambda: "kvpress is not installed")
    with pytest.raises(SoftPromptError, match="method: kvpress is not installed"):
        press.press_prefix(*arguments)
    monkeypatch.setattr(press, "missing", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'cache_position'\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SoftPromptError, match="method: SnapKVPress fails: KeyError: 'cache_position'"):
        press.press_prefix(*arguments)


# PEFT


def test_next_token_loss_and_its_gradient_are_those_of_peft(study: Any, text: Any) -> None:
    """PEFT's prefix tuning, with labels on the answers alone, from the same prompt and on the same batch."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from softprompt_kernels.compress.distill.objective import Objective
    from softprompt_kernels.compress.distill.trainer import Schedule, Trainer
    from softprompt_kernels.compress.teacher.context import select_tokens
    from softprompt_kernels.models import head_of
    from softprompt_kernels.prompts import KVPrompt
    from softprompt_kernels.prompts.layout import flatten

    examples = study.teacher(text, 0).answers("heldout").examples[:3]
    prompt = KVPrompt.from_prefix(select_tokens(study.model, study.captured(text).prefix, 7, "first"), frozen_tokens=0)
    objective = Objective("nll", head_of(study.model))
    trainer = Trainer(study.model, prompt, examples, None, objective, Schedule(1, 0.0), batch_size=3)
    loss = trainer.accumulate(range(3))

    plain = AutoModelForCausalLM.from_pretrained(study.name)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.length)
    theirs = peft.get_peft_model(plain, config).eval()
    (parameter,) = (p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.copy_(flatten(*prompt.stacked()))
    width = max(len(example.input_ids) + len(example.output_ids) for example in examples)
    ids = torch.zeros(3, width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        asked, length = len(example.input_ids), len(example.input_ids) + len(example.output_ids)
        ids[row, :length] = torch.tensor(example.input_ids + example.output_ids)
        labels[row, asked:length] = ids[row, asked:length]
        mask[row, :length] = 1
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    ours = flatten(prompt.key.grad, prompt.value.grad)
    torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-4)
