"""The cells of the study: a cell is one text, method, ratio and seed, and is measured by one run.

The plan has every method that needs no training at all ratios on all texts, and the trained ones at two ratios on two
texts. That is about three hours on two cores. The cheap cells come first, and of those the first seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.corpus import Text
from benchmarks.study.methods import METHODS, Method
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.errors import SoftPromptError

RATIOS = (4, 8, 16, 32)
SEEDS = (0, 1, 2)
TRAINED_RATIOS = (8, 32)
TRAINED_TEXTS = ("demo", "garden")
DECIDING = (
    *("init", "objective", "nll_weight", "loss_temperature", "frozen_tokens"),
    *(
        "steps",
        "batch_size",
        "learning_rate",
        "relative_learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
    ),
)
MATCHING = ("matching_rows", "matching_steps")
FORMAT = 1  # of the results; a new number measures every cell again

# The same for all methods: how the teacher answers, for training and for evaluation.
ANSWERS = {"new_tokens": 48, "sample_temperature": 0.5, "sample_batch": 128}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    text: Text
    method: Method
    ratio: int
    seed: int

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.text.name} {self.method.name}-{self.ratio}x-s{self.seed}"


def grid(
    texts: Iterable[Text],
    methods: Iterable[Method] = tuple(METHODS.values()),
    ratios: Sequence[int] = RATIOS,
    seeds: Sequence[int] = SEEDS,
    everything: bool = False,
) -> list[Cell]:
    """The planned cells of these texts, methods, ratios and seeds, in the order in which they are measured.

    Args:
        everything: also the trained cells that the plan leaves out.

    Raises:
        SoftPromptError: a ratio is not above 1, or a seed is negative.
    """
    for ratio in ratios:
        if ratio < 2:
            raise SoftPromptError(f"ratio: got {ratio}, accepted is 2 or more")
    for seed in seeds:
        if seed < 0:
            raise SoftPromptError(f"seed: got {seed}, accepted is 0 or more")
    cells = [
        Cell(text, method, ratio, seed) for text in texts for method in methods for ratio in ratios for seed in seeds
    ]
    kept = [cell for cell in cells if everything or _planned(cell)]
    order = list(METHODS)
    return sorted(kept, key=lambda c: (c.method.trained, c.seed, c.method.seconds, order.index(c.method.name)))


def _planned(cell: Cell) -> bool:
    return not cell.method.trained or (cell.ratio in TRAINED_RATIOS and cell.text.name in TRAINED_TEXTS)


def settings(cell: Cell, model: str) -> dict[str, Any]:
    """Everything that decides the figures of a cell, JSON-able. Files count by their content.

    Of a run these are its settings with the defaults of `CompressConfig`, as far as DECIDING names them.
    """
    return {
        "format": FORMAT,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "method": {"kind": cell.method.kind, **_method_settings(cell)},
        "teacher": teacher_settings(cell.text, cell.seed, model),
    }


def _method_settings(cell: Cell) -> dict[str, Any]:
    given = cell.method.settings(cell.text)
    if cell.method.kind != "run":
        return given
    config = load_config(None, {"model": "-", "context": "-", "output": "-", "tokens": 2, **given})
    return config.model_dump(mode="json", include={*DECIDING, *(MATCHING if config.init == "matched" else ())})


def teacher_settings(text: Text, seed: int, model: str) -> dict[str, Any]:
    """Everything that decides the teacher's answers to a text's questions, which all methods share."""
    return {
        "model": _sha256(Path(model) / "config.json") or model,
        "context": _sha256(text.context),
        "heldout": _sha256(text.heldout),
        "test": _sha256(text.test),
        "queries": None if text.queries is None else _sha256(text.queries),
        "selfstudy": text.selfstudy,
        "samples": text.samples,
        "seed": seed,
        **ANSWERS,
    }


def digest(settings: dict[str, Any]) -> str:
    """12 hexadecimal digits that differ where the settings differ."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
