"""What is required of our counts, judged from the records. Unlike times, counts are the same on every machine.

| required | limit |
|---|---|
| prompt_attention: moved bytes over the floor | 1.15 forward, 1.3 backward |
| prompt_attention: bytes read of the prompt, over those with half the batch | 1 |
| prompt_attention: kernels of forward and backward together | 5 |
| prompt_attention: kernels, over those with half the batch | 1 |
| kl_div, linear_kl_div: reads of each logit, writes of each number of the gradient | 2 (JSD: 3), 1 |
| linear_kl_div: peak memory in GB | 1.5 |
| linear_kl_div: moved bytes over those of Liger, the closest peer (it keeps fp32 logits) | 0.5 |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.counted.peers import LIGER_HIDDEN
from benchmarks.counted.record import OURS

Record = dict[str, Any]
LOGITS = ("student", "teacher")


@dataclass(frozen=True)
class Requirement:
    """A limit, and the figure that must not be above it."""

    what: str
    figure: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.limit


def check_requirements(records: list[Record]) -> list[Requirement]:
    """All requirements that the records have figures for."""
    ours = [record for record in records if record["role"] == OURS]
    return [*_attention(ours), *_row_kernels(ours), *_linear(ours, records)]


def _attention(ours: list[Record]) -> Iterator[Requirement]:
    forward = [record for record in ours if record["suite"] == "prompt_attention forward"]
    backward = [record for record in ours if record["suite"] == "prompt_attention backward"]
    for records, limit in ((forward, 1.15), (backward, 1.3)):
        for record in records:
            yield Requirement(f"{record['suite']} {record['case']}: bytes over the floor", record["times_floor"], limit)
    for record, backward_record in zip(forward, backward, strict=True):
        launches = record["launches"] + backward_record["launches"]
        yield Requirement(f"prompt_attention {record['case']}: kernels", launches, 5)
    for records in (forward, backward):
        for half, whole in pairwise(records):
            if is_double_batch(half["case"], whole["case"]):
                where = f"{whole['suite']} {whole['case']}"
                figure = prompt_bytes(whole) / prompt_bytes(half)
                yield Requirement(f"{where}: prompt bytes over those of half the batch", figure, 1)
                figure = whole["launches"] / half["launches"]
                yield Requirement(f"{where}: kernels over those of half the batch", figure, 1)


def is_double_batch(half: str, whole: str) -> bool:
    """Whether the case named `whole` is the one named `half` with twice the batch."""
    (half_batch, *half_sizes), (batch, *sizes) = half.split(), whole.split()
    return half_sizes == sizes and int(batch[1:]) == 2 * int(half_batch[1:])


def prompt_bytes(record: Record) -> int:
    """Bytes read of the prompt's keys and values, by the model."""
    return sum(
        figures["missed_read"]
        for kernel in record["more"]["kernels"]
        for name, figures in kernel["tensors"].items()
        if name.startswith("key_values.prompt_")
    )


def _row_kernels(ours: list[Record]) -> Iterator[Requirement]:
    for record in ours:
        if record["op"] not in ("kl_div", "linear_kl_div"):
            continue
        read, written = passes_over_rows(record)
        where = f"{record['suite']} {record['case']}"
        yield Requirement(f"{where}: reads of each logit", read, 3 if record["suite"].endswith("jsd") else 2)
        yield Requirement(f"{where}: writes of each gradient", written, 1)


def passes_over_rows(record: Record) -> tuple[float, float]:
    """How often each of the teacher's logits is read, and how often each number of the gradient is written."""
    tensors = [(name, figures) for kernel in record["more"]["kernels"] for name, figures in kernel["tensors"].items()]
    teacher = [figures for name, figures in tensors if "teacher" in name.split("=")]
    gradient = [figures for name, figures in tensors if "gradient" in name.split("=")]
    read = sum(f["issued_read"] for f in teacher) / max(f["unique_read"] for f in teacher)
    written = sum(f["issued_written"] for f in gradient) / max(f["unique_written"] for f in gradient)
    return read, written


def _linear(ours: list[Record], records: list[Record]) -> Iterator[Requirement]:
    for record in ours:
        if record["op"] != "linear_kl_div":
            continue
        yield Requirement(f"{record['suite']} {record['case']}: peak memory, GB", record["peak"] / 1e9, 1.5)
        for peer in records:
            if (
                peer["suite"] == record["suite"]
                and peer["implementation"] == LIGER_HIDDEN
                and "left_out" not in peer["more"]
            ):
                what = f"{record['suite']} {record['case']}: bytes over those of {peer['implementation']}"
                yield Requirement(what, record["moved"] / peer["moved"], 0.5)
