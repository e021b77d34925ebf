"""Cases of the suite `scaling`: one size grows, the others stay. Time should grow no faster than the work.

A size is flagged as superlinear where its time per unit of work is more than 1.25 times the best one of the smaller
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Case
from benchmarks.suites.attention_cases import AttentionCase
from benchmarks.suites.kl_cases import LIVE, LOGITS, MOMENTS, KlCase

MAX_EXCESS = 1.25

_ATTENTION = AttentionCase(4, 8, 2, 128, 128, 64)
_KL = {LIVE: KlCase(LIVE, 256, 256, 16384), MOMENTS: KlCase(MOMENTS, 256, 256, 16384)}
_LOGITS = KlCase(LOGITS, 256, 64, 16384)


@dataclass(frozen=True)
class Axis:
    """One op and the size that grows.

    Args:
        op: as the plot names it.
        letter: the size as the ops' docstrings call it (B, P, N, V).
        points: pairs of a size and its case.
        work: gives the work of a case: useful FLOP, or elements of the logits.
    """

    op: str
    letter: str
    points: Sequence[tuple[int, Case]]
    work: Callable[[Any], float]

    @property
    def name(self) -> str:
        return f"{self.op} by {self.letter}"


def _flop(case: Case) -> float:
    assert case.flop is not None
    return case.flop


def _elements(case: KlCase) -> float:
    return float(case.tokens * case.vocab)


def _axis(op: str, letter: str, base: Any, field: str, sizes: Sequence[int], work: Any = _flop) -> Axis:
    return Axis(op, letter, [(size, replace(base, **{field: size})) for size in sizes], work)


AXES = [
    _axis("attention", "B", _ATTENTION, "batch", (1, 2, 4, 8, 16)),
    _axis("attention", "P", _ATTENTION, "prompt", (64, 256, 1024, 4096, 16384)),
    _axis("attention", "N", _ATTENTION, "queries", (64, 128, 256, 512, 1024)),
    *(_axis(f"KL {kind}", "N", base, "tokens", (64, 128, 256, 512, 1024)) for kind, base in _KL.items()),
    *(_axis(f"KL {kind}", "V", base, "vocab", (4096, 8192, 16384, 32768, 65536)) for kind, base in _KL.items()),
    _axis("KL logits", "N", _LOGITS, "tokens", (64, 128, 256, 512, 1024), _elements),
    _axis("KL logits", "V", _LOGITS, "vocab", (4096, 8192, 16384, 32768, 65536), _elements),
]


def excess(work: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """For each point after the first: its time per unit of work, over the least one of the points before it."""
    costs = [second / unit for second, unit in zip(seconds, work, strict=True)]
    return [cost / min(costs[: index + 1]) for index, cost in enumerate(costs[1:])]


def summary(record: dict[str, Any]) -> str:
    """One line of the report: the times, the largest excess, and the sizes that are flagged."""
    pairs = zip(record["sizes"], record["medians"], strict=True)
    times = ", ".join(f"{record['letter']} {size}: {seconds * 1e3:.2f}" for size, seconds in pairs)
    found = excess(record["work"], record["medians"])
    flagged = [str(size) for size, more in zip(record["sizes"][1:], found, strict=True) if more > MAX_EXCESS]
    verdict = f"SUPERLINEAR at {record['letter']} {', '.join(flagged)}" if flagged else "linear"
    return f"{record['case']}: {times}; at most {max(found):.2f}×: {verdict}"


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time over work, both relative to the first point of an axis, and a line of slope 1 for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(record["op"] for record in records))
    figure, panels = pyplot.subplots(1, len(ops), figsize=(4.5 * len(ops), 4.2), squeeze=False, layout="constrained")
    for op, panel in zip(ops, panels[0], strict=True):
        chosen = [record for record in records if record["op"] == op]
        most_work = max(record["work"][-1] / record["work"][0] for record in chosen)
        panel.plot([1, most_work], [1, most_work], color="grey", linestyle="--", linewidth=1, label="slope 1")
        for record in chosen:
            work = [unit / record["work"][0] for unit in record["work"]]
            seconds = [second / record["medians"][0] for second in record["medians"]]
            sizes = f"{record['letter']} from {record['sizes'][0]} to {record['sizes'][-1]}"
            panel.plot(work, seconds, marker="o", markersize=4, label=f"{sizes}, {record['medians'][0] * 1e3:.2g} ms")
        panel.set(
            xscale="log",
            yscale="log",
            title=op,
            xlabel="work / work of first point",
            ylabel="time / time of first point",
        )
        panel.legend(fontsize=8, title="size, and time of the first point", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
