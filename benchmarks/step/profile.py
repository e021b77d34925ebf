"""Where the time of one of our steps goes: each event of torch's profiler is charged, by its own time, to one part.

The part is that of the innermost event around it that is a product of matrices or one of the package's ops.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.step.implementations import Side

GEMMS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::addmv_"}
GEMMS |= {"softprompt_kernels::product"}
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
OPS = {
    "softprompt_kernels::prompt_attention": "attention op",
    "softprompt_kernels::linear_kl_div": "loss op",
    "softprompt_kernels::scale_rows": "loss op",
}


def breakdown(side: Side) -> tuple[dict[str, float], dict[str, float]]:
    """`(parts, rest)` of one step, in seconds: all parts, and the events that "elsewhere" is made of, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.step()
    parts: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for event in profiler.events() or ():
        seconds = event.self_cpu_time_total * 1e-6
        part = _part(event)
        parts[part] += seconds
        if part == "elsewhere":
            rest[event.name] += seconds
    return dict(parts.most_common()), dict(rest.most_common())


def _part(event: Any) -> str:
    """GEMMs of the model or of an op, an op's flash kernels, an op's own work (a native kernel too), or "elsewhere"."""
    inner = None
    while event is not None:
        name = event.name
        if inner is None and (name in GEMMS or FLASH in name):
            inner = "GEMMs" if name in GEMMS else "flash"
        for op, part in OPS.items():
            if name.startswith(op):
                return f"{part}: {inner or 'its own work'}"
        event = event.cpu_parent
    return f"model: {inner}" if inner else "elsewhere"
