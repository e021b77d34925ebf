"""The folder of a run: which run it belongs to, and which metrics are kept."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.errors import SoftPromptError


def test_a_folder_is_claimed_once_and_recognised_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.claim({"steps": 3}, "steps: 3\n")
    assert (folder.path / "config.yaml").read_text() == "steps: 3\n"
    folder.claim({"steps": 3}, "steps: 3\nthreads: 2\n")
    assert (folder.path / "config.yaml").read_text() == "steps: 3\n"
    with pytest.raises(SoftPromptError, match="differs in seed, steps;"):
        folder.claim({"steps": 4, "seed": 1}, "")


def test_after_a_full_disk_the_same_run_can_claim_the_folder(
    tmp_path: Path, full_disk: Callable[..., AbstractContextManager[None]]
) -> None:
    folder, identity = RunFolder(tmp_path / "run"), {"steps": 3}
    for room in (4, 64):  # too little for run.json; enough for it, but too little for config.yaml
        with full_disk(room), pytest.raises(SoftPromptError, match=r"output: .* cannot be written \(File too large\)"):
            folder.claim(identity, "steps: 3\n" * 100)
    folder.claim(identity, "steps: 3\n" * 100)
    assert (folder.path / "config.yaml").read_text() == "steps: 3\n" * 100
    assert json.loads((folder.path / "run.json").read_text()) == {"identity": identity}


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.drop_metrics_after(3) == 0
    lines = [json.dumps({"stage": "training", "step": step, "seconds": 0.5}) for step in range(1, 6)]
    folder.metrics.write_text("\n".join(lines) + '\n{"stage": "training", "step": 6, "sec')
    assert folder.drop_metrics_after(3) == 1.5
    assert folder.metrics.read_text().splitlines() == lines[:3]
    assert folder.has_metrics
    assert folder.drop_metrics_after(0) == 0
    assert folder.metrics.read_text() == ""
    assert not folder.has_metrics


def test_metrics_of_matching_are_kept_and_are_no_seconds_of_training(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.has_metrics
    stages = [("matching", 1), ("matching", 2), ("training", 1), ("training", 2)]
    for stage, step in stages:
        folder.add_metrics({"stage": stage, "step": step, "seconds": 0.5})
    lines = folder.metrics.read_text().splitlines()
    assert folder.drop_metrics_after(1) == 0.5
    assert folder.metrics.read_text().splitlines() == lines[:3]
    with folder.metrics.open("a") as file:
        file.write('{"stage": "tra')
    assert folder.drop_metrics_after(0) == 0
    assert folder.metrics.read_text().splitlines() == lines[:2]


@pytest.mark.parametrize("content", [None, "", '{"kl'])
def test_a_run_with_missing_or_truncated_figures_is_not_finished(tmp_path: Path, content: str | None) -> None:
    folder = RunFolder(tmp_path)
    if content is not None:
        folder.evaluation.write_text(content)
    assert folder.read_evaluation() is None
    folder.evaluation.write_text('{"seconds": 1}')
    assert folder.read_evaluation() == {"seconds": 1}


def test_only_a_run_that_diverged_may_change_its_rate(tmp_path: Path) -> None:
    folder, identity = RunFolder(tmp_path / "run"), {"learning_rate": 0.1, "max_grad_norm": None, "steps": 3}
    slower = identity | {"learning_rate": 0.01}
    folder.claim(identity, "learning_rate: 0.1\n", {"torch": "2"})
    with pytest.raises(SoftPromptError, match="differs in learning_rate;"):
        folder.claim(slower, "")
    folder.mark_diverged(2)
    with pytest.raises(SoftPromptError, match="differs in learning_rate, steps;"):
        folder.claim(slower | {"steps": 4}, "")
    folder.claim(identity, "")  # as it was
    folder.claim(slower, "learning_rate: 0.01\n")
    folder.claim(slower, "")
    assert folder.identity == identity, "what is stored in the folder belongs to the run that began"
    assert (folder.current, folder.changes) == (slower, [{"step": 2, "learning_rate": 0.01}])
    assert folder.made_with == {"torch": "2"}
    assert (folder.path / "config.yaml").read_text() == "learning_rate: 0.01\n"
    for other in (identity, identity | {"learning_rate": 0.001}):
        with pytest.raises(SoftPromptError, match="differs in learning_rate;"):
            folder.claim(other, "")
    folder.mark_diverged(2)
    folder.claim(slower | {"max_grad_norm": 1.0}, "")
    assert folder.current == slower | {"max_grad_norm": 1.0}
