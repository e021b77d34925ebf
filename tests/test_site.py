"""The documentation is built as a site without a warning, has every public name, and loads nothing from the network."""

import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
HOOKS = ROOT / "docs" / "site"
ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice of the theme about another program


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|error", done.stdout + done.stderr, re.IGNORECASE), done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to, what it loads, and the names that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.names |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.add(values.get("href", ""))
        elif "src" in values:
            self.loads.add(values["src"])
        self.loads |= set(re.findall(r"url\(([^)]*)\)", values.get("style", "")))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page: Links(page) for page in sorted(site.rglob("*.html")) if page.name != "404.html"}


def test_every_page_of_the_repository_is_in_the_site(pages: dict[Path, Links], site: Path) -> None:
    expected = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    expected |= {Path(name) for name in ("index.html", "contributing.html", "changelog.html", "notebook.html")}
    assert expected <= {page.relative_to(site) for page in pages}


def test_links_inside_the_site_lead_to_a_page_and_a_place(pages: dict[Path, Links], site: Path) -> None:
    for page, found in pages.items():
        for link in found.links:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if anchor and target in pages and anchor != "__skip":
                assert anchor in pages[target].names, f"{page.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_the_network(pages: dict[Path, Links], site: Path) -> None:
    """Every stylesheet, script and picture that a page loads is a file of the site."""
    for page, found in pages.items():
        for source in found.loads:
            assert source.startswith("data:") or (page.parent / source).resolve().is_file(), f"{page.name}: {source}"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))])
def test_lists_and_tables_are_written_for_both_readers(page: Path) -> None:
    """Code hosts take a list right behind a paragraph, and one nested by two spaces; Python-Markdown takes neither."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"([-*]|\d+\.) ", line):
            assert not before.strip() or re.match(r"([-*]|\d+\.) | {2,}", before), f"no empty line before: {line}"
        assert not re.match(r" {1,3}([-*]|\d+\.) ", line), f"nested by less than 4 spaces: {line}"
        assert not line.startswith("|") or not before or before.startswith("|"), f"no empty line before: {line}"


def test_every_public_name_is_in_the_reference(pages: dict[Path, Links], site: Path) -> None:
    """Of each package and module that has `__all__`; `cli` is a command, `kernels` the inside of the ops."""
    seen = set()
    for source in sorted((ROOT / "softprompt_kernels").rglob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        exported = [node.value for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)]
        parts = source.relative_to(ROOT / "softprompt_kernels").with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if not exported or not module or parts[0] in ("cli", "kernels"):
            continue
        seen.add(module)
        anchors = pages[site / "reference" / f"{module}.html"].names
        for name in ast.literal_eval(exported[0]):
            assert any(re.fullmatch(rf"softprompt_kernels\..*\.{name}", anchor) for anchor in anchors), name
    assert {"ops", "losses", "losses.functional", "testing.cases"} <= seen


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", HOOKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_lists_the_pages_of_a_folder() -> None:
    pages = {"how-to/b.md": "A title", "how-to/index.md": "Z", "how-to/a.md": "B title", "x.md": "X"}
    nav = [{"Home": "x.md"}, {"Guides": "how-to/"}, {"More": [{"All": "how-to/"}]}]
    listed = ["how-to/index.md", "how-to/b.md", "how-to/a.md"]
    assert hook("navigation").filled(nav, pages) == [{"Home": "x.md"}, {"Guides": listed}, {"More": [{"All": listed}]}]


def test_links_out_of_the_documentation_become_pages() -> None:
    repository = hook("repository")
    assert repository.place_of("docs/matching.md") == "matching.md"
    assert repository.place_of("README.md") == "index.md"
    assert repository.place_of("demo/demo.yaml") == "files/demo/demo.yaml.md"
    assert repository.place_of("benchmarks/study/results") == "files/benchmarks/study/results/index.md"
    text = "[a](../demo/demo.yaml) [b](matching.md#x) [c](https://example.org)\n```text\n[d](../LICENSE)\n```\n"
    assert repository.linked_outside("docs/study.md", text) == ["demo/demo.yaml"]


def test_a_link_to_a_missing_file_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nhooks: ['{HOOKS / 'repository.py'}']\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[there](../nowhere.txt)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "nowhere.txt" in done.stderr + done.stdout
