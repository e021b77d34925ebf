"""A session: its region covers all rounds and nothing else, for torch.profiler and for profilers around the process."""

import json
from types import SimpleNamespace

import pytest
import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import written_when_complete
from softprompt_kernels.profiling.names import REGION, ROUND
from softprompt_kernels.profiling.session import Session, expose_case, profile_case

CALLS = {
    "prompt_attention": ("B2 H4/2 M5 P3 D16", ("forward", "backward")),
    "kl_div": ("N5 V40", ("forward", "backward")),
    "linear_kl_div": ("N5 d8 V40", ("forward", "backward")),
    "linear_kl_div_from_moments": ("N5 d8 V40", ("forward", "backward")),
    "teacher_moments": ("N5 d8 V40", ("forward",)),
}


@pytest.mark.parametrize("op", CALLS)
def test_every_round_holds_one_call_of_each_pass(op, tmp_path):
    shape, passes = CALLS[op]
    trace = tmp_path / "trace.json"
    summary = profile_case(Session(op, shape, "composed", rounds=3), trace)
    calls = [row for row in summary.rows if row.parts.kernel is None]
    assert [(row.parts.call, row.calls) for row in calls] == [(f"{op}.{pass_}", 3) for pass_ in passes]
    assert 0 < sum(row.seconds for row in calls) <= summary.seconds and summary.outside >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]

    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    (region,) = (event for event in events if event["name"] == REGION)
    rounds = [event for event in events if event["name"] == ROUND]
    ranges = [event for event in events if event["name"].startswith(f"softprompt::{op}.")]
    assert len(rounds) == 3 and len(ranges) == sum(row.calls for row in summary.rows)
    assert all(inside(each, region) for each in rounds)
    assert all(sum(inside(each, one) for one in rounds) == 1 for each in ranges)


def inside(event: dict, outer: dict) -> bool:
    return outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.parametrize(
    ("pass_", "expected"),
    [
        ("forward", {"linear_kl_div.forward": 2}),
        ("backward", {"linear_kl_div.backward": None}),
        ("forward+backward", {"linear_kl_div.forward": 3, "linear_kl_div.backward": None}),
    ],
)
def test_a_stored_gradient_counts_where_it_is_computed(pass_, expected):
    summary = profile_case(Session("linear_kl_div", "N5 d8 V40", "composed", pass_=pass_, rounds=2))
    unit = 2 * 5 * 8 * 40
    found = {row.parts.call: row.flop and row.flop / unit / 2 for row in summary.rows if row.parts.kernel is None}
    assert found == expected
    gemms = [row.flop for row in summary.rows if row.parts.kernel == "gemm"]
    assert sum(gemms) == 2 * unit * (expected.get("linear_kl_div.forward") or 0)


def test_labels_alone_have_the_work_of_both_passes_in_the_forward():
    session = Session("linear_cross_entropy", "N5 d8 V40", "composed", rounds=2)
    assert session.case.function == "linear_kl_div_from_moments"
    call = profile_case(session).rows[0]
    assert call.parts.call == "linear_kl_div_from_moments.forward"
    assert (call.flop, call.bytes) == (2 * session.case.flop(), 2 * session.case.bytes())


def test_work_of_a_call_is_that_of_its_case():
    session = Session("prompt_attention", "B2 H4/2 M5 P3 D16", "composed", rounds=2)
    forward, backward = profile_case(session).rows
    assert (forward.flop, forward.bytes) == (2 * session.case.flop("forward"), 2 * session.case.bytes("forward"))
    assert (backward.flop, backward.bytes) == (2 * session.case.flop("backward"), 2 * session.case.bytes("backward"))


@pytest.fixture
def cuda_log(monkeypatch):
    """What a profiler around the process would see, on a machine that pretends to have a GPU."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronize"))
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: log.append("start"), cudaProfilerStop=lambda: log.append("stop")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    return log


def test_an_outer_profiler_sees_the_region_and_nothing_else(cuda_log):
    expose_case(Session("kl_div", "N5 V40", "composed", pass_="forward", rounds=2))
    call = ["softprompt::kl_div.forward[composed]", "softprompt::kl_div.forward.divergence_[composed 5x40]"]
    one_round = [ROUND, *call, "pop", "pop", "pop"]
    assert cuda_log == ["synchronize", "start", REGION, *one_round, *one_round, "pop", "synchronize", "stop"]


def test_the_profiler_is_stopped_after_an_error(cuda_log, monkeypatch):
    session = Session("kl_div", "N5 V40", "composed", pass_="forward")
    calls = iter([None] * 3)
    monkeypatch.setattr(type(session.case), "prepare", lambda *_: lambda: next(calls))
    with pytest.raises(StopIteration):
        expose_case(session)
    assert cuda_log[-3:] == ["pop", "synchronize", "stop"] and cuda_log.count("pop") == 2


def test_without_a_gpu_an_outer_profiler_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SoftPromptError, match="need a CUDA device"):
        expose_case(Session("kl_div", "N5 V40"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("softmax", "N5 V40"), "op must be one of prompt_attention.*got 'softmax'"),
        (("kl_div", "N5"), "V is missing"),
        (("kl_div", "N5 V40", "mps"), "backend must be None or one of.*got 'mps'"),
        (("teacher_moments", "N5 d8 V40", None, torch.float32, torch.device("cpu"), "backward"), "pass of teacher"),
        (("kl_div", "N5 V40", None, torch.float32, torch.device("cpu"), None, 0), "rounds must be at least 1; got 0"),
    ],
)
def test_arguments_that_are_not_accepted(arguments, message):
    with pytest.raises(SoftPromptError, match=message):
        Session(*arguments)


def test_a_backend_that_cannot_serve_the_case_is_refused_and_leaves_no_file(tmp_path):
    session = Session("prompt_attention", "B2 H4/2 M5 P3 D16", "cuda")
    with pytest.raises(SoftPromptError, match="backend='cuda' cannot serve this prompt_attention call: cuda: "):
        profile_case(session, tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    target = tmp_path / "trace.json"
    target.write_text("old")
    with pytest.raises(KeyError), written_when_complete("trace", target) as file:
        file.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    with written_when_complete("trace", target) as file:
        assert file.name.endswith("trace.json") and file.parent == tmp_path
        file.write_text("new")
    assert target.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["trace.json"]
