"""The file of a diagnosis."""

from pathlib import Path

import pytest

from softprompt_kernels.compress.evaluate.diagnosis import CapacityPoint, Diagnosis, Finding, read_diagnosis
from softprompt_kernels.errors import SoftPromptError


@pytest.fixture
def diagnosis() -> Diagnosis:
    return Diagnosis(
        findings=(Finding(cause="capacity", sentence="It is short.", evidence=(("tokens", "8"),), gain=0.2),),
        heldout_recovered=0.5,
        train_recovered=0.6,
        capacity=(CapacityPoint(tokens=8, heldout=0.5, train=0.6, seconds=1.0),),
        prompt_tokens=8,
        rate_test=None,
        families=(),
        seconds=2.0,
    )


def test_what_is_written_is_read_back(diagnosis: Diagnosis, tmp_path: Path) -> None:
    path = tmp_path / "diagnosis.json"
    path.write_text(diagnosis.model_dump_json())
    assert read_diagnosis(path) == diagnosis


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"capacity","sentence"', '"colour","sentence"', "findings.0.cause: Input should be 'capacity'"),
        ('"prompt_tokens":8', '"prompt_tokens":"many"', "prompt_tokens: Input should be a valid integer"),
        ('"format":1', '"format":2', "has format 2, accepted is 1"),
        ('"format":1', '"format":2,"colours":3', "has format 2, accepted is 1"),
        ('"format":1', '"format":1,"colours":3', "colours: Extra inputs are not permitted"),
        ('"format":1,', "", "format: Field required"),
        ('{"format"', '["format"', "cannot be read: the file"),
    ],
)
def test_a_broken_file_is_refused(diagnosis: Diagnosis, tmp_path: Path, old: str, new: str, message: str) -> None:
    path, text = tmp_path / "diagnosis.json", diagnosis.model_dump_json()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(SoftPromptError, match=message):
        read_diagnosis(path)
    with pytest.raises(SoftPromptError, match="cannot be read"):
        read_diagnosis(tmp_path / "none.json")
