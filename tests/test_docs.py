"""What the README and the pages of docs/ name is there: commands, files, links. tests/test_pages.py runs their code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for language, block in blocks(page) if language == "console" for line in block.splitlines() if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = text(ROOT / "Makefile")
    for target in set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join([*commands(page), *code_spans(page)]))):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE))


def test_every_command_is_of_a_known_kind() -> None:
    known = {"make", "pip", "softprompt", "python", "git", "pre-commit"}
    for page in PAGES:
        assert {line.split()[0] for line in commands(page)} <= known, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in code spans that start with a folder of the repository, and Python blocks of CONTRIBUTING aside."""
    for span in code_spans(page):
        if re.fullmatch(r"(softprompt_kernels|csrc|tests|benchmarks|examples|docs|demo)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings(linked)}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.search(r"\b(TIME_[A-Z]+|TODO|FIXME|XXX)\b", text(page))


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", text(page), flags=re.MULTILINE)


def test_installs_without_pulling_a_torch(tmp_path: Path) -> None:
    assert "pip install ." in commands(ROOT / "README.md")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", ".", "--dry-run", "--quiet", "--report", str(report)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert re.search(r'"name": "torch"', report.read_text()) is None


def test_the_page_of_models_names_those_of_the_registry() -> None:
    from softprompt_kernels.models.registry import FAMILIES, REFUSED, WRAPPERS

    page = text(ROOT / "docs" / "models.md")
    served = page.partition("## What is served")[2].partition("Limits that follow")[0]
    refused = page.partition("## What is refused")[2].partition("Also refused")[0]
    names = re.compile(r"`([a-z]\w*)`")
    assert set(names.findall(served)) - {"model_type"} == {*FAMILIES, *WRAPPERS}
    assert set(names.findall(refused)) - {"model_type"} == REFUSED.keys()
