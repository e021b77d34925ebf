"""What `softprompt compress` shows of many contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from softprompt_kernels.cli.display import show_pairs, show_table
from softprompt_kernels.cli.options import as_loaded
from softprompt_kernels.compress.bank.summary import counted
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.sizes import size

if TYPE_CHECKING:
    from softprompt_kernels.compress.bank.forecast import BankPlan

SKIPPED = 3
"""The exit code where contexts were skipped and others are finished."""
_SHOWN = 20  # contexts that a dry run lists


def show_bank(settings: CompressConfig, summary: Mapping[str, Any]) -> None:
    """Print the summary of a bank, and end the command with `SKIPPED` if contexts were skipped."""
    from softprompt_kernels.compress.bank.folder import BankFolder
    from softprompt_kernels.compress.bank.summary import bank_table

    folder = BankFolder(settings.output)
    typer.echo("")
    show_table(*bank_table(summary), highlight="mean ± deviation")
    contexts, skipped = summary["contexts"], summary["skipped"]
    typer.echo("KL: in nats per token, from the model with the full context, on held-out queries.")
    typer.echo(f"{counted(len(contexts))} in prompts of {settings.tokens} tokens, {duration(summary['seconds'])}.\n")
    first = folder.run(next(iter(contexts)))
    given = as_loaded(settings.model, settings.dtype, settings.template_arguments)
    show_pairs(
        [
            ("runs", str(first.path.parent)),
            ("figures", str(folder.summary)),
            *((f"skipped {name}", reason) for name, reason in skipped.items()),
            ("try it", f'softprompt generate {given} --prompt {first.prompt} "..."'),
        ]
    )
    if skipped:
        raise typer.Exit(SKIPPED)


def bank_forecast_lines(forecast: BankPlan) -> list[tuple[str, str]]:
    """A forecast of many contexts as pairs of name and value."""
    names = list(forecast.tokens)
    one, stages = forecast.one, forecast.estimated_seconds
    left = len(names) - _SHOWN
    lines = [(name, f"{forecast.tokens[name]} tokens, {forecast.queries[name]} queries") for name in names[:_SHOWN]]
    return [
        ("contexts", f"{len(names)}, {sum(forecast.tokens.values())} tokens"),
        *((f"  {name}", text) for name, text in lines),
        *([("  ...", f"{left} more")] if left > 0 else []),
        *([("finished", f"{len(forecast.finished)}, which stay as they are")] if forecast.finished else []),
        *((f"skipped {name}", reason) for name, reason in forecast.skipped.items()),
        ("prompts", f"{one.prompt_tokens} tokens and {size(one.prompt_bytes)} of keys and values each"),
        ("KL without context", f"{one.kl_none:.3f} nats per token on a few queries of {forecast.measured}"),
        *((f"  {name.replace('_', ' ')}", duration(seconds)) for name, seconds in stages.items()),
        ("total time", f"at most about {duration(sum(stages.values()))}: together they take less"),
        ("on disk", f"about {size(forecast.disk_bytes)}"),
        ("written", "nothing (dry run)"),
    ]
