"""The diagnosis of a run: what diagnosis.json of a run's folder holds (`RunFolder.diagnosis`).

`compress/diagnose` makes it, and a report draws it. It is here so that a report need not know how a diagnosis is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from softprompt_kernels.compress.evaluate.record_file import read_record

FORMAT = 1

Cause = Literal[
    "capacity",
    "optimisation",
    "objective",
    "data",
    "nothing to compress",
    "broken template",
    "nothing wrong",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Finding(_Part):
    """One cause of what is missing.

    Args:
        cause: its name.
        sentence: what was found, in one sentence.
        evidence: pairs of what was looked at and what was seen, as text.
        change: what to change, in one sentence; "" where nothing is to be changed.
        options: options of `softprompt compress` that make the change, such as "--tokens 172"; "" if there are none.
        expected: what the change is expected to give and how that is known, in one sentence; "" where it is not known.
        gain: the same as a part of the KL without context, on the held-out queries; None where it is not known.
    """

    cause: Cause
    sentence: str
    evidence: tuple[tuple[str, str], ...]
    change: str = ""
    options: str = ""
    expected: str = ""
    gain: float | None = None


class CapacityPoint(_Part):
    """What a prompt of some length recovers by matching alone, in closed form.

    Args:
        tokens: its length.
        heldout, train: the recovered fraction on the held-out queries and on the sample of the training queries.
        seconds: that matching and measuring took.
    """

    tokens: int
    heldout: float
    train: float
    seconds: float


class RatePoint(_Part):
    """One step of a rate range test.

    Args:
        rate: the learning rate of the step.
        loss: the training loss of the test's batch after the step; 0 is the teacher, but for losses with labels.
    """

    rate: float
    loss: float


class RateTest(_Part):
    """A rate range test (arXiv 1506.01186): steps on one batch, whose learning rate rises geometrically.

    Args:
        start_loss: the loss before the first step.
        points: the steps, up to the one at which the loss has risen far above the start, if there is one.
        run_rate: the learning rate of the run.
        suggested: a learning rate at which the loss falls fast; None where it falls nowhere.
        seconds: that the test took.
    """

    start_loss: float
    points: tuple[RatePoint, ...]
    run_rate: float
    suggested: float | None
    seconds: float


class Family(_Part):
    """The figures of one kind of held-out queries.

    Args:
        name: "general", "phrase" or "sentence" of self-study, or "given" from a file.
        queries, train_queries: how many are held out, and how many are in the training set.
        recovered: the fraction on the held-out ones.
        share: the part of all held-out KL of the prompt that they have, from 0 to 1.
    """

    name: str
    queries: int
    train_queries: int
    recovered: float
    share: float


class Diagnosis(_Part):
    """The diagnosis of a run.

    Args:
        format: of the file; `FORMAT`.
        findings: the most probable cause first. At least one.
        heldout_recovered, train_recovered: of the prompt; None for a run that was refused before it had one.
        capacity: the curve of recovered against tokens, shortest prompt first; empty where it was not needed.
        prompt_tokens: the length of the run's prompt, in tokens.
        rate_test: None where it was not needed.
        families: of the held-out queries, that with the largest share first; empty for a run that was refused.
        seconds: that the diagnosis took.
    """

    format: int = FORMAT
    findings: tuple[Finding, ...]
    heldout_recovered: float | None
    train_recovered: float | None
    capacity: tuple[CapacityPoint, ...]
    prompt_tokens: int
    rate_test: RateTest | None
    families: tuple[Family, ...]
    seconds: float


def read_diagnosis(path: Path) -> Diagnosis:
    """The content of diagnosis.json.

    Raises:
        SoftPromptError: there is no such file, or it is broken or of another format.
    """
    return read_record(path, Diagnosis, FORMAT)
