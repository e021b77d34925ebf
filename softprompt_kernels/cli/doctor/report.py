"""`softprompt doctor`: reports whether this installation works, and how to repair it if not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.compress.config import Dtype
from softprompt_kernels.errors import SoftPromptError

DISTRIBUTION = "softprompt-kernels"
TESTED_TORCH = "2.13.0"
"""The release of torch that the tests run with. The package metadata has no bound on torch, so that yours is kept."""

TOKENS = 48
"""Tokens of context of the test of a model."""

SHOWN_EXTRAS = ("peft",)
"""Extras that are reported. The others are for developing this package."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, its state, and whether the package cannot work because of it."""

    name: str
    state: str
    fatal: bool = False


def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option(
            "--compile", help="Instead, compile every Triton kernel and check the machine code. Needs no GPU."
        ),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="With --compile: only for this architecture, such as sm_90. Can be repeated."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="With --compile: write all figures to this JSON file.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead, check that this model gives the same behind a prefix: its folder or hub name."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="With --model: float32, bfloat16 or float16. auto: float32.")] = "auto",
    device: Annotated[str, typer.Option(help="With --model: auto, cpu, cuda, cuda:1, ...")] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="With --model: tokens of context.")] = TOKENS,
) -> None:
    """Check the installation: versions, backends, devices, and what is missing.

    The exit code is 0 if the package can work, else 1. With --model: 0 if the model is served, else 1.
    """
    from softprompt_kernels.cli.display import show_pairs

    loading = {"--dtype": dtype != "auto", "--device": device != "auto", "--tokens": tokens != TOKENS}
    if model is None and (given := [name for name, changed in loading.items() if changed]):
        raise SoftPromptError(f"{given[0]}: needs --model")
    if model is not None and compile_kernels:
        raise SoftPromptError("--model: got --compile too, accepted is one of them")

    if compile_kernels:
        from softprompt_kernels.cli.doctor import compile

        compile.check(target or (), json)
        return
    if target or json:
        raise SoftPromptError(f"{'--target' if target else '--json'}: needs --compile")

    if model is not None:
        from softprompt_kernels.cli.doctor import model as checked

        checked.check(checked.Loading(model, dtype, device, tokens))
        return

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
        typer.echo(f"\nThis installation does not work. See: {', '.join(wrong)}.")
        raise typer.Exit(1)
    typer.echo("\nThis installation works.")


def packages() -> list[Finding]:
    """The required packages, and those of `SHOWN_EXTRAS`: the installed version against the lowest that is tested."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, "not installed (run in its folder: pip install .)", fatal=True)]
    findings = [Finding(DISTRIBUTION, importlib.metadata.version(DISTRIBUTION))]
    for requirement in requirements:
        extra = next((name for name in SHOWN_EXTRAS if _is_of_extra(requirement, name)), None)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}) or extra:
            findings.append(_package(requirement, extra))
    return findings


def _is_of_extra(requirement: object, extra: str) -> bool:
    """Whether an extra lists this requirement itself, and not through another extra."""
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
    command = f'pip install "{name}{bound}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        optional = "optional: " if extra else ""
        return Finding(name, f"missing ({optional}{command})", fatal=extra is None)
    if name == "torch":
        release = version.partition("+")[0]
        return Finding(name, version + (" (tested)" if release == TESTED_TORCH else f" (tested: {TESTED_TORCH})"))
    if not bound.contains(version, prereleases=True):
        return Finding(name, f"{version}, accepted is {bound} ({command})", fatal=extra is None)
    return Finding(name, f"{version} (tested from {_lowest(str(bound))})" if str(bound) else version)


def _lowest(bound: str) -> str:
    """The version of the part ">=" of a specifier."""
    return next((part.removeprefix(">=") for part in bound.split(",") if part.startswith(">=")), bound)


def backends() -> list[Finding]:
    """The backends of the ops, most preferred first."""
    try:
        from softprompt_kernels.ops.dispatch import available_backends
    except ImportError as error:
        return [Finding("backends", f"cannot be loaded: {error}", fatal=True)]
    findings = [
        Finding(
            record.name,
            f"{'ready' if record.available else 'not available'}: {record.detail} [{', '.join(record.ops)}]",
        )
        for record in available_backends()
    ]
    if not any(record.available for record in available_backends()):
        findings.append(Finding("backends", "none is available", fatal=True))
    return findings


def devices() -> list[Finding]:
    """The CPU with its number of threads, and the GPUs."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return [Finding("torch", f"cannot be loaded: {error}", fatal=True)]
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [Finding("processor", f"{platform.machine()}, {capability}, threads: {torch.get_num_threads()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    elif torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        findings.append(Finding("cuda", "none: this build of torch is for CPUs only (see pytorch.org for others)"))
    else:
        findings.append(Finding("cuda", "none: torch finds no GPU, or no driver for it"))
    return findings
