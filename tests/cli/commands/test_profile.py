"""`softprompt profile`: the table, the trace, and what it refuses before any work."""

import gzip
import json
import sys

import pytest
import torch

ATTENTION = ("profile", "prompt_attention", "--shape", "B2 H4/2 M5 P3 D16", "--rounds", "2")


def test_the_table_names_calls_and_kernels(run):
    result = run("profile", "linear_kl_div", "--shape", "N5 d8 V40", "--backend", "composed", "--rounds", 2)
    assert result.exit_code == 0, result.output
    title, header, _, *lines = result.stdout.splitlines()
    assert title.startswith("linear_kl_div N5 d8 V40, forward+backward, float32, 2 rounds on ")
    assert header.split() == ["range", "calls", "ms/call", "share", "GFLOP/call", "MB/call", "rate"]
    assert [line.split("  ")[0] or line.split("]")[0].strip() + "]" for line in lines] == [
        "linear_kl_div.forward[composed]",
        "gemm[composed 10x40x8]",
        "divergence_[composed 5x40]",
        "gemm[composed 5x8x40]",
        "linear_kl_div.backward[torch]",
        "outside of them",
        "all",
    ]
    assert "GFLOP/s" in lines[0] and "100.0%" in lines[-1]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_written(run, tmp_path, name):
    result = run(*ATTENTION, "--backend", "composed", "--trace", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Trace: {tmp_path / name}"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    text = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(text) if name.endswith(".gz") else text)["traceEvents"]
    assert sum(event["name"] == "softprompt::prompt_attention.backward[composed]" for event in events) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "softmax", "--shape", "N5 V40"), "op must be one of prompt_attention"),
        (("profile", "kl_div", "--shape", "N5 V-40"), "'V-40' is no size of this op"),
        (
            ("profile", "kl_div", "--shape", "N2147483648 V2147483648"),
            "'N2147483648 V2147483648' takes more memory than there is",
        ),
        (
            ("profile", "kl_div", "--shape", "N2147483648 V262144"),
            "'N2147483648 V262144' takes more memory than there is",
        ),
        ((*ATTENTION, "--backend", "mps"), "backend must be None or one of"),
        ((*ATTENTION, "--backend", "cuda"), "backend='cuda' cannot serve this prompt_attention call"),
        (("profile", "teacher_moments", "--shape", "N5 d8 V40", "--pass", "backward"), "must be one of forward; got"),
        ((*ATTENTION, "--trace", "{folder}"), "which is a folder; accepted is a file"),
        ((*ATTENTION, "--trace", "{folder}/missing/trace.json"), "missing is not a folder"),
        ((*ATTENTION, "--trace", "/dev/null"), "which is a device or a pipe; accepted is a file"),
        ((*ATTENTION, "--trace", "/proc/trace.json"), "/proc cannot be written to"),
        ((*ATTENTION, "--trace", "{folder}/trace.json", "--cuda-profiler"), "--trace: got --cuda-profiler too"),
    ],
)
def test_what_is_refused(run, tmp_path, arguments, message):
    result = run(*(str(argument).format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.stderr.split()) and not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--cuda-profiler", "--device=cuda"])
def test_a_gpu_that_is_not_there(run, option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*ATTENTION, option)
    assert result.exit_code == 2 and "CUDA device" in result.stderr


def test_it_does_without_the_extra_of_bench(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "softprompt_kernels.bench.machine", raising=False)
    monkeypatch.setitem(sys.modules, "psutil", None)
    result = run("profile", "kl_div", "--shape", "N5 V40", "--rounds", 1)
    assert result.exit_code == 0, result.output


def test_without_a_shape_it_is_that_of_the_quick_suite(run):
    result = run("profile", "kl_div", "--rounds", 1, "--pass", "forward")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("kl_div N64 V12288, forward, float32, 1 rounds on ")
