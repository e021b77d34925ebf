"""`softprompt evaluate --suite`: from a seed or a file to the accuracy, and what is refused before that."""

import json

import pytest

from softprompt_kernels.compress.sources.queries import load_queries

LENGTH = ["--length", 300, "--needles", 4, "--new-tokens", 5]
FAST = ["--tokens", 16, "--steps", 0, "--matching-steps", 4, "--selfstudy", 6]
LONGHEALTH = {
    "patient_01": {
        "texts": {"text_0": "Three visits were made."},
        "questions": [
            {"question": f"{what}?", "correct": "3", **{f"answer_{letter}": str(n) for n, letter in enumerate("abcde")}}
            for what in ("How many visits", "How many nurses")
        ],
    }
}


@pytest.fixture
def longhealth(tmp_path):
    path = tmp_path / "benchmark_v5.json"
    path.write_text(json.dumps(LONGHEALTH))
    return path


def test_a_suite_is_compressed_and_judged_and_the_same_command_shows_it_again(run, inputs, tmp_path):
    folder = tmp_path / "suite"
    command = ["evaluate", "--model", inputs.model, "--suite", "needle", *LENGTH, *FAST, "--output", folder]
    result = run(*command, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "context.txt", "figures.json", "run", "suite.json", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    figures = json.loads((folder / "figures.json").read_text())
    assert figures == json.loads((tmp_path / "e.json").read_text())
    assert set(figures) >= {"context_tokens", "queries", "answers", "forgetting", "suite"}
    assert figures["context_tokens"] <= 300 and figures["prompt_tokens"] == 16
    assert set(figures["answers"]["accuracy"]["contains"]) == {"full", "none", "truncated", "prompt"}
    suite = figures["suite"]
    assert (suite["train_questions"], suite["test_questions"], suite["seed"]) == (2, 2, 0)
    tested = {query.input for query in load_queries(folder / "test.jsonl")}
    lines = [json.loads(line) for line in (folder / "run" / "queries.jsonl").read_text().splitlines()]
    assert {line["input"] for line in lines if line["split"] == "test"} == tested
    others = {line["input"] for line in lines if line["split"] != "test"}
    assert not tested & others and {query.input for query in load_queries(folder / "train.jsonl")} < others
    assert "Suite needle: " in result.stdout and "right (contains)" in result.stdout
    again = run(*command)
    assert again.exit_code == 0 and "already finished" in again.stderr and again.stdout == result.stdout
    other = run(*command, "--seed", 1)
    assert other.exit_code == 2 and "holds another suite, which differs in context.txt" in other.stderr


def test_without_self_study_no_training_query_names_a_tested_fact(run, inputs, tmp_path):
    (tmp_path / "config.yaml").write_text("tokens: 8\nselfstudy: 0\nsteps: 0\nmatching_steps: 0\nheldout: no.jsonl\n")
    command = ["evaluate", "--model", inputs.model, "--suite", "pairs", *LENGTH, "--config", tmp_path / "config.yaml"]
    result = run(*command, "--output", tmp_path / "suite")
    assert result.exit_code == 0, result.output
    suite = json.loads((tmp_path / "suite" / "figures.json").read_text())["suite"]
    assert suite["named_in_training"] == 0
    assert "accuracy_named" not in suite and set(suite["accuracy_not_named"]) >= {"full", "prompt"}
    assert "name the facts of 0 of the tested ones" in result.stdout


def test_a_suite_can_be_written_alone(run, inputs, tmp_path):
    command = ["evaluate", "--model", inputs.model, "--suite", "variables", *LENGTH, "--write", tmp_path / "suite"]
    result = run(*command, "--length", 400)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "suite").iterdir()) == [
        "context.txt", "suite.json", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    assert all(len(query.references) == 4 for query in load_queries(tmp_path / "suite" / "test.jsonl"))
    assert run(*command, "--length", 400).exit_code == 0


def test_a_file_of_a_benchmark(run, inputs, longhealth, tmp_path):
    command = ["evaluate", "--model", inputs.model, "--suite", "longhealth", "--file", longhealth, "--new-tokens", 5]
    result = run(*command, *FAST, "--output", tmp_path / "suite")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "suite" / "figures.json").read_text())
    assert figures["suite"]["items"] == "patient_01" and set(figures["answers"]["accuracy"]) == {"choice"}
    assert figures["answers"]["answers"][0]["references"] == ["D", "3"]
    assert not (tmp_path / "suite" / "train.jsonl").exists()
    assert "None of them was asked in training." in result.stdout


