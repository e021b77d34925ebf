"""`softprompt doctor`: whether this installation can work, and what to do where it cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.errors import SoftPromptError

DISTRIBUTION = "softprompt-kernels"
TRIED_TORCH = "2.13.0"
"""The release of torch that the tests were run with; the metadata has no bound on torch, so as to keep yours."""

SHOWN_EXTRAS = ("peft",)
"""Extras that are worth a line; others serve the development of the package itself."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and whether that keeps the package from working."""

    name: str
    state: str
    fatal: bool = False


def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option("--compile", help="Compile every GPU kernel instead, which needs no GPU, and check the code."),
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="With --compile: for this architecture only, as sm_90 (repeatable).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="With --compile: write all figures there.")] = None,
) -> None:
    """Show versions, backends and devices, and what is missing; the exit code is 0 if it can work, else 1."""
    from softprompt_kernels.cli.display import show_pairs

    if compile_kernels:
        from softprompt_kernels.cli import compiled

        compiled.check(target or (), json)
        return
    if target or json:
        raise SoftPromptError(f"{'--target' if target else '--json'} is for doctor --compile")

    sections = {
        "Versions": [Finding("python", platform.python_version()), *packages()],
        "Backends": backends(),
        "Devices": devices(),
    }
    for title, findings in sections.items():
        typer.echo(title)
        show_pairs([(f"  {finding.name}", finding.state) for finding in findings])
    wrong = [finding.name for findings in sections.values() for finding in findings if finding.fatal]
    if wrong:
        typer.echo(f"\nNot usable: see {', '.join(wrong)}.")
        raise typer.Exit(1)
    typer.echo("\nUsable.")


def packages() -> list[Finding]:
    """Each package that ours asks for: the version here against the lowest that was tried."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, "not installed; in its folder: pip install .", fatal=True)]
    findings = [Finding(DISTRIBUTION, importlib.metadata.version(DISTRIBUTION))]
    for requirement in asked:
        extra = next((name for name in SHOWN_EXTRAS if _only_with(requirement, name)), None)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}) or extra:
            findings.append(_package(requirement, extra))
    return findings


def _only_with(requirement: object, extra: str) -> bool:
    """Whether an extra brings this requirement by itself, rather than by naming another extra."""
    marker = getattr(requirement, "marker", None)
    name = getattr(requirement, "name", "")
    return (
        marker is not None
        and name != DISTRIBUTION
        and not marker.evaluate({"extra": ""})
        and bool(marker.evaluate({"extra": extra}))
    )


def _package(requirement: object, extra: str | None) -> Finding:
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    name, bound = requirement.name, requirement.specifier
    get = f'pip install "{DISTRIBUTION}[{extra}]"' if extra else f'pip install "{name}{bound}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        kind = "optional, " if extra else ""
        return Finding(name, f"missing ({kind}{get})", fatal=extra is None)
    if name == "torch":
        release = version.partition("+")[0]
        return Finding(name, version + (", tried" if release == TRIED_TORCH else f", untried: {TRIED_TORCH} was"))
    if not bound.contains(version, prereleases=True):
        return Finding(name, f"{version}, accepted is {bound} ({get})", fatal=extra is None)
    return Finding(name, f"{version}, tried from {_lowest(str(bound))}" if str(bound) else version)


def _lowest(bound: str) -> str:
    return next((part.removeprefix(">=") for part in bound.split(",") if part.startswith(">=")), bound)


def backends() -> list[Finding]:
    """What can run the operations, most preferred first."""
    try:
        from softprompt_kernels.ops.dispatch import available_backends
    except ImportError as error:
        return [Finding("backends", f"cannot be loaded: {error}", fatal=True)]
    findings = [
        Finding(
            record.name, f"{'ready' if record.available else 'not here'}: {record.detail} [{', '.join(record.ops)}]"
        )
        for record in available_backends()
    ]
    if not any(record.available for record in available_backends()):
        findings.append(Finding("backends", "none can run here", fatal=True))
    return findings


def devices() -> list[Finding]:
    """The processor with its threads, and GPUs."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return [Finding("torch", f"cannot be loaded: {error}", fatal=True)]
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [Finding("processor", f"{platform.machine()}, {capability}, threads: {torch.get_num_threads()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            memory = f"{card.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(f"cuda:{index}", f"{card.name}, sm_{card.major}{card.minor}, {memory}"))
    elif torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        findings.append(Finding("cuda", "none: this torch is built for CPUs only (see pytorch.org for another build)"))
    else:
        findings.append(Finding("cuda", "none: torch finds no GPU, or no driver for it"))
    return findings
