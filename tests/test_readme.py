"""Every command and every piece of code of the README runs as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_softprompt_commands_run_in_order(tiny_model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    from softprompt_kernels.cli.app import app

    (tmp_path / "my-model").symlink_to(tiny_model_folder)
    (tmp_path / "my-text.txt").write_text("the cat sat on the mat and the dog ran to the red house " * 3)
    (tmp_path / "my-questions.jsonl").write_text('{"input": "where is the dog?"}\n{"input": "what is red?"}\n')
    monkeypatch.chdir(tmp_path)
    commands = [line for line in COMMANDS if line.startswith("softprompt ")]
    assert len(commands) >= 5
    fast = ["--steps", "2", "--selfstudy", "6", "--new-tokens", "4"]
    for command in commands:
        arguments = shlex.split(command)[1:]
        result = CliRunner().invoke(app, arguments + (fast if arguments[0] == "compress" else []))
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "my-run" / "evaluation.json").exists()


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert set(targets) == {"demo", "test", "bench", "sanitize", "compile", "counters", "simt", "mutants", "gpu"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_installs_without_pulling_a_torch(tmp_path: Path) -> None:
    assert "pip install ." in COMMANDS
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", ".", "--dry-run", "--quiet", "--report", str(report)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert re.search(r'"name": "torch"', report.read_text()) is None


def test_every_other_command_is_known() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"make", "pip", "softprompt"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
