"""The text of a build.ninja.

A plan has rules (a command each) and units (a source each, compiled by one of the rules). In a command, IN, OUT and
OPTIONS are ninja's variables. All other text that may hold a dollar passes through `literal`, which escapes it.
"""

from dataclasses import dataclass
from pathlib import Path

IN, OUT, OPTIONS = "$in", "$out", "$options"
DEPENDENCY_FILE = f"{OUT}.d"  # a compiler lists the headers there


@dataclass(frozen=True)
class Unit:
    """One source, compiled with one set of options."""

    source: str  # under csrc
    folder: str  # of its object
    rule: str
    options: str = ""


@dataclass(frozen=True)
class Plan:
    """How one module is built."""

    rules: dict[str, str]  # name -> command; the rule "link" makes the module from the objects
    units: list[Unit]


def literal(text: str) -> str:
    """Text of a command that ninja leaves as it is."""
    return text.replace("$", "$$")


def path(path: Path) -> str:
    """A path in a `build` line, where a space, a colon and a dollar need a dollar before them."""
    return literal(str(path)).replace(" ", "$ ").replace(":", "$:")


def ninja_file(plan: Plan, csrc: Path, target: Path) -> str:
    """The text that builds `target`. Objects lie below the folder of the build.ninja: `<folder>/<source>.o`."""
    lines = []
    for name, command in plan.rules.items():
        lines += [f"rule {name}", f"  command = {command}"]
        if name != "link":
            lines += [f"  depfile = {DEPENDENCY_FILE}", "  deps = gcc"]
    objects = []
    for unit in plan.units:
        objects.append(f"{unit.folder}/{Path(unit.source).with_suffix('').as_posix()}.o")
        lines.append(f"build {objects[-1]}: {unit.rule} {path(csrc / unit.source)}")
        lines.append(f"  options = {literal(unit.options)}")
    lines += [f"build {path(target)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)
