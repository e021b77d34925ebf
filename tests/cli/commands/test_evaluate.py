"""`softprompt evaluate`: a saved prompt on given queries."""

import json

import pytest


@pytest.fixture
def command(inputs, finished) -> list[object]:
    """The arguments of an evaluation that succeeds."""
    files = ["--context", inputs.context, "--prompt", finished.folder / "prompt", "--queries", inputs.heldout]
    return ["evaluate", "--model", inputs.model, *files, "--new-tokens", 6]


def test_the_held_out_queries_of_a_run_get_the_figures_of_the_run(run, command, finished, tmp_path):
    result = run(*command, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())["queries"]
    expected = json.loads((finished.folder / "evaluation.json").read_text())["heldout"]
    for name in ("kl_none", "kl_prompt", "kl_truncated", "recovered", "top1_agreement"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    rows = [line.split("  ")[0] for line in result.stdout.splitlines() if line[:1] in "ntsf" and "  " in line]
    assert rows == 2 * ["no context", "truncated context", "soft prompt", "full context"]
    assert "Unrelated text (" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_references_a_dissimilarity_and_a_general_text_of_the_user(run, command, tmp_path, monkeypatch):
    (tmp_path / "queries.jsonl").write_text('{"input": "Who?", "references": ["Ada", "Brook"]}\n{"input": "Where?"}\n')
    (tmp_path / "general.txt").write_text("Soup needs salt. Tides follow the moon.")
    (tmp_path / "my_own_measure.py").write_text("def never(one, other):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    command[command.index("--queries") + 1] = "queries.jsonl"
    own = ["--dissimilarity", "my_own_measure:never", "--general", "general.txt", "--json", "e.json"]
    result = run(*command, *own)
    assert result.exit_code == 0, result.output
    assert "my_own_measure:never" in result.stdout and "right (F1)" in result.stdout
    figures = json.loads((tmp_path / "e.json").read_text())
    assert set(figures["answers"]["dissimilarity"]["my_own_measure:never"].values()) == {0.25}
    assert figures["answers"]["questions"] == 1 and figures["forgetting"]["tokens"] == 38
    for option, value, reason in (
        ("--dissimilarity", "my_own_measure:nothing", "has no 'nothing'"),
        ("--general", "no.txt", "general: no.txt cannot be read"),
    ):
        refused = run(*command, option, value)
        assert refused.exit_code == 2 and reason in refused.stderr and "Teacher" not in refused.stderr


def test_a_text_other_than_the_prompts_own_gives_a_message(run, command, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("A quite different text, about nothing that was in the first.")
    command[command.index("--context") + 1] = other
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "was made from another text" in result.stderr


def test_a_missing_folder_for_the_figures_is_refused_before_the_model_is_loaded(run, command, tmp_path):
    result = run(*command, "--json", tmp_path / "no" / "e.json")
    assert result.exit_code == 2 and "--json" in result.stderr and "Loading" not in result.stderr


def test_an_invalid_query_is_named_by_line(run, command, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "Who?"}\n{"input": 3}\n')
    command[command.index("--queries") + 1] = bad
    result = run(*command)
    assert result.exit_code == 2 and "line 2" in result.stderr and "Traceback" not in result.output
