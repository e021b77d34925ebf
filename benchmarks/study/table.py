"""The tables of the study in docs/study.md and in the README, made of the measured cells.

    one table for each text; a row is a method, a column a ratio, and a figure `held-out ± spread / test`

Held-out and test are means over the seeds, the spread is the standard deviation over seeds of the held-out figure.
Seconds are those of the method at one ratio, with the shared stages that it needs, and without the evaluation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.study.cells import grid
from benchmarks.study.corpus import ROOT, all_texts
from benchmarks.study.methods import METHODS
from benchmarks.study.results import Record, Results

PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"
PLOT = ROOT / "docs" / "study.svg"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TIMED_RATIO = 8
NOTHING = "No cell has been measured yet."
README_TEXT = "demo"


def seed_mean(records: Sequence[Record], part: str) -> float | None:
    """The mean of `recovered` on a set over the seeds; None if no record has it."""
    values = [record[part]["recovered"] for record in records if record.get(part)]
    return mean(values) if values else None


def spread(records: Sequence[Record], part: str = "heldout") -> float | None:
    """The standard deviation over seeds of `recovered`; None for fewer than two."""
    values = [record[part]["recovered"] for record in records if record.get(part)]
    return stdev(values) if len(values) > 1 else None


def total_seconds(records: Sequence[Record]) -> float:
    """The mean of the method's seconds, all stages together."""
    return mean(sum(record["seconds"].values()) for record in records)


def grouped(results: Results) -> dict[str, dict[str, dict[int, list[Record]]]]:
    """The measured cells by text, method and ratio; texts and methods in the order of the study."""
    cells = list(results.all())
    texts = [name for name in all_texts() if any(cell["text"] == name for cell in cells)]
    texts += sorted({cell["text"] for cell in cells} - set(texts))
    found: dict[str, dict[str, dict[int, list[Record]]]] = {}
    for text in texts:
        found[text] = {}
        for method in [*METHODS, *sorted({cell["method"] for cell in cells} - set(METHODS))]:
            for cell in cells:
                if (cell["text"], cell["method"]) == (text, method):
                    found[text].setdefault(method, {}).setdefault(cell["ratio"], []).append(cell)
    return found


def markdown(results: Results, test: bool = True, texts: Collection[str] | None = None) -> str:
    """A table for each text.

    Args:
        test: with the test figures. Test questions are not for choosing, so a run does not print them.
        texts: names of texts; None: all.
    """
    parts = []
    for text, methods in grouped(results).items():
        if texts is not None and text not in texts:
            continue
        every = [cell for ratios in methods.values() for cells in ratios.values() for cell in cells]
        ratios = sorted({cell["ratio"] for cell in every})
        sizes = {cell["ratio"]: cell["prompt_tokens"] for cell in every}
        head = [f"{text}, {every[0]['context_tokens']} tokens", *(f"{r}× ({sizes[r]})" for r in ratios)]
        lines = [_row([*head, f"seconds at {TIMED_RATIO}×"]), _row(["---"] * (len(ratios) + 2))]
        for method, by_ratio in methods.items():
            label = METHODS[method].label if method in METHODS else method
            timed = by_ratio.get(TIMED_RATIO)
            seconds = "" if timed is None else f"{total_seconds(timed):.0f}"
            lines.append(_row([label, *(_figure(by_ratio.get(ratio, []), test) for ratio in ratios), seconds]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOTHING


def update_page(page: Path, text: str) -> None:
    """Write a text between the markers of a page.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: got no {BEGIN} … {END}, accepted is a page with both")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def content(results: Results, plot: Path = PLOT) -> str:
    """What stands between the markers of docs/study.md."""
    tables = markdown(results)
    if tables == NOTHING or not plot.exists():
        return tables
    image = f"![Recovered against the ratio and against the seconds, for each text]({plot.name})"
    return f"{image}\n\n{tables}\n\n{progress(results)}"


def progress(results: Results) -> str:
    """How many of the planned cells are measured."""
    planned = grid(all_texts().values())
    measured = sum(
        results.find(cell.text.name, cell.method.name, cell.ratio, cell.seed) is not None for cell in planned
    )
    if measured == len(planned):
        return f"All {measured} planned cells are measured. Trained methods are planned at few ratios."
    return f"{measured} of {len(planned)} planned cells are measured. An empty field is not measured, or not planned."


def _figure(cells: Sequence[Record], with_test: bool) -> str:
    heldout, test, deviation = seed_mean(cells, "heldout"), seed_mean(cells, "test"), spread(cells)
    if heldout is None:
        return ""
    shown = _number(heldout)
    if deviation is not None:
        shown += f" ±{_number(deviation)}"
    return shown if test is None or not with_test else f"{shown} / {_number(test)}"


def _number(value: float) -> str:
    """Three decimals without the leading zero."""
    value = round(value, 3) + 0.0  # no -0
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
