"""The mutants fit the sources: each text that a mutant replaces occurs exactly once. Needs no compiler."""

from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_old_text_occurs_exactly_once(mutant: Mutant) -> None:
    assert (ROOT / "csrc" / "cuda" / mutant.source).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_names_differ_and_tests_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert (ROOT / mutant.tests[0]).is_file()
