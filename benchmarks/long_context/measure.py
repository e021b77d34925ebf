"""What `python -m benchmarks.long_context` measures: capture, answers and the closed form, each in this process."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from softprompt_kernels.bench.memory import release_freed_memory
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.matching.closed_form import fit_layer
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.teacher.context import ContextStorage, capture_context
from softprompt_kernels.compress.teacher.rows import LayerRows
from softprompt_kernels.models import ScoreFunction, prepare, sample

ROWS, PROMPT = 6144, 512
HEADS, KV_HEADS, SIZE = 9, 3, 64
INTERVAL = 0.02  # seconds between two samples of the memory


@dataclass
class Peak:
    """How far the memory of a process grew, in bytes, and the seconds that it took."""

    anonymous: int = 0
    mapped: int = 0
    seconds: float = 0.0


def resident() -> tuple[int, int]:
    """Bytes of anonymous pages and of mapped files in the memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0]), 1024 * int(lines["RssFile"].split()[0])


@contextmanager
def watched() -> Iterator[Peak]:
    """The peak within the context, sampled by a thread."""
    release_freed_memory()
    before, peak, ended = resident(), Peak(), threading.Event()

    def look() -> None:
        while not ended.wait(INTERVAL):
            now = resident()
            peak.anonymous = max(peak.anonymous, now[0] - before[0])
            peak.mapped = max(peak.mapped, now[1] - before[1])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    begin = time.perf_counter()
    try:
        yield peak
    finally:
        peak.seconds = time.perf_counter() - begin
        ended.set()
        thread.join()


def load(folder: str, tokens: int, layers: int | None, yarn: bool) -> PreTrainedModel:
    """The model, with a longer window if `yarn`."""
    quiet_libraries()
    config = AutoConfig.from_pretrained(folder)
    window = config.max_position_embeddings
    if layers is not None:
        config.num_hidden_layers = layers
    if yarn and tokens + 64 > window:
        factor = float(-(-(tokens + 64) // window))
        config.max_position_embeddings = int(factor * window)
        config.rope_parameters = {
            "rope_theta": config.rope_parameters["rope_theta"],
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": window,
        }
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    prepare(model)
    return model


def measure_model(options: dict[str, Any], storage: str) -> dict[str, Peak]:
    """Capture and answers, in this process."""
    torch.set_num_threads(options["threads"])
    model = load(options["model"], options["tokens"], options["layers"], options["yarn"])
    ids = torch.randint(100, 40_000, (1, options["tokens"]), generator=torch.Generator().manual_seed(0))
    queries = [list(range(200 + i, 220 + i)) for i in range(8)]
    with tempfile.TemporaryDirectory(dir=options["folder"]) as scratch:
        kept = ContextStorage(
            torch.bfloat16 if storage == "bfloat16" else None,
            Path(scratch) / "context.safetensors" if storage == "disk" else None,
        )
        capture_context(model, ids[:, :8])  # reads the weights from the disk
        with watched() as capture_peak:
            context = capture_context(model, ids, storage=kept)
        with watched() as answers_peak:
            list(sample(model, queries, context, new_tokens=8, temperature=0.0))
        del context
    return {"capture": capture_peak, "answers": answers_peak}


def measure_matching(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Peak]:
    """The closed form of one layer, in this process, behind random keys and values of this dtype."""
    torch.set_num_threads(options["threads"])
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(KV_HEADS, options["tokens"], SIZE, generator=generator).to(dtype) for _ in range(2))
    query, out = (torch.randn(HEADS, ROWS, SIZE, generator=generator) for _ in range(2))
    rows = LayerRows(query, out, torch.full((HEADS, ROWS), 14.0), torch.arange(ROWS) % 300, ScoreFunction(SIZE**-0.5))
    with watched() as peak:
        key, value = key.float(), value.float()
        fit_layer(rows, split(rows, key, value), key, value, PROMPT)
    return {"matching, one layer": peak}
