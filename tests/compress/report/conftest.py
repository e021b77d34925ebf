"""A finished run without a model: its files, with figures of which a report can be made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress.evaluate.details import Details, ExampleDetails, write_details
from softprompt_kernels.compress.evaluate.diagnosis import (
    CapacityPoint,
    Diagnosis,
    Finding,
    RatePoint,
    RateTest,
)
from softprompt_kernels.compress.folder import RunFolder

TOKENS = ("The", " mill", " is", "", "猫", ".\n", "<b>\x07", "<|im_end|>")
STUDENTS = ("none", "truncated", "untrained", "initial", "prompt")


def example(
    query: str, family: str, students: tuple[str, ...] = STUDENTS, own: str | None = "A mill."
) -> ExampleDetails:
    kl = {name: tuple((0.9 - 0.15 * index) * (i + 1) for i in range(8)) for index, name in enumerate(students)}
    agrees = dict.fromkeys(students, (True, False) * 4)
    return ExampleDetails(
        query=query,
        family=family,
        tokens=TOKENS,
        kl=kl,
        agrees=agrees,
        entropy=(0.5,) * 8,
        ended=True,
        prompt_answer=own,
    )


DETAILS = Details(
    sets={
        "train": (example("What?", "general", own=None), example("Tell me.", "phrase", own=None)),
        "heldout": (example("Who & <i>why</i>?", "given"), example("Where?", "sentence")),
        "test": (example("When?", "given", ("none", "prompt")),),
    },
    match_error=((0.1, 0.02, 0.0, 0.3), (0.4, 0.001, 0.05, 0.2)),
)
DIAGNOSIS = Diagnosis(
    findings=(
        Finding(
            cause="capacity",
            sentence="The prompt is <short>.",
            evidence=(("at 16 tokens", "0.93"),),
            change="Make it longer.",
            options="--tokens 16",
            expected="0.93 instead of 0.8.",
        ),
    ),
    heldout_recovered=0.8,
    train_recovered=0.9,
    capacity=(
        CapacityPoint(tokens=4, heldout=0.5, train=0.6, seconds=1.0),
        CapacityPoint(tokens=16, heldout=0.93, train=0.95, seconds=1.0),
    ),
    prompt_tokens=8,
    rate_test=RateTest(
        start_loss=1.0,
        points=tuple(RatePoint(rate=10.0**-power, loss=0.1 * power) for power in (4, 3, 2)),
        run_rate=5e-3,
        suggested=1e-2,
        seconds=2.0,
    ),
    families=(),
    seconds=3.0,
)


def figures_of(name: str) -> dict[str, float]:
    students = ("none", "prompt") if name == "test" else STUDENTS
    kl = {f"kl_{student}": 1.0 / (index + 1) for index, student in enumerate(students)}
    agreement = {f"top1_agreement_{student}": 0.5 for student in students if student != "prompt"}
    return {**kl, **agreement, "recovered": 0.8, "top1_agreement": 0.75, "entropy_gap": 0.0, "tokens": 16}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """`make_run(details=None)`: a finished run in `tmp_path`. Options replace its details, figures and so on."""

    def make(
        *,
        details: Details | None = DETAILS,
        diagnosis: Diagnosis | None = None,
        figures: dict[str, Any] | None = None,
        steps: int = 12,
    ) -> RunFolder:
        folder = RunFolder(tmp_path / "run")
        identity = {"context": "c" * 64, "model": {"weights": {"float16": "d" * 64}, "layers": 2}, "seed": 0}
        config = "context: texts/mill.txt\ntokens: 8\n# <note>\n"
        folder.claim(identity, config, {"python": "3.11", "processor": "a <fast> one"})
        for step in range(1, steps + 1):
            folder.add_metrics(
                {"stage": "matching", "first_layer": 0, "layers": 2, "step": step, "error": 0.5 / step, "seconds": 0.1}
            )
        for step in range(1, steps + 1):
            record = {"stage": "training", "step": step, "loss": 1.0 / step, "grad_norm": 2.0 / step}
            folder.add_metrics(record | {"learning_rate": 0.01, "tokens": 10, "seconds": 0.1})
        if details is not None:
            write_details(folder.details, details)
        if diagnosis is not None:
            folder.diagnosis.write_text(diagnosis.model_dump_json())
        default = {
            "context_tokens": 80,
            "prompt_tokens": 8,
            "ratio": 10.0,
            "start": "initial",
            **{name: figures_of(name) for name in ("heldout", "test", "train")},
            "seconds": 75.0,
            "stages": {"load": 5.0, "training": 70.0},
        }
        folder.evaluation.write_text(json.dumps(default if figures is None else figures))
        return folder

    return make


@pytest.fixture
def diagnosis() -> Diagnosis:
    return DIAGNOSIS


@pytest.fixture
def details() -> Details:
    return DETAILS
