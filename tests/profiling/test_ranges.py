"""The names in a trace: every kernel as documented, nested in its call. Without a profiler there is no range."""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from softprompt_kernels.kernels import ranges
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.attention import ONLY_KERNEL
from softprompt_kernels.ops import kl_div
from softprompt_kernels.profiling.names import KERNELS, STORED, parse_name

ROOT = Path(__file__).parents[2]
CALLS = {
    *(f"{op}.{pass_}" for op in ("prompt_attention", "kl_div", "linear_kl_div") for pass_ in ("forward", "backward")),
    "teacher_moments.forward",
    "linear_kl_div_from_moments.forward",
}
STORED_CALLS = {"linear_kl_div.backward", "linear_kl_div_from_moments.backward"}


@pytest.fixture
def trace(run_all_ops, tmp_path):
    """`trace(backend)` returns the events of the package's ranges in the trace of all ops."""

    def record(backend: str) -> list[dict]:
        with profile() as profiler:
            run_all_ops(backend)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return [event for event in events if str(event.get("name", "")).startswith(ranges.PREFIX) and "dur" in event]

    return record


@pytest.mark.parametrize("backend", ["cpu", "composed", "reference", "simt", "triton"])
def test_a_trace_holds_every_call_and_every_kernel_as_documented(trace, backend):
    if backend == "cpu" and native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    events = trace(backend)
    found = defaultdict(set)
    for event in events:
        name = parse_name(event["name"])
        assert name is not None, event["name"]
        assert (name.tile != ()) == (name.kernel is not None), event["name"]
        found[name.backend].add((name.call, name.kernel))
    expected = {(call, None) for call in CALLS}
    expected |= {(call, kernel.name) for kernel in KERNELS if backend in kernel.backends for call in kernel.calls}
    assert found == {backend: expected, STORED: {(call, None) for call in STORED_CALLS}}
    check_nesting(events)


def check_nesting(events: list[dict]) -> None:
    """Calls do not overlap, and each kernel lies within one call of its op and pass."""
    calls = sorted((e for e in events if parse_name(e["name"]).kernel is None), key=lambda e: e["ts"])
    for before, after in itertools.pairwise(calls):
        assert before["ts"] + before["dur"] <= after["ts"]
    for event in events:
        name = parse_name(event["name"])
        if name.kernel is not None:
            around = [c for c in calls if c["ts"] <= event["ts"] and c["ts"] + c["dur"] >= event["ts"] + event["dur"]]
            assert [parse_name(call["name"]).call for call in around] == [name.call]


@pytest.mark.parametrize("backend", ["composed", "simt"])
def test_without_a_profiler_no_range_is_made(run_all_ops, monkeypatch, backend):
    def forbidden(*_):
        raise AssertionError("a range was made")

    monkeypatch.setattr(ranges, "record_function", forbidden)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", forbidden)
    run_all_ops(backend)
    with profile(), pytest.raises(AssertionError, match="a range was made"):
        run_all_ops(backend)


def test_ranges_go_to_nvtx_only_within_nvtx_ranges(monkeypatch):
    pushed = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append(None))
    logits = torch.randn(2, 8)
    with ranges.nvtx_ranges():
        kl_div(logits, logits, backend="reference")
    kl_div(logits, logits, backend="reference")
    assert pushed == ["softprompt::kl_div.forward[reference]", None]


def test_a_failed_call_leaves_no_name_behind():
    with ranges.nvtx_ranges(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.nvtx, "range_push", lambda name: None)
        patch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
        with pytest.raises(KeyError), ranges.call_range("kl_div.forward", "cpu"):
            assert ranges.kernel_name("kl_logits", 2, 8) == "softprompt::kl_div.forward.kl_logits[cpu 2x8]"
            raise KeyError
        assert ranges.kernel_name("kl_logits", 2, 8) == "softprompt::kl_logits[2x8]"


@pytest.mark.parametrize(
    "text", ["aten::mm", "softprompt::round", "softprompt::kl_div.forward", "softprompt_kernels::kl"]
)
def test_other_names_have_no_parts(text):
    assert parse_name(text) is None


def test_the_tiles_of_the_cpu_kernels_are_those_of_their_source():
    def constant(file: str, name: str) -> int:
        source = (ROOT / "csrc" / "cpu" / file).read_text()
        return int(re.search(rf"constexpr int(?:64_t)? {name} = (\d+)", source)[1])

    keys = constant("attention/problem.h", "kTileKeys")
    rows = 2 * constant("gemm/amx.h", "kAmxTile")
    if native.instruction_set() != "amx":
        rows = constant("gemm/micro_kernel.h", "kRegisterRows")
    assert ONLY_KERNEL["forward"] == ("attention_forward", rows, keys)
    assert ONLY_KERNEL["backward"] == ("attention_backward", constant("attention/blocks.h", "kBlockRows"), keys)


def test_the_page_lists_every_kernel():
    """One line of the table may name several kernels; backends, ops and tile hold for each."""
    page = (ROOT / "docs" / "how-to" / "profile.md").read_text(encoding="utf-8")
    listed = {}
    for line in page.partition("| kernel |")[2].partition("\n\n")[0].splitlines()[2:]:
        names, backends, ops, tile = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"\w+", names):
            listed[name] = set(re.findall(r"\w+", backends)), set(re.findall(r"\w+", ops)), tile
    expected = {
        kernel.name: (set(kernel.backends), {call.partition(".")[0] for call in kernel.calls}, kernel.tile)
        for kernel in KERNELS
    }
    assert listed == expected


def test_the_compiled_module_keeps_the_names_of_its_functions():
    """perf and py-spy read them from the symbol table, which `strip` would remove."""
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    symbols = Path(native.module().__file__).read_bytes()
    isa = native.instruction_set()
    for name in ("attention_forward", "attention_backward", "kl_rows", "kl_logits", "kl_tile", "expectation_rows"):
        assert f"10softprompt{len(isa)}{isa}{len(name)}{name}".encode() in symbols, name
