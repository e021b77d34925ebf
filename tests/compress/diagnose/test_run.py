"""A diagnosis reads a run as it was, changes nothing in it, and says what is in the way."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, Interrupted, compress, diagnose_run
from softprompt_kernels.compress.diagnose import collect
from softprompt_kernels.compress.diagnose.capacity_curve import lengths
from softprompt_kernels.compress.evaluate.diagnosis import read_diagnosis
from softprompt_kernels.compress.process.lock import locked
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]
MakeRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_plot")


def digests(folder: Path) -> dict[str, str]:
    """All files below a folder but the diagnosis."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "diagnosis.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_run_is_as_before_but_for_the_diagnosis(make_config: Make, recording_reporter: Any, kind: str) -> None:
    config = make_config(kind=kind)
    compress(config)
    before = digests(config.output)
    reporter = recording_reporter()
    found = diagnose_run(config.output, reporter)
    assert digests(config.output) == before
    assert read_diagnosis(config.output / "diagnosis.json") == found
    assert found.findings[0].cause != "nothing wrong"
    assert found.rate_test is not None and len(found.capacity) == 5
    assert {"Matching at other lengths", "Rate range test"} <= set(reporter.done)
    assert not any(name.startswith(("Teacher", "No context", "Soft prompt")) for name in reporter.done), "all is stored"
    assert diagnose_run(config.output).findings == found.findings


def test_the_curve_at_the_length_of_a_run_is_what_the_run_recovers(make_run: MakeRun) -> None:
    folder = make_run(tokens=5, matching_steps=0)
    found = diagnose_run(folder, full=True)
    assert [point.tokens for point in found.capacity] == lengths(5, 59) == [1, 2, 5, 10, 20]
    figures = json.loads((folder / "evaluation.json").read_text())
    assert found.capacity[2].heldout == pytest.approx(figures["heldout"]["recovered"], abs=1e-4)
    assert found.capacity[2].train == pytest.approx(figures["train"]["recovered"], abs=1e-4)
    assert lengths(20, 59) == [5, 10, 20, 40] and lengths(1, 3) == [1, 2]


def test_a_run_of_an_earlier_version_is_measured_again(make_run: MakeRun, recording_reporter: Any) -> None:
    folder = make_run(tokens=4)
    found = diagnose_run(folder)
    (folder / "details.json").unlink()
    reporter = recording_reporter()
    again = diagnose_run(folder, reporter)
    assert "Soft prompt, heldout queries" in reporter.done
    assert again.heldout_recovered == pytest.approx(found.heldout_recovered, abs=1e-4)
    assert [one.cause for one in again.findings] == [one.cause for one in found.findings]


def test_what_was_deleted_from_the_cache_is_made_again_elsewhere(make_run: MakeRun) -> None:
    folder = make_run(tokens=4, steps=3)
    found = diagnose_run(folder)
    shutil.rmtree(folder / "cache" / "targets")
    shutil.rmtree(folder / "cache" / "states")
    before = digests(folder)
    again = diagnose_run(folder)
    assert digests(folder) == before
    assert again.findings == found.findings


def test_a_damaged_cache_is_not_written_to(make_run: MakeRun) -> None:
    """The files that a diagnosis links are replaced, and not changed."""
    folder = make_run(tokens=4, steps=3)
    index = folder / "cache" / "states" / "index.json"
    index.write_text(index.read_text().replace('"key": "', '"key": "0'))
    before = digests(folder)
    diagnose_run(folder)
    assert digests(folder) == before


def test_what_a_killed_diagnosis_left_is_deleted(make_run: MakeRun) -> None:
    folder = make_run()
    left = folder / collect.SCRATCH / "cache" / "rows-00000.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"part")
    diagnose_run(folder)
    assert not (folder / collect.SCRATCH).exists()


def test_an_interrupted_diagnosis_leaves_nothing(make_run: MakeRun, recording_reporter: Any) -> None:
    folder = make_run(tokens=4)
    before = digests(folder)
    with pytest.raises(KeyboardInterrupt):
        diagnose_run(folder, recording_reporter("Matching at other lengths", 3))
    assert digests(folder) == before and not (folder / "diagnosis.json").exists()
    assert not (folder / collect.SCRATCH).exists()


# What is in the way


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="missing is no folder, accepted is the folder of a run"):
        diagnose_run(tmp_path / "missing")
    with pytest.raises(SoftPromptError, match=r"holds no run: run.json or config.yaml is missing or broken"):
        diagnose_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "after"), [("Teacher's answers", 3), ("Training", 2)])
def test_an_unfinished_run_is_refused(make_config: Make, recording_reporter: Any, stage: str, after: int) -> None:
    config = make_config()
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        compress(config, recording_reporter(stage, after))
    before = digests(config.output)
    with pytest.raises(SoftPromptError, match=r"is not finished.* run the command of the run again, and diagnose it"):
        diagnose_run(config.output)
    assert digests(config.output) == before
    compress(config)
    diagnose_run(config.output)


def test_inputs_that_have_moved_or_changed_are_named(make_run: MakeRun, tmp_path: Path, recall_folder: Path) -> None:
    model = Path(shutil.copytree(recall_folder, tmp_path / "here"))
    folder = make_run(model=str(model))
    model.rename(tmp_path / "there")
    with pytest.raises(SoftPromptError, match=r"model: cannot load .*here.* named in .*config.yaml: correct it there"):
        diagnose_run(folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(model), str(tmp_path / "there")))
    assert diagnose_run(folder).findings[0].cause == "nothing wrong"
    context = tmp_path / "context.txt"
    context.write_text(context.read_text() + " f1")
    with pytest.raises(SoftPromptError, match=r"was made with another context than config.yaml names now"):
        diagnose_run(folder)
    context.unlink()
    with pytest.raises(SoftPromptError, match=r"context: .* cannot be read .* named in .*config.yaml"):
        diagnose_run(folder)


def test_a_run_that_has_moved_is_found_where_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run().rename(tmp_path / "moved")
    diagnose_run(folder)
    assert (folder / "diagnosis.json").exists() and not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused(make_run: MakeRun) -> None:
    folder = make_run()
    with locked(folder), pytest.raises(SoftPromptError, match="is in use by process"):
        diagnose_run(folder)
