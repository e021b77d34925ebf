"""What is required of our counts, judged from their records. Unlike times, counts are the same on every machine.

| required | limit |
|---|---|
| attention, bytes by the model over the floor | 1.15 forward, 1.3 backward |
| prompt bytes of a batch over those of half of it | 1 |
| launches of a forward and a backward, and of twice the batch over those | 5, 1 |
| rows of a KL: reads of each logit, writes of each | 2, 1 |
| linear: transient memory in GB; bytes over those of the nearest peer that keeps fp32 logits | 1.5, 0.5 |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.counted.peers import LIGER_HIDDEN
from benchmarks.counted.problems import OURS

Record = dict[str, Any]
LOGITS = ("student", "teacher")


@dataclass(frozen=True)
class Required:
    """One limit, and the figure that it is for."""

    what: str
    figure: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.limit


def judge(records: list[Record]) -> list[Required]:
    """Every limit that the records have figures for."""
    ours = [record for record in records if record["role"] == OURS]
    return [*_attention(ours), *_rows(ours), *_linear(ours, records)]


def _attention(ours: list[Record]) -> Iterator[Required]:
    forward = [record for record in ours if record["suite"] == "attention forward"]
    backward = [record for record in ours if record["suite"] == "attention backward"]
    for records, limit in ((forward, 1.15), (backward, 1.3)):
        for record in records:
            yield Required(f"{record['suite']} {record['case']}: bytes over the floor", record["times_floor"], limit)
    for one, other in zip(forward, backward, strict=True):
        yield Required(f"attention {one['case']}: launches", one["launches"] + other["launches"], 5)
    for records in (forward, backward):
        for half, whole in pairwise(records):
            if doubled(half["case"], whole["case"]):
                figure = prompt_bytes(whole) / prompt_bytes(half)
                yield Required(
                    f"{whole['suite']} {whole['case']}: prompt bytes over those of half the batch", figure, 1
                )
                launches = whole["launches"] / half["launches"]
                yield Required(f"{whole['suite']} {whole['case']}: launches over those of half the batch", launches, 1)


def doubled(half: str, whole: str) -> bool:
    """Whether a case is another with twice the sequences."""
    (b, *rest), (twice, *others) = half.split(), whole.split()
    return rest == others and int(twice[1:]) == 2 * int(b[1:])


def prompt_bytes(record: Record) -> int:
    """Read of the prompt, by the model."""
    return sum(
        figures["grouped_read"]
        for kernel in record["more"]["kernels"]
        for name, figures in kernel["tensors"].items()
        if name.startswith("inputs.prompt_")
    )


def _rows(ours: list[Record]) -> Iterator[Required]:
    for record in ours:
        if record["suite"] not in ("kl", "linear"):
            continue
        read, written = sweeps(record)
        where = f"{record['suite']} {record['case']}"
        yield Required(f"{where}: reads of each logit", read, 2)
        yield Required(f"{where}: writes of each gradient", written, 1)


def sweeps(record: Record) -> tuple[float, float]:
    """How often each of the teacher's logits is read, and each number of the gradient written."""
    tensors = [(name, figures) for kernel in record["more"]["kernels"] for name, figures in kernel["tensors"].items()]
    teacher = [figures for name, figures in tensors if "teacher" in name.split("=")]
    gradient = [figures for name, figures in tensors if "gradient" in name.split("=")]
    read = sum(f["issued_read"] for f in teacher) / max(f["unique_read"] for f in teacher)
    written = sum(f["issued_written"] for f in gradient) / max(f["unique_written"] for f in gradient)
    return read, written


def _linear(ours: list[Record], records: list[Record]) -> Iterator[Required]:
    for record in ours:
        if record["suite"] != "linear":
            continue
        yield Required(f"linear {record['case']}: transient memory, GB", record["peak"] / 1e9, 1.5)
        for peer in records:
            if peer["suite"] == "linear" and peer["way"] == LIGER_HIDDEN and "left_out" not in peer["more"]:
                what = f"linear {record['case']}: bytes over those of {peer['way']}"
                yield Required(what, record["moved"] / peer["moved"], 0.5)
