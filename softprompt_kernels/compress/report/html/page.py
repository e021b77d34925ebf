"""report.html: one page about a run. It needs no network: styles, script, figures and plotly.js are inside.

    headline → table → stages and curves → where it is far → diagnosis → answers → how to repeat the run

The page is a Jinja2 template that escapes what it is given. Its content security policy forbids to load anything. The
charts are drawn by plotly.js, which is 4.8 MB of the page: the Python package has no smaller bundle.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.report.html.answers import LEVELS, answer_set
from softprompt_kernels.compress.report.html.distance_charts import distance_charts
from softprompt_kernels.compress.report.html.run_charts import diagnosis_charts, run_charts
from softprompt_kernels.compress.report.html.run_data import RunData
from softprompt_kernels.compress.report.table import LEGEND, SETS, evaluation_table, training_line
from softprompt_kernels.compress.sources.queries import write_text

REPEATING = ("context", "queries", "heldout", "test", "init_text", "tokenizer", "model")
"""What of a run's identity is shown as digests."""


def save_report(run: RunData, target: Path) -> None:
    """Write the report of a run; the target is replaced when the page is complete."""
    write_text(target, report_page(run))


def report_page(run: RunData) -> str:
    """The report as HTML."""
    header, rows = evaluation_table(run.figures)
    titles = dict(SETS)
    answer_sets = [
        answer_set(titles[name], run.details.sets[name]) for name in ("test", "heldout") if run.details.sets.get(name)
    ]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            headline=headline(run),
            tiles=tiles(run),
            header=header,
            rows=rows,
            legend=LEGEND,
            run_charts=run_charts(run),
            distance_charts=distance_charts(run),
            diagnosis=run.diagnosis,
            diagnosis_charts=[] if run.diagnosis is None else diagnosis_charts(run.diagnosis),
            diagnose_command=f"softprompt diagnose {shlex.quote(str(run.folder.path))}",
            report_command=f"softprompt report {shlex.quote(str(run.folder.path))}",
            answer_sets=answer_sets,
            students=[key for key in STUDENT_NAMES if any(key in one.students for one in answer_sets)],
            levels=LEVELS,
            student_names=STUDENT_NAMES,
            command=repeat_command(run),
            made_with=run.folder.made_with,
            digests=list(digests({name: run.folder.identity.get(name) for name in REPEATING})),
            plotly=get_plotlyjs(),
        )
    )


def headline(run: RunData) -> str:
    """The result in a sentence or two."""
    figures = run.figures
    context, prompt = figures["context_tokens"], figures["prompt_tokens"]
    known = [
        f"{share(figures[name]['recovered'])} on {title} queries"
        for name, title in SETS
        if name in ("heldout", "test") and name in figures
    ]
    return (
        f"{prompt} tokens stand in for the {context} of {run.context_name}. They recover {' and '.join(known)} of what "
        f"the full text gives. {training_line(figures)}".rstrip()
    )


def tiles(run: RunData) -> list[tuple[str, str]]:
    """The main figures, as pairs of value and name."""
    figures = run.figures
    found = [
        (share(figures[name]["recovered"]), f"recovered, {title}")
        for name, title in SETS
        if name in ("heldout", "test") and name in figures
    ]
    found.append((share(figures["heldout"]["top1_agreement"]), "same most likely token, held-out"))
    found.append((f"{figures['context_tokens'] / figures['prompt_tokens']:.1f}×", "shorter"))
    if "seconds" in figures:
        found.append((duration(figures["seconds"]), "to make"))
    return found


def share(value: float) -> str:
    """A fraction in percent, as "93%"; below 0 "−5%"."""
    return f"{value:.0%}".replace("-", "−")


def repeat_command(run: RunData) -> str:
    """The command that makes the run again in another folder."""
    config, output = run.folder.path / "config.yaml", f"{run.folder.path}-again"
    return f"softprompt compress --config {shlex.quote(str(config))} --output {shlex.quote(output)}"


def digests(identity: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of name and SHA-256 of what the run was made from.

    Args:
        identity: of the run. Those of parts of the model's weights are left out.
        name: before the names of the entries.
    """
    for key, value in identity.items():
        entry = f"{name} {key}".strip()
        if isinstance(value, Mapping) and key not in ("rows", "body"):
            yield from digests(value, entry)
        elif isinstance(value, str) and len(value) == 64:
            yield entry, value


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
