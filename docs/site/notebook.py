"""Hook of mkdocs: a notebook of docs/ becomes a page, with the outputs that it was saved with."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(DOCS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        content = "\n\n".join(part for cell in cells for part in parts_of(cell))
        files.append(File.generated(config, f"{path.stem}.md", content=content + "\n"))
    return files


def parts_of(cell: dict[str, Any]) -> list[str]:
    """A cell and its outputs as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *(part for output in cell["outputs"] if (part := shown(output)))]


def shown(output: dict[str, Any]) -> str:
    """An output: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        name, picture = "".join(data.get("text/plain", "a plot")), "".join(data["image/png"]).strip()
        return f"![{name}](data:image/png;base64,{picture})"
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""
