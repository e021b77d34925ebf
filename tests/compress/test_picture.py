"""A picture may fail, and a result may not: the curves are drawn last, and only a warning says that they failed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress

SAVE_CURVES = "softprompt_kernels.compress.run.save_curves"
DRAW = """
import sys
from pathlib import Path
from softprompt_kernels.compress.report.curves import save_curves
save_curves(Path(sys.argv[1]), {}, Path(sys.argv[2]))
import os, matplotlib
print(os.environ.get("MPLBACKEND"), matplotlib.rcParams._get("backend"))
"""


@pytest.mark.parametrize(
    ("backend", "kept"),
    [
        # Of a notebook's shell. Where it is not installed, matplotlib does not take it.
        ("module://matplotlib_inline.backend_inline", importlib.util.find_spec("matplotlib_inline") is not None),
        ("nonsense", False),
        ("module://no.such.module", None),
        ("svg", True),
        ("", False),
    ],
)
def test_the_curves_need_no_backend_of_the_user_and_leave_it_as_it_is(
    tmp_path: Path, backend: str, kept: bool | None
) -> None:
    step = {"stage": "training", "step": 1, "loss": 0.5, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    command = [sys.executable, "-c", DRAW, str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png")]
    done = subprocess.run(command, env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    variable, _, chosen = done.stdout.strip("\n").partition(" ")
    assert variable == backend
    assert kept is None or (chosen == backend) == kept


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Key backend: 'x' is not\na valid value"),
        ImportError("no matplotlib"),
        OSError(28, "No space left on device"),
        RuntimeError(),
    ],
    ids=repr,
)
def test_a_picture_that_fails_is_a_warning_and_the_next_call_draws_it(
    make_config: Callable[..., CompressConfig],
    monkeypatch: pytest.MonkeyPatch,
    recording_reporter: Any,
    error: Exception,
) -> None:
    config, reporter = make_config(steps=1), recording_reporter()

    def fail(metrics: Path, figures: dict[str, Any], target: Path) -> None:
        assert (config.output / "evaluation.json").exists() and (config.output / "prompt").exists()
        assert (config.output / "answers.md").exists()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(SAVE_CURVES, fail)
        figures = compress(config, reporter)
        assert compress(config) == figures, "the run is finished"
    (warning,) = [message for message in reporter.messages if "curves could not be drawn" in message]
    assert warning.startswith("Warning: ") and "\n" not in warning
    assert not (config.output / "curves.png").exists()
    assert compress(config) == figures
    assert (config.output / "curves.png").read_bytes().startswith(b"\x89PNG")
