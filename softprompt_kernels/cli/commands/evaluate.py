"""`softprompt evaluate`: compares a saved prompt with the full context, on given queries or on a suite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt_kernels.cli.display import show_pairs, show_table
from softprompt_kernels.cli.errors import resumable
from softprompt_kernels.cli.options import (
    DeviceName,
    DtypeName,
    Force,
    ModelName,
    TemplateArguments,
    parse_template_arguments,
)
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.evaluate.suites.suite import MADE, READ, check_suite_name, write_suite
from softprompt_kernels.compress.report.answer_table import (
    answer_remark,
    answer_table,
    forgetting_remark,
    suite_remark,
)
from softprompt_kernels.compress.report.table import LEGEND, evaluation_table
from softprompt_kernels.errors import SoftPromptError

PROMPT, SUITE, BOTH = "A saved prompt", "A suite", "Answers, figures and device"
ContextFile = Annotated[
    Path | None,
    typer.Option(
        "--context",
        help="File with the text that was compressed, in UTF-8. With --suite mtob: the grammar book.",
        rich_help_panel=PROMPT,
    ),
]
PromptFolder = Annotated[
    Path | None, typer.Option("--prompt", help="Folder of the saved prompt.", rich_help_panel=PROMPT)
]
Queries = Annotated[
    Path | None,
    typer.Option(
        "--queries",
        help='File of JSON Lines, {"input": ..., "output": ..., "references": [...]}. Without an output the teacher '
        "answers; with references, answers that count as right, the accuracy is reported.",
        rich_help_panel=PROMPT,
    ),
]
SuiteName = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help=f"Compress the context of a suite and ask its questions. Made from the seed: {', '.join(MADE)}. Read from "
        f"--file: {', '.join(READ)}.",
        rich_help_panel=SUITE,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a made context. Default: 1024.", rich_help_panel=SUITE, show_default=False),
]
Needles = Annotated[
    int | None,
    typer.Option(
        help="Facts of a made suite that are asked for: half in training, half in the test. Default: 12.",
        rich_help_panel=SUITE,
        show_default=False,
    ),
]
BenchmarkPath = Annotated[
    Path | None,
    typer.Option("--file", help="The benchmark's file: benchmark_v5.json and so on.", rich_help_panel=SUITE),
]
Items = Annotated[
    list[str] | None,
    typer.Option(
        "--item",
        help="Patient or paper of the file; may be given several times. Default: the first.",
        rich_help_panel=SUITE,
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Folder for the suite, its compression and its figures.", rich_help_panel=SUITE),
]
Write = Annotated[
    Path | None,
    typer.Option("--write", help="Only write the suite's context and questions to this folder.", rich_help_panel=SUITE),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file of the compression, as of `softprompt compress`. Its texts and queries are not used.",
        rich_help_panel=SUITE,
    ),
]
SETTING = "As of `softprompt compress`."
Tokens = Annotated[int | None, typer.Option(help=f"Length of the soft prompt. {SETTING}", rich_help_panel=SUITE)]
Steps = Annotated[int | None, typer.Option(help=f"Training steps. {SETTING}", rich_help_panel=SUITE)]
MatchingSteps = Annotated[int | None, typer.Option(help=f"Steps of matching. {SETTING}", rich_help_panel=SUITE)]
SelfStudy = Annotated[
    int | None,
    typer.Option("--selfstudy", help=f"Queries generated from the text. {SETTING}", rich_help_panel=SUITE),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum length of an answer, in tokens. Default: 48.", rich_help_panel=BOTH, show_default=False
    ),
]
SampleTemperature = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Temperature for sampling the answers that KL is measured on; 0 is greedy. Default: 1.",
        rich_help_panel=BOTH,
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        help="Seed of sampling and of a made suite. Default: 0.",
        rich_help_panel=BOTH,
        show_default=False,
    ),
]
DissimilarityName = Annotated[
    str | None,
    typer.Option(
        "--dissimilarity",
        metavar="MODULE:FUNCTION",
        help="Also compare answers with this function of two texts, which returns a number from 0 (the same) to 1.",
        rich_help_panel=BOTH,
    ),
]
GeneralFile = Annotated[
    Path | None,
    typer.Option(
        "--general",
        help="File of text that has nothing to do with the context, for what the prompt breaks. Default: a few "
        "paragraphs that come with the package.",
        rich_help_panel=BOTH,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures to this JSON file.", rich_help_panel=BOTH)
]


def evaluate(
    *,
    model: ModelName,
    context: ContextFile = None,
    prompt: PromptFolder = None,
    queries: Queries = None,
    suite: SuiteName = None,
    length: Length = None,
    needles: Needles = None,
    file: BenchmarkPath = None,
    items: Items = None,
    output: Output = None,
    write: Write = None,
    config: ConfigFile = None,
    tokens: Tokens = None,
    selfstudy: SelfStudy = None,
    matching_steps: MatchingSteps = None,
    steps: Steps = None,
    new_tokens: NewTokens = None,
    sample_temperature: SampleTemperature = None,
    seed: Seed = None,
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
    dissimilarity: DissimilarityName = None,
    general: GeneralFile = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a saved prompt and baselines on your own queries, or on a suite.

    Each is compared with the model that reads the full text: KL over the full vocabulary, top-1 agreement, and whole
    answers. Queries with "references" in their file also give an accuracy. What the prompt changes on text of other
    subjects is measured too.

    With --suite, a context with questions is made from the seed, or read from the file of a benchmark; the context is
    compressed into --output, and the questions are asked. The same command resumes it.
    """
    compression = {"tokens": tokens, "selfstudy": selfstudy, "matching_steps": matching_steps, "steps": steps}
    settings = {
        "new_tokens": new_tokens,
        "sample_temperature": sample_temperature,
        "seed": seed,
        "template_arguments": parse_template_arguments(template_arguments),
        "dtype": None if dtype == "auto" else dtype,
        "device": None if device == "auto" else device,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if json_file is not None and not json_file.parent.is_dir():
        raise SoftPromptError(f"--json: cannot write {json_file.name}: {json_file.parent} is not a folder")
    if suite is None:
        refuse(
            "only --suite uses it",
            {
                "--length": length,
                "--needles": needles,
                "--file": file,
                "--item": items,
                "--output": output,
                "--write": write,
                "--config": config,
                **{f"--{name.replace('_', '-')}": value for name, value in compression.items()},
            },
        )
        for option, value in (("--context", context), ("--prompt", prompt), ("--queries", queries)):
            if value is None:
                raise SoftPromptError(f"{option}: missing; needed are --context, --prompt and --queries, or --suite")
        figures = _of_prompt(model, context, prompt, queries, given, force, dissimilarity, general)
    else:
        check_suite_name(suite)
        refuse(
            f"accepted is one of it and --suite {suite}",
            {"--prompt": prompt, "--queries": queries, "--force": force or None},
        )
        made = suite in MADE
        refuse(
            f"--suite {suite} does not use it",
            {"--file": file, "--item": items} if made else {"--length": length, "--needles": needles},
        )
        refuse(f"--suite {suite} does not use it", {} if suite == "mtob" else {"--context": context})
        refuse(f"--suite {suite} does not use it", {"--item": items} if suite == "mtob" else {})
        if (output is None) == (write is None):
            raise SoftPromptError("--output: accepted is one of --output, to compress and ask, and --write")
        source = {
            "length": length,
            "needles": needles,
            "file": file,
            "items": None if items is None else tuple(items),
            "book": context,
        }
        source = {name: value for name, value in source.items() if value is not None}
        changes = {name: value for name, value in compression.items() if value is not None}
        if write is not None:
            refuse("--write compresses nothing", {"--config": config, **_flags(changes), "--json": json_file})
            _write(suite, model, source, given, write)
            return
        assert output is not None
        figures = _of_suite(suite, model, source, {**given, **changes}, config, output, dissimilarity, general)
    show_figures(figures)
    if json_file is not None:
        from softprompt_kernels.compress.sources.queries import write_text

        write_text(json_file, as_json(figures))


def refuse(reason: str, options: Mapping[str, Any]) -> None:
    """Refuse options that are given.

    Args:
        reason: of the refusal, for the message.
        options: values by the name of the option; None: not given.

    Raises:
        SoftPromptError: one of them is given.
    """
    for option, value in options.items():
        if value is not None:
            raise SoftPromptError(f"{option}: given, but {reason}")


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in options.items()}


