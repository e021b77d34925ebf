"""Hook of mkdocs: files outside docs/ become pages of the site, and links between all of them are rewritten.

The pages are written for a code host, where a link is relative to the file that has it. A link may lead out of docs/,
to a file of the repository. Such a file becomes a page too: Markdown as it is, text in a code block, a folder as a list
of its files. So nothing has to be hosted elsewhere, and the address of a repository is not needed.
"""

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLACES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".jsonl": "json", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".py": "python", ".toml": "toml"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"  # the site's search leaves these pages out
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"(^(```+|~~~+).*?^\2\s*$)", re.DOTALL | re.MULTILINE)

_source_of: dict[str, str] = {}
"""From a page of the site to its file in the repository, both relative: "index.md" -> "README.md"."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside docs/ that a page links to, and for those that these link to."""
    _source_of.clear()
    pending = list(PLACES)
    for file in files.documentation_pages():
        _source_of[file.src_uri] = f"docs/{file.src_uri}"
        pending += linked_outside(f"docs/{file.src_uri}", file.content_string)
    while pending:
        source = pending.pop()
        place = place_of(source)
        if place in _source_of:
            continue
        if not (ROOT / source).exists():
            raise PluginError(f"a page links to {source}, which is not there")
        _source_of[place] = source
        content = page_text(source)
        files.append(File.generated(config, place, content=content))
        if source.endswith(".md"):
            pending += linked_outside(source, content)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes each relative link lead to the place that its file has in the site."""
    place = page.file.src_uri
    source = _source_of.get(place)
    if source is None or not source.endswith(".md"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if not path or ":" in path:
            return match[0]
        target = place_of(resolved(source, path))
        relative = posixpath.relpath(target, posixpath.dirname(place) or ".")
        return f"{match[1]}{relative}{'#' + anchor if anchor else ''}{match[3]}"

    return outside_of_code(markdown, lambda text: _LINK.sub(moved, text))


def outside_of_code(markdown: str, change) -> str:
    """The page with `change` applied to what is not in a fenced block."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def linked_outside(source: str, text: str) -> list[str]:
    """The files outside docs/ that a file of the repository links to."""
    targets = [match[2].partition("#")[0] for match in _LINK.finditer(_FENCE.sub("", text))]
    paths = [resolved(source, target) for target in targets if target and ":" not in target]
    return [path for path in paths if not path.startswith("docs/")]


def resolved(source: str, target: str) -> str:
    """A link of a file, from the root of the repository on."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def place_of(source: str) -> str:
    """Where a file of the repository is in the site."""
    if source in PLACES:
        return PLACES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/").replace(".ipynb", ".md")
    if (ROOT / source).is_dir():
        return f"files/{source}/index.md"
    return f"files/{source}" if source.endswith(".md") else f"files/{source}.md"


def page_text(source: str) -> str:
    """The Markdown of a file or folder outside docs/."""
    path = ROOT / source
    if path.is_dir():
        names = sorted(f"- `{entry.name}`" for entry in path.iterdir() if not entry.name.startswith((".", "__")))
        return f"{HIDDEN}# {source}\n\nA folder of the repository:\n\n" + "\n".join(names) + "\n"
    text = path.read_text(encoding="utf-8")
    if source in PLACES:
        return text
    if path.suffix == ".md":
        return HIDDEN + text
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    language = LANGUAGES.get(PurePosixPath(source).suffix, "text")
    return f"{HIDDEN}# {source}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
