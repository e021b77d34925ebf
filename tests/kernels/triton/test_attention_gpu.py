"""The Triton attention kernels on a GPU: 16-bit results, no waiting for the device, CUDA graphs, tuning."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softprompt_kernels import prompt_attention
from softprompt_kernels.kernels.triton import runtime

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda finds none")
    if runtime.missing() or runtime.interpreting():
        pytest.skip(f"the triton backend: {runtime.missing() or 'TRITON_INTERPRET is set'}")
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def attention_inputs(dtype: torch.dtype, size: int = 64) -> list[Tensor]:
    own, shared = (3, 2, 200, size), (1, 2, 150, size)
    shapes = [(3, 4, 200, size), own, own, shared, shared]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def attention(inputs: list[Tensor], backend: str) -> list[Tensor]:
    out = prompt_attention(*inputs, backend=backend)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def distance(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_errors_of_16_bit_attention_are_a_few_roundings_of_its_results(dtype: torch.dtype, size: int) -> None:
    inputs = attention_inputs(dtype, size)
    exact = attention([tensor.detach().double().requires_grad_() for tensor in inputs], "reference")
    for actual, wanted in zip(attention(inputs, "triton"), exact, strict=True):
        assert actual.dtype == dtype
        assert distance(actual, wanted) < 4 * torch.finfo(dtype).eps


def test_attention_never_waits_for_the_device() -> None:
    inputs = attention_inputs(torch.bfloat16)
    attention(inputs, "triton")  # the first call compiles, and may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_gives_the_same_bits() -> None:
    inputs = attention_inputs(torch.bfloat16)
    expected = attention(inputs, "triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attention(inputs, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention(inputs, "triton")
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_tuning_changes_results_by_rounding_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = attention_inputs(torch.bfloat16)
    expected = attention(inputs, "triton")
    monkeypatch.setenv("SOFTPROMPT_TRITON_TUNE", "1")
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path))
    for actual, wanted in zip(attention(inputs, "triton"), expected, strict=True):
        assert distance(actual, wanted) < 4 * torch.finfo(torch.bfloat16).eps


OPTIONS = {
    "window": {"window": 70},
    "softcap": {"softcap": 5.0},
    "full": {"causal": False},
    "padded": {"key_lengths": [200, 3, 120]},
    "bank": {"prompt_index": [0, 0, 0], "prompt_lengths": [77]},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [64, 128])
def test_every_argument_in_bf16(name: str, size: int) -> None:
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in OPTIONS[name].items()}
    inputs = attention_inputs(torch.bfloat16, size)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    results = []
    for given, backend in ((inputs, "triton"), (doubles, "reference")):
        out = prompt_attention(*given, **options, backend=backend)
        results.append([out, *torch.autograd.grad(out, given, torch.ones_like(out))])
    for actual, wanted in zip(*results, strict=True):
        assert distance(actual, wanted) < 4 * torch.finfo(torch.bfloat16).eps
