"""Where the time of one of our training steps goes, by torch's profiler.

Each event is charged to one part, by its own time (without the events inside it). The part is that of the innermost
event around it that is a GEMM or one of the package's ops.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.step.implementations import StepImplementation

GEMMS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::addmv_"}
OUR_GEMM = ".gemm["  # in the name of its range; see softprompt_kernels/kernels/ranges.py
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
OPS = {
    "softprompt_kernels::prompt_attention": "attention op",
    "softprompt_kernels::linear_kl_div": "loss op",
    "softprompt_kernels::scale_rows": "loss op",
}
OTHER = "other operations"


def breakdown(implementation: StepImplementation) -> tuple[dict[str, float], dict[str, float]]:
    """Profile one step; returns two dictionaries of seconds, both with the largest first.

    Returns:
        parts: all parts of the step: "model: GEMMs", "attention op: flash", ..., and "other operations".
        others: the events that "other operations" consists of, by their names.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        implementation.step()
    parts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in profiler.events() or ():
        seconds = event.self_cpu_time_total * 1e-6
        part = _part(event)
        parts[part] += seconds
        if part == OTHER:
            others[event.name] += seconds
    return dict(parts.most_common()), dict(others.most_common())


def _part(event: Any) -> str:
    """The part of an event: GEMMs of the model or of an op, an op's flash kernel, an op's own work, or `OTHER`.

    An op's own work includes that of native kernels.
    """
    inner = None
    while event is not None:
        name = event.name
        if inner is None and (name in GEMMS or OUR_GEMM in name or FLASH in name):
            inner = "flash" if FLASH in name else "GEMMs"
        for op, part in OPS.items():
            if name.startswith(op):
                return f"{part}: {inner or 'its own work'}"
        event = event.cpu_parent
    return f"model: {inner}" if inner else OTHER
