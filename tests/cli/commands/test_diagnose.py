"""`softprompt diagnose`: the report, and the same as JSON."""

import json
import shlex
import shutil

import pytest

from softprompt_kernels.compress.evaluate.diagnosis import read_diagnosis


@pytest.fixture
def folder(finished, tmp_path):
    """A run that a test may add files to."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def test_the_report_names_the_cause_and_a_command_that_works(run, folder):
    result = run("diagnose", folder)
    assert result.exit_code == 0, result.output
    found = read_diagnosis(folder / "diagnosis.json")
    first = found.findings[0]
    assert f"1. {first.cause}" in result.stdout and "by matching alone" in result.stdout
    words = " ".join(result.stdout.split())
    assert first.change in words and first.evidence[0][1] in words
    command = next(line for line in result.stdout.splitlines() if line.startswith("softprompt compress --config"))
    assert command.endswith(next(one.options for one in found.findings if one.options))
    assert "\x1b" not in result.stdout, "no colours in a pipe"
    again = run(*shlex.split(command)[1:], "--dry-run")
    assert again.exit_code == 0, again.output


def test_json_is_the_file_and_nothing_else(run, folder):
    result = run("diagnose", folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((folder / "diagnosis.json").read_text())


def test_a_folder_without_a_run_gives_a_message(run, tmp_path):
    result = run("diagnose", tmp_path)
    assert result.exit_code == 2 and "holds no run" in result.stderr and "Traceback" not in result.output
    assert run("diagnose").exit_code == 2
