"""Compositions where recall is known: contexts of key-value pairs, no key in two of them, in 8 tokens each.

`python -m tests.compress.composition.recall_compositions TEXTS SEEDS [STEPS [RATE]]` prints what they recover on
held-out queries: the mean over seeds, the least and the most.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from softprompt_kernels.compress import CompressConfig, compose, compress
from softprompt_kernels.compress.composition.figures import STUDENTS
from softprompt_kernels.compress.report.table import table_text
from tests.compress.distill import recall_model
from tests.compress.distill.recall_model import RecallTask, save_recall_model

SETTINGS = {"tokens": 8, "selfstudy": 0, "new_tokens": 1, "steps": 0, "device": "cpu"}


def recall_runs(model: Path, folder: Path, texts: int, seed: int) -> list[Path]:
    """The folders of matched runs about so many contexts, with keys of their own."""
    keys, share, runs = random.Random(seed).sample(recall_model.KEYS, 32), 32 // texts, []
    for number in range(texts):
        own = folder / f"{seed}-{number}"
        own.mkdir()
        with patch.object(recall_model, "KEYS", keys[share * number : share * (number + 1)]):
            files = RecallTask.of(100 * seed + number).write(own)
        compress(CompressConfig.model_validate({**SETTINGS, **files, "model": str(model), "output": own / "run"}))
        runs.append(own / "run")
    return runs


def recovered(model: Path, folder: Path, texts: int, seed: int, **options: Any) -> dict[str, float]:
    """Means over contexts of what is recovered on held-out queries, by student; `options` are those of `compose`."""
    runs = recall_runs(model, folder, texts, seed)
    figures = compose(runs, folder / f"{seed}-composed", device="cpu", **options)
    mean: dict[str, float] = figures["mean"]["heldout"]
    return mean


def main(texts: int, seeds: int, steps: int = 100, rate: float = 5e-3) -> None:
    """Print the table."""
    with (
        tempfile.TemporaryDirectory() as root,
        patch("softprompt_kernels.compress.run.save_curves"),
        patch("softprompt_kernels.compress.run.save_report"),
    ):
        folder = Path(root)
        model = save_recall_model(folder / "model")
        found = [recovered(model, folder, texts, seed, steps=steps, learning_rate=rate) for seed in range(seeds)]
    values = {name: [one[name] for one in found] for name in STUDENTS}
    rows = [
        [word, *(f"{of(of_student):.3f}" for of_student in values.values())]
        for word, of in (("mean", lambda x: sum(x) / len(x)), ("least", min), ("most", max))
    ]
    print(table_text([f"{texts} texts", *STUDENTS.values()], rows))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *map(float, sys.argv[4:5]))
