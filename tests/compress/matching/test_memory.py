"""Peak memory of matching in the shapes of the demo's model, and how it grows with the context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.long_context.storage import BYTES_FOR_EACH_KEY
from softprompt_kernels.compress.matching import match as module
from softprompt_kernels.compress.matching.closed_form import fit_layer
from softprompt_kernels.compress.matching.match import Matching, match
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.teacher.rows import LayerRows, Rows
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.models.tap import ScoreFunction
from softprompt_kernels.prompts import Prefix

CONTEXT, ROWS, TOKENS = 4096, 4096, 512
LONG, FEW_ROWS = 262_144, 64  # rows and keys cost time together, and memory each alone
HEADS, KV_HEADS, SIZE = 9, 3, 64
LIMIT = 512 << 20


def expensive_in_one_layer(function: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """`function` in one layer. Before it, results of the same shapes without the work, to fill the group."""
    calls: list[Any] = []

    def cheap(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == layer + 1:
            return function(*arguments)
        rows = arguments[0]
        if function.__name__ == "split":
            noise = torch.randn_like(rows.out)
            return module_parts(noise, rows.lse - 1, noise.clone(), rows.lse - 1, torch.full_like(rows.lse, 0.5))
        return torch.randn(KV_HEADS, TOKENS, SIZE), torch.randn(KV_HEADS, TOKENS, SIZE)

    return cheap


def module_parts(*tensors: torch.Tensor) -> Any:
    from softprompt_kernels.compress.matching.parts import Parts

    return Parts(*tensors)


def peak_of_matching(folder: str) -> tuple[int, int]:
    """Peak growth of resident memory in bytes, and the layers of the first group: one that GROUP_BYTES just allow."""
    from softprompt_kernels.bench.memory import PeakResident, release_freed_memory

    generator = torch.Generator().manual_seed(0)
    row_bytes = 4 * ROWS * HEADS * (3 * SIZE + 1)
    full = module.GROUP_BYTES // row_bytes
    layers = full + 1
    path = Path(folder) / "rows-00000.safetensors"
    query, out = (torch.randn(ROWS, HEADS, SIZE, generator=generator) for _ in range(2))
    lse = torch.full((ROWS, HEADS), 12.0)
    tensors = {"offset": torch.arange(ROWS) % 300}
    for index in range(layers):
        tensors |= {f"query.{index}": query.clone(), f"out.{index}": out.clone(), f"lse.{index}": lse.clone()}
    save_file(tensors, path)
    del tensors, query, out
    key, value = (torch.randn(1, KV_HEADS, CONTEXT, SIZE, generator=generator) for _ in range(2))
    context = Prefix.of([(key, value)] * layers)
    rows = Rows(
        (path,), (ScoreFunction(SIZE**-0.5),) * layers, HEADS, torch.randperm(ROWS, generator=generator), ROWS // 10
    )
    module.split = expensive_in_one_layer(module.split, full - 1)
    module.fit_layer = expensive_in_one_layer(module.fit_layer, full - 1)
    release_freed_memory()
    with PeakResident() as peak:
        found = match(context, rows, Matching(TOKENS, 2, 1), reporter=SilentReporter())
    assert found.length == TOKENS
    return peak.growth, full


def peak_of_a_layer(tokens: int) -> int:
    """Peak growth of resident memory in bytes, in the closed form of one layer with few rows."""
    from softprompt_kernels.bench.memory import PeakResident, release_freed_memory

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(KV_HEADS, tokens, SIZE, generator=generator) for _ in range(2))
    query, out = (torch.randn(HEADS, FEW_ROWS, SIZE, generator=generator) for _ in range(2))
    lse = torch.full((HEADS, FEW_ROWS), 14.0)
    rows = LayerRows(query, out, lse, torch.arange(FEW_ROWS), ScoreFunction(SIZE**-0.5))
    release_freed_memory()
    with PeakResident() as peak:
        fit_layer(rows, split(rows, key, value), key, value, TOKENS)
    return peak.growth


def all_peaks(folder: str) -> tuple[int, int, int, int]:
    """Of a layer with a short and a long context, of matching, and the layers of its first group: in one process."""
    return peak_of_a_layer(LONG // 2), peak_of_a_layer(LONG), *peak_of_matching(folder)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, int, int]:
    pytest.importorskip("psutil")
    from softprompt_kernels.bench.memory import in_fresh_process

    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    return in_fresh_process(all_peaks, str(tmp_path_factory.mktemp("rows")))


@pytest.mark.slow
def test_the_memory_of_matching_grows_with_the_context_as_counted(peaks: tuple[int, int, int, int]) -> None:
    short, long, _, _ = peaks
    counted = (BYTES_FOR_EACH_KEY * KV_HEADS + 8 * SIZE) * (LONG - LONG // 2)  # on one thread
    print(f"{short / 2**20:.0f} and {long / 2**20:.0f} MiB, counted {counted / 2**20:.0f}")
    assert long - short <= counted


@pytest.mark.slow
def test_matching_needs_at_most_512_mib_beyond_its_context(peaks: tuple[int, int, int, int]) -> None:
    _, _, growth, layers = peaks
    print(f"peak {growth / 2**20:.0f} MiB, {layers} layers in the group")
    assert layers > 3
    assert growth <= LIMIT
