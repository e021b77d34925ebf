"""The workflows, the pre-commit configuration and the Makefile name what is there."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
CI_TARGETS = {"test", "sanitize", "simt", "mutants"}


def jobs():
    return {
        f"{path.stem}: {name}": job
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    }


def commands(job):
    """What the steps of a job run, with each value of the matrix in its place."""
    matrix = job.get("strategy", {}).get("matrix", {})
    rows = matrix.get("include") or [{name: value} for name, values in matrix.items() for value in values] or [{}]
    for step in job["steps"]:
        for row in rows if "run" in step else ():
            yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda match, row=row: row[match[1]], step["run"])


def make_targets(text):
    return set(re.findall(r"\bmake ([a-z]+)", text))


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "wheels.yml"]


@pytest.mark.parametrize("job", jobs().values(), ids=jobs())
def test_steps_of_a_job(job):
    assert job["timeout-minutes"] <= 180
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert re.search(r"@v\d", step.get("uses", "@v1")), f"{step} has no version"
    for command in commands(job):
        assert make_targets(command) <= set(TARGETS), command
        for file in re.findall(r"tests/[\w/]+\.py", command):
            assert (ROOT / file).is_file(), file


def test_the_workflow_runs_what_the_script_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [command for name, job in jobs().items() if name.startswith("ci:") for command in commands(job)]
    run = set().union(*(make_targets(command) for command in steps))
    assert make_targets(script.partition("set -")[2]) == run == CI_TARGETS


def test_linux_on_both_processors_and_macos_are_tested():
    job = jobs()["ci: test"]
    assert {row["runner"] for row in job["strategy"]["matrix"]["include"]} == {
        "ubuntu-24.04",
        "ubuntu-24.04-arm",
        "macos-15",
    }


def test_every_target_of_make_has_a_line_of_help():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert all(len(line) == 3 for line in lines)
    assert [line[1] for line in lines] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_make_can_be_planned(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pre_commit_uses_the_pinned_ruff_and_checks_what_make_lint_checks():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    ruff, local = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert ruff["rev"] == f"v{pins['ruff']}"
    assert {hook["id"] for hook in ruff["hooks"] + local["hooks"]} == {"ruff-check", "ruff-format", "mypy"}


def test_wheels_are_built_for_every_supported_python_and_then_used():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = pyproject["tool"]["cibuildwheel"]
    assert settings["build"] == ["cp311-*", "cp312-*", "cp313-*", "cp314-*"]
    assert pyproject["project"]["requires-python"] == ">=3.11"
    script = re.search(r"\{project\}/(\S+)", settings["test-command"])[1]
    assert (ROOT / script).is_file()
    assert settings["environment"]["SOFTPROMPT_CPU"] == settings["macos"]["environment"]["SOFTPROMPT_CPU"] == "1"
