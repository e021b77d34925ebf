"""Two finished runs of `compress` on a tiny model, about two texts, which no test may change."""

import json
from pathlib import Path

import pytest

from softprompt_kernels.compress import CompressConfig, compress

TEXTS = {
    "mill": "Mira Vale keeps the blue mill. It grinds 40 sacks a day. The river Osk turns it.",
    "tower": "Ole Brandt looks after the green tower. It has 168 steps. Its lamp was lit in 1856.",
}
QUESTIONS = {
    "mill": ("Who keeps it?", "What turns it?", "Which hue?", "How many sacks?", "Which river?"),
    "tower": ("Who looks after it?", "How many steps?", "Which hue?", "When was it lit?", "Is there a lamp?"),
}
"""Two are held out. The third is asked of both texts."""


def make_run(name: str, model: Path, folder: Path, **options: object) -> Path:
    """The folder of a run about one of the texts, with two queries held out, and one for the test about the mill."""
    files = {"context": folder / "text.txt", "queries": folder / "queries.jsonl", "heldout": folder / "heldout.jsonl"}
    folder.mkdir()
    files["context"].write_text(TEXTS[name])
    for part, questions in (("queries", QUESTIONS[name][2:]), ("heldout", QUESTIONS[name][:2])):
        files[part].write_text("".join(json.dumps({"input": question}) + "\n" for question in questions))
    if name == "mill":
        files["test"] = folder / "test.jsonl"
        files["test"].write_text('{"input": "What is blue?"}\n')
    settings = {"selfstudy": 0, "tokens": 6, "new_tokens": 4, "matching_steps": 2, "steps": 0, "samples": 2}
    values = {**files, **settings, "model": str(model), "output": folder / "run", "device": "cpu", **options}
    compress(CompressConfig.model_validate(values))
    return folder / "run"


@pytest.fixture(scope="session")
def runs(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the runs, by the name of their text."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_curves", "save_report"):  # they take longer than everything else
            patch.setattr(f"softprompt_kernels.compress.run.{name}", lambda *_: None)
        return {name: make_run(name, tiny_model_folder, root / name) for name in TEXTS}
