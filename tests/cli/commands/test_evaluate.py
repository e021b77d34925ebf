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
    assert [line.split("  ")[0] for line in result.stdout.splitlines() if line[:1] in "ntsf" and "  " in line] == [
        "no context",
        "truncated context",
        "soft prompt",
        "full context",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


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
