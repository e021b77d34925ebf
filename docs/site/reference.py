"""Hook of mkdocs: pages of the API reference, one a package or module, with every name of its `__all__`.

The names are read from the source, so that a new one appears by itself and the package need not be built. What a name
does is in its docstring, which mkdocstrings puts in its place.
"""

import ast
import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

NEWLINE = "\n"  # in an f-string of Python 3.11
PACKAGE = Path(__file__).parents[2] / "softprompt_kernels"
ROOMS = (
    "ops",
    "losses",
    "losses.functional",
    "prompts",
    "models",
    "formats",
    "integrations",
    "compress",
    "serve",
    "testing.cases",
    "errors",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {room: page_of(room) for room in ROOMS}
    for room, page in pages.items():
        files.append(File.generated(config, f"reference/{room}.md", content=page))
    files.append(File.generated(config, "reference/index.md", content=front_page(pages)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of the pages of docs/ and the papers that a docstring names."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    pages = {f"docs/{file.src_uri}": file.dest_uri for file in files.documentation_pages()}

    def linked(match: re.Match[str]) -> str:
        place = pages.get(match[0])
        return f'<a href="../{place}">{match[0]}</a>' if place else match[0]

    html = re.sub(r"docs/[\w/-]+\.md", linked, html)
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">\g<0></a>', html)


def page_of(room: str) -> str:
    """The page of one package or module."""
    names, summary = public(room)
    if not names:
        raise PluginError(f"softprompt_kernels.{room} has no public name")
    title = f"# softprompt_kernels.{room}\n\n{as_markdown(summary)}\n"
    return title + "".join(f"\n::: {path}\n" for path in names.values())


def as_markdown(docstring: str) -> str:
    """A docstring with its indented formulas and its examples of Python as blocks of code."""
    blocks = [
        f"```text\n{textwrap.dedent(block)}\n```" if re.match(r" {4}|>>>", block) else block
        for block in docstring.split("\n\n")
    ]
    return "\n\n".join(blocks)


def public(room: str) -> tuple[dict[str, str], str]:
    """From each public name of a package to the path of its definition, and the docstring of the package.

    Public is what `__all__` has; without it, each class and function without an underscore.
    """
    folder = PACKAGE / room.replace(".", "/")
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    module = f"softprompt_kernels.{room}" if room else "softprompt_kernels"
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    named = (node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    names = [node.name for node in named if not node.name.startswith("_")]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    return {name: origin.get(name, f"{module}.{name}") for name in names}, ast.get_docstring(tree) or ""


def front_page(pages: dict[str, str]) -> str:
    """What each package is for, and where the names of the top level are explained."""
    rows = [f"| [`softprompt_kernels.{room}`]({room}.md) | {public(room)[1].splitlines()[0]} |" for room in pages]
    links = [
        f"- [`{name}`]({room}.md#{public(room)[0][name]})"
        for name in public("")[0]
        if (room := next((room for room in pages if name in public(room)[0]), None))
    ]
    return f"""# API reference

Every public name, from its docstring. Names with a leading underscore, and modules that are not listed here, may change
without notice.

| package or module | what it has |
|---|---|
{NEWLINE.join(rows)}

## Names of the top level

These can be imported from `softprompt_kernels` itself. Each is imported when it is first used.

{NEWLINE.join(links)}
"""
