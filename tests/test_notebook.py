"""The notebook runs from top to bottom, and gives the outputs that it was saved with.

To save the outputs of a changed notebook: `python -m tests.test_notebook`.
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
NUMBER = re.compile(r"\d+\.\d+|\d+")
TOLERANCE = 0.2  # of the printed numbers: processors round differently, and 100 steps add up


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with new outputs. It works in an empty folder, offline."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # a kernel takes the environment of its parent
    try:
        return NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def texts(notebook: NotebookNode) -> list[str]:
    """What each cell printed. Warnings go to another stream."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))


def test_the_notebook_runs_and_gives_its_saved_outputs(tmp_path: Path) -> None:
    saved = nbformat.read(NOTEBOOK, as_version=4)
    now = executed(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    for there, here in zip(texts(saved), texts(now), strict=True):
        assert NUMBER.sub("#", there) == NUMBER.sub("#", here)
        for expected, got in zip(NUMBER.findall(there), NUMBER.findall(here), strict=True):
            assert abs(float(got) - float(expected)) <= TOLERANCE * abs(float(expected)), f"{there}{here}"
    assert pictures(now) == pictures(saved) == 1


def test_the_notebook_is_small_and_has_no_errors_and_no_paths() -> None:
    assert NOTEBOOK.stat().st_size < 60_000
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r'"output_type": "error"|"name": "stderr"|/(home|tmp|work|root)/', content)


def save() -> None:
    """Writes the notebook with new outputs, without warnings, times and other traces of this run."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(nbformat.read(NOTEBOOK, as_version=4), Path(folder))
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    save()
