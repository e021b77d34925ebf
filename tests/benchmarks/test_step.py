"""The benchmark of a training step compares two ways of doing the same work."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("psutil")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY)
    from benchmarks.step import comparison as step

    return step


@pytest.fixture
def arguments(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "context.txt").write_text("the cat sat on the mat and the dog ran to the red house " * 2)
    queries = ["where is the dog?", "what is red?", "who sat?"]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"input": query}) + "\n" for query in queries))
    given = {"model": tiny_model_folder, "context": tmp_path / "context.txt", "queries": tmp_path / "queries.jsonl"}
    sizes = {"batch": 3, "new-tokens": 6, "repeats": 1, "micro-batch-size": 2, "tokens": 9}
    return [part for name, value in (given | sizes).items() for part in (f"--{name}", str(value))]


def test_all_sides_have_the_same_loss_and_gradient_and_need_memory(
    step: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step.main([*arguments, "--profile", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, theirs = (figures["sides"][name] for name in ("cached moments", "obvious"))
    composed = figures["sides"]["cached moments, composed"]
    assert ours["loss"] > 0.01
    assert abs(ours["loss"] - composed["loss"]) <= 1e-4
    assert abs(ours["loss"] - theirs["loss"]) <= 1e-4
    assert figures["gradient_difference"] < 1e-4
    assert ours["peak_bytes"] > 0
    assert theirs["peak_bytes"] > 0
    assert figures["times_faster"] == pytest.approx(theirs["seconds"][0] / ours["seconds"][0])
    shown = capsys.readouterr().out
    assert f"{ours['loss']:.6f}" in shown
    assert "attention op: " in shown
    assert "loss op: GEMMs" in shown


def test_other_losses_are_refused(step: ModuleType) -> None:
    with pytest.raises(step.SoftPromptError, match="loss"):
        step.check_same_loss({"cached moments": 1.0, "obvious": 1.001})
    with pytest.raises(step.SoftPromptError, match="loss"):
        step.check_same_loss({"cached moments": float("nan"), "obvious": 1.0})


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_peak_that_is_gone_at_the_end_is_seen(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    from benchmarks.harness import memory

    if not by_kernel:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size = 64 * 2**20
    with memory.PeakResident() as peak:
        for _ in range(5):
            torch.ones(size, dtype=torch.uint8)
    assert size * 0.9 < peak.growth < size * 2


def test_sizes_below_one_are_refused(step: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        step.main([*arguments, "--batch", "0"])
