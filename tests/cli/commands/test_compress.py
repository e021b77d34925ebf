"""`softprompt compress`: its output and files, the dry run, and resuming after Ctrl-C."""

import json
import signal

import pytest
import yaml

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.trainer import Trainer
from softprompt_kernels.compress.matching import match
from softprompt_kernels.compress.report.durations import duration


def test_a_compression_ends_with_the_table_and_the_paths_of_its_files(finished):
    out = finished.result.stdout
    rows = [line.split("  ")[0].strip() for line in out.splitlines() if line.strip()]
    start = rows.index("no context")
    assert rows[start : start + 6] == [
        "no context",
        "truncated context",
        "untrained strided KV",
        "prompt before training",
        "soft prompt",
        "full context",
    ]
    assert "held-out KL" in out and "training KL" in out
    for name in ("prompt", "evaluation.json", "curves.png"):
        assert str(finished.folder / name) in out and (finished.folder / name).exists()
    assert (finished.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_the_figures_of_evaluation_json(finished):
    figures = json.loads((finished.folder / "evaluation.json").read_text())
    (line,) = [line for line in finished.result.stdout.splitlines() if line.startswith("soft prompt")]
    shown = [float(cell) for cell in line.removeprefix("soft prompt").split()]
    expected = [
        figures[part][key] for part in ("heldout", "train") for key in ("kl_prompt", "recovered", "top1_agreement")
    ]
    assert all(abs(a - b) <= 5.1e-4 for a, b in zip(shown, expected, strict=True))


def test_the_times_of_the_stages_are_one_line(finished):
    stages = json.loads((finished.folder / "evaluation.json").read_text())["stages"]
    (line,) = [line for line in finished.result.stdout.splitlines() if line.startswith("load ")]
    assert line == ", ".join(f"{name.replace('_', ' ')} {duration(seconds)}" for name, seconds in stages.items())
    assert " training " in line and str(finished.folder / "answers.md") in finished.result.stdout


def test_a_test_set_is_in_the_dry_run_and_in_the_table(run, inputs, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"input": "Is there a cat?"}\n')
    command = inputs.compress(tmp_path / "run", test=tmp_path / "test.jsonl")
    assert "4 for training, 2 held out, 1 for the test" in run(*command, "--dry-run").stdout
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "test KL" in result.stdout


def test_segments_are_in_the_dry_run_and_what_is_left_of_them_below_the_table(run, inputs, tmp_path):
    command = inputs.compress(
        tmp_path / "run", segment_tokens=110, queries=None, heldout=None, selfstudy=8, evaluate_every=0
    )
    forecast = run(*command, "--dry-run")
    assert "segments            2" in forecast.stdout and "disk " in forecast.stdout, forecast.output
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "Segment 2 of 2: " in result.stderr and "2/2 Training: 4 steps in" in result.stderr
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = figures["segments"]["by_distance"]
    assert "so it is the whole text" in result.stdout and "segments ago" in result.stdout
    assert f"{rows[0]['recovered']:.3f}" in result.stdout
    assert (tmp_path / "run" / "report.html").exists() and "Warning" not in result.stderr


def test_progress_goes_to_standard_error_without_control_codes(finished):
    assert "Training: 4 steps in" in finished.result.stderr
    assert "Training" not in finished.result.stdout
    assert "\x1b" not in finished.result.output and "\r" not in finished.result.output


def test_the_same_command_again_shows_the_finished_run(run, inputs, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    again = run(*inputs.compress(finished.folder))
    assert again.exit_code == 0
    assert again.stdout == finished.result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_another_configuration_in_the_same_folder_is_refused_with_the_options_that_differ(run, inputs, finished):
    other = run(*inputs.compress(finished.folder, steps=5, seed=3))
    assert other.exit_code == 2
    assert "holds another run, which differs in seed, steps" in other.stderr


def test_options_override_the_yaml_file(run, inputs, tmp_path):
    path = tmp_path / "config.yaml"
    fields = {"model": str(inputs.model), "context": str(inputs.context), "output": "x", "tokens": 12, "steps": 9}
    fields |= {"queries": str(inputs.queries), "heldout": str(inputs.heldout), "selfstudy": 0, "new_tokens": 4}
    path.write_text(yaml.safe_dump(fields))
    result = run("compress", "--config", path, "--steps", 2, "--output", tmp_path / "run", "--kind", "embedding")
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["steps"], written["tokens"], written["kind"]) == (2, 12, "embedding")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((tmp_path / "run" / "prompt" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"


def test_every_field_of_the_configuration_is_an_option(run):
    text = run("compress", "--help").stdout
    for name in CompressConfig.model_fields:
        assert f"--{name.replace('_', '-')}"[:16] in text, name


def test_a_dry_run_measures_and_writes_nothing(run, inputs, tmp_path):
    result = run(*inputs.compress(tmp_path / "run"), "--dry-run")
    assert result.exit_code == 0, result.output
    names = {line.split("  ")[0] for line in result.stdout.splitlines() if line[:1].strip()}
    sizes = {"context", "prompt", "checkpoints", "ratio", "queries"}
    assert names == sizes | {"KL without context", "time per step", "total time", "memory", "written"}
    assert "4 for training, 2 held out" in result.stdout
    stages = [line.strip().split("  ")[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    evaluations = ["heldout evaluations", "evaluation"]
    times = ["context", "answers", "matching", "training", *evaluations, "answers compared"]
    assert stages == ["stored", *times, "context", "answers", "matching"]
    assert not (tmp_path / "run").exists()


def test_a_prompt_in_closed_form_has_no_curves(run, inputs, tmp_path):
    result = run(*inputs.compress(tmp_path / "run", steps=0, matching_steps=0, evaluate_every=None))
    assert result.exit_code == 0, result.output
    assert "curves" not in result.stdout and not (tmp_path / "run" / "curves.png").exists()
    for name in ("prompt", "evaluation.json", "answers.md"):
        assert str(tmp_path / "run" / name) in result.stdout and (tmp_path / "run" / name).exists()


def test_after_ctrl_c_in_matching_the_same_command_resumes_at_the_next_layer(run, inputs, tmp_path, monkeypatch):
    fit_layer, calls = match.fit_layer, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit_layer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(match, "GROUP_BYTES", 1)  # each layer is stored on its own
        assert run(*inputs.compress(tmp_path / "whole")).exit_code == 0
        patch.setattr(match, "fit_layer", interrupted)
        stopped = run(*inputs.compress(tmp_path / "run"))
        assert stopped.exit_code == 130
        assert "Stopped matching with 1 of 2 layers done. The state is saved in" in stopped.stderr
        assert "Run the same command again to resume" in stopped.stderr and "Traceback" not in stopped.output
        assert run(*inputs.compress(tmp_path / "run")).exit_code == 0
    assert len(calls) == 3, "the first layer is not fitted again"
    weights = "prompt/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_after_ctrl_c_the_same_command_resumes_and_ends_with_the_same_bits(
    run, inputs, finished, tmp_path, monkeypatch
):
    train_step = Trainer.train_step

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        stopped = run(*inputs.compress(tmp_path / "run"))
    assert stopped.exit_code == 130
    assert "Stopped at step 3 of 4" in stopped.stderr and "Run the same command again" in stopped.stderr
    assert "Traceback" not in stopped.output and not (tmp_path / "run" / "evaluation.json").exists()

    resumed = run(*inputs.compress(tmp_path / "run"))
    assert resumed.exit_code == 0
    weights = "prompt/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (finished.folder / weights).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["stage"] == "training"] == [1, 2, 3, 4]
    assert [record["step"] for record in records if record["stage"] == "matching"] == list(range(1, 11))


def test_ctrl_c_before_training_says_how_to_resume(run, inputs, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softprompt_kernels.compress.run.capture_context", stop)
    stopped = run(*inputs.compress(tmp_path / "run"))
    assert stopped.exit_code == 130 and "Run the same command again" in stopped.stderr
    assert "Traceback" not in stopped.output


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_its_exit_code(run, inputs, tmp_path, monkeypatch, number):
    train_step = Trainer.train_step

    def signalled(self):
        if self.step == 3:
            signal.raise_signal(number)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    stopped = run(*inputs.compress(tmp_path / "run"))
    assert stopped.exit_code == 128 + number, stopped.output
    assert "Stopped at step 3 of 4" in stopped.stderr and "Traceback" not in stopped.output
    monkeypatch.setattr("softprompt_kernels.compress.run.capture_context", lambda *_, **__: signal.raise_signal(number))
    stopped = run(*inputs.compress(tmp_path / "other"))
    assert stopped.exit_code == 128 + number and "Run the same command again" in stopped.stderr


def test_many_contexts_are_a_table_and_a_bad_one_is_named(run, inputs, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(inputs.context.read_text())
    (texts / "bad.txt").write_text("")
    command = inputs.compress(tmp_path / "bank", context=texts, steps=0)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0 and "skipped bad" in dry.stdout and not (tmp_path / "bank").exists()
    result = run(*command)
    assert result.exit_code == 3, result.output
    assert "one: recovered" in result.stderr and "bad.txt is empty" in result.stdout
    assert (tmp_path / "bank" / "runs" / "one" / "prompt").is_dir()
