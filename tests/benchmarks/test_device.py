"""The device benchmark on a fake device: its clock, and implementations that fail."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


class FakeDevice:
    """Its clock moves when an implementation calls `work`. A run with a warm cache takes a tenth of the time."""

    def __init__(self) -> None:
        self.now, self.cold, self.flushes = 0.0, False, 0

    def flush(self) -> None:
        self.cold, self.flushes = True, self.flushes + 1

    def event(self) -> float:
        return self.now

    def elapsed(self, begin: float, end: float) -> float:
        return end - begin

    def peak(self, run: Callable[[], Any]) -> int:
        run()
        return 2**20

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds if self.cold else milliseconds / 10
        self.cold = False


def test_medians_are_of_runs_with_a_cold_cache_in_turns() -> None:
    from benchmarks.device.clock import medians

    device, order = FakeDevice(), []
    slow_once = iter([5.0, 1.0, 100.0, 1.0])

    def one() -> None:
        order.append("one")
        device.work(next(slow_once, 1.0))

    def other() -> None:
        order.append("other")
        device.work(2.0)

    assert medians(device, {"one": one, "other": other}, rounds=3) == {"one": 1.0, "other": 2.0}
    assert order == ["one", "other", "one", "other", "other", "one", "one", "other"]
    assert device.flushes == 6


class Case:
    """Doubles its input."""

    name, bytes, flop = "doubling", 4 * 200, 100.0

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def inputs(self) -> torch.Tensor:
        return torch.ones(100)

    def expected(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (2 * inputs,)

    def implementations(self) -> Mapping[str, Any]:
        def implementation(factor: float, milliseconds: float) -> Any:
            def prepare(inputs: torch.Tensor) -> Any:
                def run() -> tuple[torch.Tensor, ...]:
                    self.device.work(milliseconds)
                    return (factor * inputs,)

                return run

            return prepare

        def broken(inputs: torch.Tensor) -> Any:
            raise ModuleNotFoundError("no such package")

        return {"ours": implementation(2.0, 1.0), "rounded": implementation(2.02, 3.0), "not installed": broken}


def test_implementations_are_checked_and_measured_or_left_out_with_a_reason() -> None:
    from benchmarks.device.__main__ import measure

    device = FakeDevice()
    record = measure(Case(device), device, rounds=3)
    ours, rounded = record["entries"]
    assert (ours["implementation"], ours["error"], ours["ms"], ours["peak"]) == ("ours", 0.0, 1.0, 2**20)
    assert rounded["error"] == pytest.approx(0.01) and rounded["ms"] == 3.0
    assert record["left_out"] == {"not installed": "ModuleNotFoundError: no such package"}


def test_failure_of_ours_is_an_error() -> None:
    from benchmarks.device.__main__ import measure

    case = Case(FakeDevice())
    implementations = case.implementations()
    case.implementations = lambda: {"ours": implementations["not installed"]}  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="doubling: ours fails: ModuleNotFoundError"):
        measure(case, case.device, rounds=1)


def test_figures_are_shares_of_the_published_peaks_of_a_known_device() -> None:
    from benchmarks.device.__main__ import cells, peaks

    record = {"bytes": 3.35e9, "flop": 98.9e9, "dtype": "bf16"}
    entry = {"ms": 2.0, "peak": 3 * 2**20, "error": 0.001}
    assert cells(record, entry, 1.0, peaks("NVIDIA H100 80GB HBM3")) == ["2.000", "2.00", "50%", "5%", "3", "1.0e-03"]
    for unknown in ("Some GPU", "NVIDIA GH200 480GB"):
        assert cells(record, entry, 1.0, peaks(unknown)) == ["2.000", "2.00", "", "", "3", "1.0e-03"]


def test_flop_and_bytes_of_cases() -> None:
    from benchmarks.device.cases import CASES, Attention, Loss

    case = Attention(2, 3, 5, backward=False, heads=4, kv_heads=2, size=8)
    assert case.flop == 4 * 8 * 2 * 4 * (3 * 5 + 6)
    assert case.bytes == 2 * 8 * (2 * 2 * 4 * 3 + 2 * 2 * 2 * 3 + 2 * 2 * 5)
    assert Loss("live", 4, size=2, vocab=10).flop == 3 * 2 * 4 * 2 * 10
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert next(iter(case.implementations())) == "ours"


def test_implementations_of_a_case_agree_on_a_cpu() -> None:
    from benchmarks.device.cases import Attention, Loss, distance

    cases = [
        Attention(2, 6, 4, backward=True, heads=4, kv_heads=2, size=16),
        Loss("live", 5, 8, 40),
        Loss("moments", 5, 8, 40),
    ]
    for case in cases:
        inputs = case.inputs()
        expected = case.expected(inputs)
        implementations = {
            name: implementation
            for name, implementation in case.implementations().items()
            if "compiled" not in name and "fused" not in name
        }
        for name, implementation in implementations.items():
            for found, right in zip(implementation(inputs)(), expected, strict=True):
                assert distance(found, right) < 0.05, f"{case.name}: {name}"


def test_command_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.device import __main__ as device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        device.main([])
    assert "no GPU" in capsys.readouterr().err