NEEDLE = ("--suite", "needle")
OUT = ("--output", "out")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("--suite", "needles", *OUT),
            "suite: got 'needles', accepted are needle, multikey, multivalue, variables, pairs,",
        ),
        ((*NEEDLE, "--queries", "q", *OUT), "--queries: given, but accepted is one of it and --suite needle"),
        ((*NEEDLE, "--context", "c", *OUT), "--context: given, but --suite needle does not use it"),
        ((*NEEDLE, "--force", *OUT), "--force: given, but accepted is one of it"),
        ((*NEEDLE, "--file", "f", *OUT), "--file: given, but --suite needle does not use it"),
        (NEEDLE, "--output: accepted is one of --output, to compress and ask, and --write"),
        ((*NEEDLE, *OUT, "--write", "w"), "--output: accepted is one of"),
        ((*NEEDLE, "--write", "w", "--steps", 3), "--steps: given, but --write compresses nothing"),
        ((*NEEDLE, *OUT), "tokens: missing, accepted is an integer"),
        ((*NEEDLE, *OUT, "--tokens", 0), "tokens: got 0"),
        ((*NEEDLE, *OUT, "--config", "no.yaml"), "no.yaml cannot be read"),
        ((*NEEDLE, *OUT, "--tokens", 8, "--length", 512), "length: got 512 tokens for a model with a window of 512"),
        ((*NEEDLE, *OUT, "--tokens", 8, "--length", 500, "--needles", 4), "length: the context has"),
        ((*NEEDLE, *OUT, "--tokens", 8, "--length", 90), "length: got 90 tokens, accepted is at least"),
        ((*NEEDLE, *OUT, "--tokens", 8, "--length", 300, "--needles", 99), "needles: got 99"),
        (
            (*NEEDLE, *OUT, "--tokens", 8, "--length", 300, "--needles", 4, "--general", "no"),
            "general: no cannot be read",
        ),
        (
            (*NEEDLE, *OUT, "--tokens", 8, "--length", 300, "--needles", 4, "--dissimilarity", "x"),
            "dissimilarity: got 'x'",
        ),
        ((*NEEDLE, *OUT, "--json", "no/e.json"), "--json: cannot write e.json"),
        (("--suite", "qasper", *OUT, "--tokens", 8), "file: missing, but suite=qasper is read from a file"),
        (("--suite", "qasper", *OUT, "--tokens", 8, "--file", "no.json"), "file: no.json cannot be read"),
        (
            ("--suite", "qasper", *OUT, "--tokens", 8, "--file", "f", "--length", 9),
            "--length: given, but --suite qasper",
        ),
        (("--suite", "mtob", *OUT, "--tokens", 8, "--file", "x_ke.json"), "context: missing, but suite=mtob needs"),
        (
            ("--prompt", "p", "--context", "c"),
            "--queries: missing; needed are --context, --prompt and --queries, or --suite",
        ),
        (
            ("--prompt", "p", "--context", "c", "--queries", "q", "--tokens", 3),
            "--tokens: given, but only --suite uses it",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_refused_before_the_weights_are_read(run, inputs, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("softprompt_kernels.compress.inputs.load_model", lambda *_: pytest.fail("it was loaded"))
    result = run("evaluate", "--model", inputs.model, *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and reason in errors[0], result.stderr
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())
