"""`softprompt report`: the page of a finished run, where it is written, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

from tests.cli.conftest import Finished

Run = Callable[..., Result]


def test_compress_writes_the_page_and_report_the_same_again(run: Run, finished: Finished, tmp_path: Path) -> None:
    page = finished.folder / "report.html"
    assert f"report   {page}" in finished.result.stdout
    again = tmp_path / "again.html"
    result = run("report", finished.folder, "--output", again)
    assert (result.exit_code, result.stdout) == (0, f"report  {again}\n")
    assert again.read_bytes() == page.read_bytes()


def test_without_an_output_the_page_of_the_run_is_replaced(run: Run, finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cache")))
    page = folder / "report.html"
    page.write_text("old")
    result = run("report", folder)
    assert (result.exit_code, result.stdout) == (0, f"report  {page}\n")
    assert "<h1>Soft prompt of text.txt</h1>" in page.read_text()


def test_bad_input_is_refused(run: Run, finished: Finished, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "missing",), "is not a folder; accepted is the --output of `softprompt compress`"),
        ((tmp_path,), "is not the folder of a run"),
        ((finished.folder, "--output", tmp_path), "which is a folder"),
        ((finished.folder, "--output", tmp_path / "missing" / "page.html"), "is not a folder"),
    ):
        result = run("report", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split()), result.stderr
