"""Measures cells, one after the other, and stores each result; a finished cell is not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.study.cells import Cell, digest, settings
from benchmarks.study.make import clean, make_prompt
from benchmarks.study.results import Record, Results
from benchmarks.study.teacher import Study, prompt_tokens
from softprompt_kernels.bench.machine import OtherLoad, facts
from softprompt_kernels.errors import SoftPromptError

PACKAGES = ("softprompt-kernels", "transformers", "peft", "kvpress")
ANSWER_SECONDS = 60  # of a text's first cell that reads answers, until measured
LONG_TEXT = 3  # how many times as long a cell takes on a text of several thousand tokens, until measured


def measure_cell(study: Study, cell: Cell) -> Record:
    """Make and evaluate the prompt of one cell.

    Returns:
        The record of the cell. "wall" is all its seconds, evaluation and shared stages included, "seconds" those of the
        method by stage.

    Raises:
        SoftPromptError: the method cannot run here or with these settings.
    """
    begin = time.perf_counter()
    with OtherLoad() as load:
        context_tokens = study.captured(cell.text).ids.shape[1]
        k = prompt_tokens(context_tokens, cell.ratio)
        teacher = study.teacher(cell.text, cell.seed)
        made = make_prompt(study, cell, k)
        figures = teacher.evaluate(made.prefix)
    clean(made)
    return {
        "text": cell.text.name,
        "method": cell.method.name,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "digest": digest(settings(cell, study.name)),
        "context_tokens": context_tokens,
        "prompt_tokens": k,
        "steps": int(made.settings.get("steps", 0)),
        "heldout": figures["heldout"],
        "test": figures.get("test"),
        "seconds": made.seconds,
        "wall": time.perf_counter() - begin,
        "settings": made.settings,
        "machine": {**facts(), "other_load": load.share},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def missing_cells(cells: Iterable[Cell], results: Results, model: str) -> list[Cell]:
    """The cells that have no result of these settings, in the same order.

    Raises:
        SoftPromptError: a file of results is damaged.
    """
    kept = []
    for cell in cells:
        found = results.find(cell.text.name, cell.method.name, cell.ratio, cell.seed)
        if found is None or found["digest"] != digest(settings(cell, model)):
            kept.append(cell)
    return kept


def expected_seconds(cell: Cell, results: Results) -> float:
    """What a cell will take: the longest of its kind so far, or a guess."""
    walls = [record["wall"] for record in results.cells(cell.text.name, cell.method.name) if "wall" in record]
    if walls:
        return float(max(walls))
    answers = ANSWER_SECONDS if cell.method.reads_answers else 0
    return (cell.method.seconds + answers) * (1 if cell.text.short else LONG_TEXT)


def measure_all(
    study: Study,
    cells: Iterable[Cell],
    results: Results,
    *,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
    measure: Callable[[Study, Cell], Record] = measure_cell,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, str]:
    """Measure the cells that are missing, and store each.

    Args:
        study: the model and what is shared.
        cells: in the order in which they are measured.
        results: where they are stored.
        seconds: budget. No cell starts that is unlikely to end in it; a cheaper one after it may.
        say: receives a line for each cell.
        measure: measures one cell.
        clock: seconds.

    Returns:
        The cells that were left out, with the reason.
    """
    begin, left_out = clock(), dict[str, str]()
    waiting = missing_cells(cells, results, study.name)
    for index, cell in enumerate(waiting, 1):
        if seconds is not None:
            expected = expected_seconds(cell, results)
            if clock() - begin + expected > seconds:
                left_out[cell.name] = f"it takes about {expected:.0f} s, and the budget is nearly used"
                continue
        say(f"[{index} of {len(waiting)}] {cell.name}")
        try:
            record = measure(study, cell)
        except SoftPromptError as error:
            left_out[cell.name] = str(error)
            say(f"  left out: {error}")
            continue
        results.put(record)
        say(f"  {one_line(record)}")
    return left_out


def one_line(record: Record) -> str:
    """The held-out figure of a cell, and its seconds. Test figures are for docs/study.md alone."""
    return f"recovered {record['heldout']['recovered']:.3f} on held-out; {sum(record['seconds'].values()):.1f} s"


def _version(name: str) -> Any:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