def _of_prompt(
    model: str,
    context: Path | None,
    prompt: Path | None,
    queries: Path | None,
    settings: Mapping[str, Any],
    force: bool,
    dissimilarity: str | None,
    general: Path | None,
) -> dict[str, Any]:
    """The figures of a saved prompt."""
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import evaluate_prompt

    assert context is not None and prompt is not None and queries is not None
    quiet_libraries()
    reporter = terminal_reporter()
    reporter.message(f"Loading {model}")
    measures: dict[str, Any] = {"dissimilarity": dissimilarity, "general": general}
    return evaluate_prompt(model, context, prompt, queries, force=force, reporter=reporter, **measures, **settings)


def _of_suite(
    name: str,
    model: str,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Path | None,
    output: Path,
    dissimilarity: str | None,
    general: Path | None,
) -> dict[str, Any]:
    """The figures of a suite, whose context is compressed first."""
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress.suite_run import evaluate_suite, suite_config, suite_of

    wanted = suite_config(output, config, {"model": model, **settings}, trained=name in MADE)
    quiet_libraries()
    shared: dict[str, Any] = {"new_tokens": wanted.new_tokens, "template_arguments": wanted.template_arguments}
    if name in MADE:
        shared["seed"] = wanted.seed
    suite = suite_of(name, model, **source, **shared)
    reporter = terminal_reporter()
    reporter.message(f"Loading {model}")
    with resumable():
        return evaluate_suite(suite, output, wanted, dissimilarity=dissimilarity, general=general, reporter=reporter)


def _write(name: str, model: str, source: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Write a suite, without a compression."""
    from softprompt_kernels.compress.suite_run import suite_of

    quiet_libraries()
    used = {key: settings[key] for key in ("new_tokens", "template_arguments", "seed") if key in settings}
    files = write_suite(suite_of(name, model, **source, **used), folder)
    show_pairs(
        [
            ("context", str(files.context)),
            *([("training questions", str(files.train))] if files.train.exists() else []),
            ("test questions", str(files.test)),
            ("judged by", json.loads(files.record.read_text(encoding="utf-8"))["metric"]),
        ]
    )


def show_figures(figures: Mapping[str, Any]) -> None:
    """Print the tables of an evaluation; `figures` from `evaluate_prompt` or `evaluate_suite`."""
    for (header, rows), legend in (
        (evaluation_table(figures), LEGEND),
        (answer_table(figures["answers"]), answer_remark(figures["answers"])),
    ):
        typer.echo("")
        show_table(header, rows, highlight="soft prompt")
        typer.echo(legend)
    typer.echo(f"\n{forgetting_remark(figures['forgetting'])}")
    if "suite" in figures:
        typer.echo(suite_remark(figures))


def as_json(figures: Mapping[str, Any]) -> str:
    """Figures as strict JSON, where a number that is not finite is null."""
    from softprompt_kernels.prompts.json_file import to_json

    return json.dumps(to_json("figures", figures), indent=1, allow_nan=False) + "\n"
