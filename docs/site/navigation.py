"""Hook of mkdocs: an entry of the navigation that ends with a slash becomes the list of the pages in that folder.

The pages are in the order of their titles, and a page `index.md` is the first one. That of the guides gets a list of
the others. On a code host the listing of the folder is that list.
"""

import posixpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

LISTED = ("how-to/",)  # folders whose first page gets a list of the others


@event_priority(-50)  # after the hooks that add pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {file.src_uri: title_of(file.content_string) for file in files.documentation_pages()}
    config.nav = [filled(entry, pages) for entry in config.nav or []]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    if not (page.file.src_uri.endswith("/index.md") and f"{folder}/" in LISTED):
        return markdown
    others = {file.src_uri: title_of(file.content_string) for file in files.documentation_pages()}
    below = [(title, path) for path, title in others.items() if posixpath.dirname(path) == folder]
    lines = [f"- [{title}]({posixpath.basename(path)})" for title, path in sorted(below) if path != page.file.src_uri]
    return "\n".join([markdown, *lines, ""])


def filled(entry: Any, pages: dict[str, str]) -> Any:
    """An entry of the navigation with the pages of its folder."""
    if isinstance(entry, list):
        return [filled(one, pages) for one in entry]
    if isinstance(entry, dict):
        return {title: filled(value, pages) for title, value in entry.items()}
    if not entry.endswith("/"):
        return entry
    below = [page for page in pages if page.startswith(entry)]
    return sorted(below, key=lambda page: (not page.endswith("index.md"), pages[page].lower()))


def title_of(text: str) -> str:
    """The first heading of a page."""
    return next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), "")
