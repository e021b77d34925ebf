"""`softprompt doctor --compile`: one line per kernel, and an exit code that a script can use."""

import json

import pytest
import torch

from softprompt_kernels.kernels.triton.compile import ahead_of_time, shipped_configurations
from softprompt_kernels.kernels.triton.compile.ahead_of_time import Request
from softprompt_kernels.kernels.triton.launch import Launch, Options
from softprompt_kernels.kernels.triton.targets import TARGETS


@pytest.fixture
def kernels(monkeypatch):
    """`kernels(block)` ships one kernel, whose 32 threads hold `block` numbers in registers."""
    if ahead_of_time.unavailable():
        pytest.skip(str(ahead_of_time.unavailable()))
    import triton
    import triton.language as tl

    @triton.jit
    def centre(source, out, count, BLOCK_N: tl.constexpr):
        n = tl.arange(0, BLOCK_N)
        values = tl.load(source + n, mask=n < count, other=0)
        tl.store(out + n, values - tl.sum(values), mask=n < count)

    def ship(block: int) -> None:
        tensors = {name: torch.empty(1024, device="meta") for name in ("source", "out")}
        launch = Launch(centre, (1,), {**tensors, "count": 1024}, {"BLOCK_N": block}, Options(1, 2))
        monkeypatch.setattr(
            shipped_configurations, "requests", lambda targets: [Request("numbers", launch, t) for t in targets]
        )

    return ship


def test_the_table_has_one_line_per_target(run, kernels, tmp_path):
    kernels(64)
    file = tmp_path / "new" / "compiled.json"
    result = run("doctor", "--compile", "--target", "sm_80", "--target", "gfx942", "--json", file)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "centre" in line]
    assert len(lines) == 2 and "sm_80" in lines[0] and "gfx942" in lines[1] and "N64, 1 warps" in lines[0]
    assert "2 of 2 kernels passed" in result.stdout
    reports = json.loads(file.read_text())
    assert [report["target"] for report in reports] == ["sm_80", "gfx942"]
    assert all(report["code"]["registers"] > 0 and report["violations"] == [] for report in reports)


def test_without_a_target_all_targets_are_compiled(run, kernels):
    kernels(64)
    result = run("doctor", "--compile")
    assert result.exit_code == 0
    assert f"{len(TARGETS)} of {len(TARGETS)} kernels passed" in result.stdout


def test_a_kernel_that_spills_is_named_and_the_exit_code_is_1(run, kernels):
    kernels(16384)
    result = run("doctor", "--compile", "--target", "sm_80")
    assert result.exit_code == 1
    assert "centre on sm_80 (numbers): spills" in result.stdout and "0 of 1 kernels passed" in result.stdout


def test_an_unknown_target_is_refused_with_the_list_of_targets(run):
    result = run("doctor", "--compile", "--target", "sm_70")
    assert result.exit_code == 2
    assert "--target sm_70: accepted are sm_80" in result.stderr and "gfx942" in result.stderr


def test_without_triton_the_error_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setattr("softprompt_kernels.kernels.triton.runtime.missing", lambda: "triton is not installed: get it")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run("doctor", "--compile")
    assert result.exit_code == 2 and "triton is not installed: get it" in result.stderr


def test_compiling_in_the_interpreter_is_refused(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("doctor", "--compile")
    assert result.exit_code == 2 and "TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("option", ["--target", "--json"])
def test_target_and_json_without_compile_are_refused(run, option):
    result = run("doctor", option, "sm_80")
    assert result.exit_code == 2 and "--compile" in result.stderr
