"""`softprompt inspect`: what a prompt is, in any format, and whether it fits a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt_kernels.cli.display import show_pairs
from softprompt_kernels.cli.options import DeviceName, DtypeName
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.sizes import size

PromptPath = Annotated[
    Path, typer.Argument(metavar="PROMPT", help="File or folder of a prompt, in any format.", show_default=False)
]
ModelToFit = Annotated[
    str | None,
    typer.Option("--model", help="Also say whether it fits this model (folder or hub name).", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(
    path: PromptPath,
    *,
    model: ModelToFit = None,
    as_json: AsJson = False,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Say what a prompt is, in any format that import takes.

    The format is found from the content. No code of a file is run. With --model, a prompt that does not fit ends with
    exit code 1.
    """
    from softprompt_kernels.formats.files import read
    from softprompt_kernels.formats.inspection import fit, has_fingerprint, inspection

    quiet_libraries()
    content = read(path)
    facts = inspection(path, content)
    if model is not None:
        from softprompt_kernels.compress import load_model

        reasons = fit(content, *load_model(model, dtype, device))
        facts["model"] = {
            "name": model,
            "fits": not reasons,
            "compared": "weights" if has_fingerprint(content) else "shapes",
            "reasons": reasons,
        }
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        show_pairs(list(rows(facts)))
    if model is not None and not facts["model"]["fits"]:
        raise typer.Exit(1)


def rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts as pairs of text; what the file does not say is left out."""
    yield "format", f"{facts['format']}: {facts['description']}"
    yield "kind", " ".join(filter(None, (facts["kind"], facts["peft_type"] and f"({facts['peft_type']})")))
    frozen = f", the first {facts['frozen_tokens']} frozen" if facts["frozen_tokens"] else ""
    yield "tokens", f"{facts['tokens']}{frozen}"
    yield "sizes", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["sizes"].items())
    yield "numbers", f"{facts['numbers']:,} in {facts['dtype']}, {size(facts['bytes'])} of files"
    if facts["base_model"] or facts["family"]:
        family = facts["family"] and f"(family {facts['family']})"
        yield "base model", " ".join(filter(None, (facts["base_model"] or "not named", family)))
    yield "positions", facts["positions"]
    context = facts["context"]
    if context.get("sha256"):
        texts = f" in {len(context['contexts'])} texts" if isinstance(context.get("contexts"), list) else ""
        yield "context", f"{context.get('tokens', '?')} tokens{texts}, SHA-256 {context['sha256']}"
    for name in ("objective", "figures"):
        if facts[name]:
            yield name, ", ".join(f"{key} {shown(value)}" for key, value in facts[name].items())
    if "model" in facts:
        fits, compared = facts["model"]["fits"], facts["model"]["compared"]
        yield "fits", f"yes ({compared} compared)" if fits else f"no: {'; '.join(facts['model']['reasons'])}"


def shown(value: Any) -> str:
    """A figure as short text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
