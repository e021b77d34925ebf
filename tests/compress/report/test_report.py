"""The table and the curves show exactly what was measured."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from softprompt_kernels.compress.report.curves import save_curves
from softprompt_kernels.compress.report.metrics import read_metrics
from softprompt_kernels.compress.report.table import evaluation_table, table_text
from softprompt_kernels.errors import SoftPromptError

HELDOUT = {
    "kl_none": 0.8,
    "kl_truncated": 0.4,
    "kl_untrained": 0.6,
    "kl_prompt": 0.1,
    "recovered": 0.875,
    "top1_agreement": 0.9,
    "top1_agreement_none": 0.5,
    "top1_agreement_truncated": 0.7,
    "top1_agreement_untrained": 0.6,
}
FIGURES = {
    "context_tokens": 600,
    "prompt_tokens": 60,
    "start": "untrained",
    "heldout": HELDOUT,
    "train": {**HELDOUT, "kl_prompt": 0.04},
}


def write_metrics(path: Path, steps: list[dict]) -> Path:
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def step(number: int, **more: float) -> dict:
    return {
        "stage": "training",
        "step": number,
        "loss": 1 / number,
        "learning_rate": 0.01,
        "grad_norm": 0.5,
        "tokens": 9,
        "seconds": 1,
    } | more


def matching_step(number: int, first_layer: int = 0, **more: float) -> dict:
    record = {"stage": "matching", "first_layer": first_layer, "layers": 2, "step": number, "error": 1 / number}
    return {**record, "seconds": 1, **more}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The matplotlib figures that a test saves."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_the_table_has_a_row_for_each_baseline_and_the_full_context():
    header, rows = evaluation_table(FIGURES)
    assert header == ["model with", "held-out KL", "recovered", "top-1", "training KL", "recovered", "top-1"]
    assert [row[:4] for row in rows] == [
        ["no context", "0.800", "0.000", "0.500"],
        ["truncated context", "0.400", "0.500", "0.700"],
        ["untrained strided KV", "0.600", "0.250", "0.600"],
        ["soft prompt", "0.100", "0.875", "0.900"],
        ["full context", "0.000", "1.000", "1.000"],
    ]
    assert rows[3][4:] == ["0.040", "0.950", "0.900"]


def test_the_test_set_has_its_columns_between_held_out_and_training():
    header, rows = evaluation_table(FIGURES | {"test": {**HELDOUT, "kl_prompt": 0.2}})
    assert [name for name in header if name.endswith("KL")] == ["held-out KL", "test KL", "training KL"]
    assert rows[3][4:7] == ["0.200", "0.750", "0.900"]
    assert rows[4][4:7] == ["0.000", "1.000", "1.000"]


def test_a_prompt_worse_than_no_context_has_a_negative_recovered_fraction():
    _, rows = evaluation_table({"heldout": {"kl_none": 0.5, "kl_prompt": 0.75}})
    assert rows[1] == ["soft prompt", "0.750", "-0.500", "-"]


def test_figures_that_were_not_measured_have_no_row_and_no_column():
    header, rows = evaluation_table({"queries": {"kl_none": 0.5, "kl_prompt": 0.25, "top1_agreement": 0.8}})
    assert header[1:] == ["given KL", "recovered", "top-1"]
    assert [row[0] for row in rows] == ["no context", "soft prompt", "full context"]


def test_the_columns_of_a_plain_table_are_aligned():
    text = table_text(["a", "b"], [["x", "1.0"], ["longer", "10.0"]])
    assert text.splitlines() == ["a          b", "------  ----", "x        1.0", "longer  10.0"]


def test_a_repeated_step_counts_once_and_a_truncated_line_is_ignored(tmp_path):
    path = write_metrics(tmp_path / "m.jsonl", [step(1), step(2), step(2, loss=9.0), step(3)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    matching, training = read_metrics(path)
    assert matching == []
    assert [(s["step"], s["loss"]) for s in training] == [(1, 1.0), (2, 9.0), (3, 1 / 3)]


def test_steps_of_matching_count_once_for_each_group_of_layers(tmp_path):
    groups = [matching_step(1), matching_step(2), matching_step(1, 2), matching_step(1, 2, error=9.0), step(1)]
    matching, training = read_metrics(write_metrics(tmp_path / "m.jsonl", groups))
    assert [(s["first_layer"], s["step"], s["error"]) for s in matching] == [(0, 1, 1.0), (0, 2, 0.5), (2, 1, 9.0)]
    assert [s["step"] for s in training] == [1]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "cannot be read"),
        (b"", "no steps"),
        (b'{"stage": "training", "step": 1}\nno\n{"stage": "training", "step": 3}\n', "line 2"),
        (b'{"step": 1}\n{"stage": "training", "step": 2}\n', "line 1"),
        (b"[1]\n{}\n", "line 1"),
    ],
)
def test_metrics_that_cannot_be_read_are_named(tmp_path, content, fragment):
    path = tmp_path / "m.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SoftPromptError, match=fragment):
        save_curves(path, {}, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_the_curves_show_loss_heldout_points_and_baselines(tmp_path, drawn):
    steps = [step(n, **({"heldout_kl": 0.3} if n == 20 else {})) for n in range(1, 41)]
    save_curves(write_metrics(tmp_path / "m.jsonl", steps), FIGURES, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    loss, rate, gradient = drawn[0].axes
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines["held-out KL"].get_xdata()) == [0, 20, 40]
    assert list(lines["held-out KL"].get_ydata()) == [0.6, 0.3, 0.1]
    assert list(loss.lines[0].get_ydata()) == [1 / n for n in range(1, 41)]
    smooth = lines["training loss (mean of the last 10 steps)"].get_ydata()
    assert math.isclose(smooth[-1], sum(1 / n for n in range(31, 41)) / 10)
    heights = {line.get_ydata()[0] for line in loss.lines if "held-out KL, " in str(line.get_label())}
    assert heights == {0.8, 0.4, 0.6}
    assert loss.get_yscale() == gradient.get_yscale() == "log" and rate.get_yscale() == "linear"
    assert loss.get_ylabel() == "nats per token" and gradient.get_xlabel() == "step of training"
    assert "600 tokens" in loss.get_title() and "10.0×" in loss.get_title()


def test_the_curves_of_matching_are_the_mean_over_all_layers(tmp_path, drawn):
    groups = [matching_step(n, error=0.8 / n) for n in (1, 2)]
    groups += [matching_step(n, 2, layers=1, error=0.2 / n) for n in (1, 2)]
    save_curves(write_metrics(tmp_path / "m.jsonl", [*groups, step(1), step(2)]), FIGURES, tmp_path / "c.png")
    save_curves(write_metrics(tmp_path / "m.jsonl", groups), FIGURES, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [len(figure.axes) for figure in drawn] == [4, 1]
    for figure in drawn:
        axes = figure.axes[0]
        assert list(axes.lines[0].get_xdata()) == [1, 2]
        assert list(axes.lines[0].get_ydata()) == pytest.approx([0.6, 0.3])
        assert axes.get_xlabel() == "step of matching" and axes.get_yscale() == "log"
        assert "600 tokens" in axes.get_title()
    assert list(drawn[0].axes[1].lines[0].get_xdata()) == [1, 2]


def test_the_test_set_is_not_in_the_curves(tmp_path, drawn):
    metrics = write_metrics(tmp_path / "m.jsonl", [step(1), step(2)])
    for figures in (FIGURES, FIGURES | {"test": dict.fromkeys(HELDOUT, 9.0)}):
        save_curves(metrics, figures, tmp_path / "c.png")
    first, second = (
        [(str(line.get_label()), list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
        for figure in drawn
    )
    assert first == second


def test_the_held_out_curve_starts_at_the_kl_of_the_initial_prompt(tmp_path, drawn):
    figures = {"start": "initial", "heldout": {**HELDOUT, "kl_initial": 0.7}}
    save_curves(write_metrics(tmp_path / "m.jsonl", [step(1), step(2)]), figures, tmp_path / "c.png")
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "held-out KL"]
    assert list(line.get_ydata()) == [0.7, 0.1]
    assert [row[0] for row in evaluation_table({"heldout": {**HELDOUT, "kl_initial": 0.7}})[1]][
        3
    ] == "prompt before training"


def test_curves_of_one_step_without_an_evaluation_can_be_drawn(tmp_path, drawn):
    metrics = write_metrics(tmp_path / "m.jsonl", [step(1, grad_norm=0.0)])
    save_curves(metrics, {}, tmp_path / "c.png")
    assert {line.get_label() for line in drawn[0].axes[0].lines} >= {"training loss (mean of the last 10 steps)"}
    assert not any("held-out" in str(line.get_label()) for line in drawn[0].axes[0].lines)


def test_a_failed_write_keeps_the_previous_curves(tmp_path, monkeypatch):
    metrics = write_metrics(tmp_path / "m.jsonl", [step(1), step(2)])
    save_curves(metrics, {}, tmp_path / "c.png")
    before = (tmp_path / "c.png").read_bytes()

    def full(self: Figure, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        save_curves(metrics, FIGURES, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.png", "m.jsonl"]
