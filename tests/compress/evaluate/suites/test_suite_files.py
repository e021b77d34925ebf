"""The files of a suite: written once, read by the query reader, and never over something else."""

from pathlib import Path

import pytest

from softprompt_kernels.compress import Suite, write_suite
from softprompt_kernels.compress.sources.queries import Query, load_queries
from softprompt_kernels.compress.suite_run import names_fact
from softprompt_kernels.errors import SoftPromptError

TRAIN, TEST = (Query("Größe?", references=("7", "sieben")),), (Query("Farbe?", references=("rot",)),)
SUITE = Suite("needle", "contains", "Die Tür ist rot.\n7 Meter.", TRAIN, TEST, (("tür",),), (("seed", 3),))


def test_a_suite_is_written_and_read_back(tmp_path: Path) -> None:
    files = write_suite(SUITE, tmp_path / "new" / "suite")
    assert files.context.read_text(encoding="utf-8") == SUITE.context
    assert (tuple(load_queries(files.train)), tuple(load_queries(files.test))) == (TRAIN, TEST)
    before = {path: path.read_bytes() for path in files.folder.iterdir()}
    files.figures.write_text("{}")
    files.run.mkdir()
    assert write_suite(SUITE, files.folder) == files
    assert {path: path.read_bytes() for path in before} == before


def test_another_suite_and_other_files_are_kept(tmp_path: Path) -> None:
    files = write_suite(SUITE, tmp_path / "suite")
    other = Suite("needle", "contains", "Ein anderer Text.", TRAIN, TEST)
    with pytest.raises(SoftPromptError, match=r"holds another suite, which differs in context.txt"):
        write_suite(other, files.folder)
    assert files.context.read_text(encoding="utf-8") == SUITE.context
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(SoftPromptError, match=r"holds letter.txt, which is of no suite"):
        write_suite(SUITE, tmp_path)
    with pytest.raises(SoftPromptError, match="cannot be written"):
        write_suite(SUITE, tmp_path / "letter.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "suite"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("Tell me about AMBER-otter.", True),
        ("What is amber-otter-2?", False),
        ("What is 12345?", True),
        ("What is 123456?", False),
        ("Where is the otter?", False),
    ],
)
def test_a_fact_is_named_by_whole_words(query: str, named: bool) -> None:
    assert names_fact(["Summarise the text.", query], ("amber-otter", "12345")) == named
