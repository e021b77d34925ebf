"""Where a run keeps the keys and values of its context, and what memory the stages that read them take.

    bytes = C · Σ over layers of Hkv·(D + Dv) · bytes of a number

They stay in memory if they fit into `context_memory`, else they go to the file `cache/context.safetensors` of the run.
The default of `context_memory` is half of the memory that is free when the model is loaded: the other half is for the
rest. The file changes no bit of the result. Fewer bits a number do, so they are never chosen by themselves
(`context_dtype`). A file that an earlier call completed is read in any case.

What the stages take beside the model and these bytes is counted, not measured. Of it only these terms grow with C:

    8·C                                  the token ids
    one layer of the context             where it is cast or moved to another device to be read; in matching in fp32
    BYTES_FOR_EACH_KEY·Hkv·C             matching: the importance of each key, its gradient, and the choice of keys
    8·D·C for each thread                matching: what the kernel of the CPU packs of the keys of one head
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.matching.match import GROUP_BYTES
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.parallel.launch import launched
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.teacher.context import CAPTURE_TOKENS, ContextStorage
from softprompt_kernels.models import capture
from softprompt_kernels.prompts import Prefix
from softprompt_kernels.prompts.fingerprint import as_recorded, json_hash, model_fingerprint, tokenizer_fingerprint
from softprompt_kernels.sizes import size

GIB = 1 << 30
BYTES_FOR_EACH_KEY = 72
"""What matching takes for each key of one layer, beside the kernel."""
_CGROUPS = (  # the limit of a container, what it uses, and the file with what of that can be dropped
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class ContextPlan:
    """Where the keys and values of a context are, and what they need.

    Args:
        storage: for `capture_context`.
        memory_bytes, disk_bytes: of the keys and values; one of them is 0.
        budget_bytes: the memory that was allowed; None: no limit is known.
        peak_bytes: by stage, what it takes beside the model and the keys and values, counted.
        summary: the choice in words.
    """

    storage: ContextStorage
    memory_bytes: int
    disk_bytes: int
    budget_bytes: int | None
    peak_bytes: dict[str, int]
    summary: str


def plan_context(inputs: RunInputs, folder: RunFolder, file: Path, reporter: Reporter) -> ContextPlan:
    """Decide where the keys and values of a run's context go, and say so for a long one.

    Args:
        inputs: of the run.
        folder: of the run; it need not exist.
        file: where they go if they do not stay in memory.
        reporter: receives the sentence.
    """
    config, model = inputs.config, inputs.model
    first = capture(model, inputs.context_ids[:, :1])
    dtype = first.dtype if config.context_dtype == "auto" else getattr(torch, config.context_dtype)
    total = inputs.context_tokens * first.nbytes * dtype.itemsize // first.dtype.itemsize
    free = free_memory(model.device)
    shared = launched().local_world if model.device.type == "cpu" else 1
    budget = None if free is None else free // 2 // shared
    if config.context_memory is not None:
        budget = round(config.context_memory * GIB)
    begun = file.exists() or file.with_name(file.name + ".partial").exists()
    # What one rank needs on the disk all read from there. It changes no bits.
    on_disk = any(ranks.gather(begun or (budget is not None and total > budget)))
    made_from = _made_from(inputs, folder.identity) if on_disk else None
    storage = ContextStorage(dtype, file if on_disk else None, made_from, reporter)
    name = str(dtype).removeprefix("torch.")
    where = "on the disk" if on_disk else "in memory"
    why = "" if budget is None else f" (context_memory allows {size(budget)})"
    summary = f"{size(total)} of keys and values in {name}, {where}{why}"
    if on_disk or dtype != first.dtype or inputs.context_tokens > CAPTURE_TOKENS:
        reporter.message(f"The context has {inputs.context_tokens} tokens: {summary}.")
    moved = dtype != first.dtype or (on_disk and model.device.type != "cpu")
    return ContextPlan(
        storage,
        0 if on_disk else total,
        total if on_disk else 0,
        budget,
        peak_bytes(inputs, first, dtype, moved),
        summary,
    )


def _made_from(inputs: RunInputs, recorded: Mapping[str, Any]) -> dict[str, str]:
    """What a file depends on, as the identity of the run has it."""
    model, tokenizer = recorded.get("model"), recorded.get("tokenizer")
    return {
        "model": json_hash(as_recorded(model, model_fingerprint(inputs.model, model))),
        "tokenizer": json_hash(as_recorded(tokenizer, tokenizer_fingerprint(inputs.tokenizer, tokenizer))),
    }


def peak_bytes(inputs: RunInputs, first: Prefix, dtype: torch.dtype, moved: bool) -> dict[str, int]:
    """By stage, what it takes beside the model and the keys and values of the context.

    Args:
        inputs: of the run.
        first: the captured first token, which has the shapes of all layers.
        dtype: of the stored keys and values.
        moved: whether a layer is cast or moved to be read.
    """
    config, text, tokens = inputs.config, inputs.model.config.get_text_config(), inputs.context_tokens
    number, heads = first.dtype.itemsize, text.num_attention_heads
    kv_heads, key_size, value_size = max(
        ((key.shape[1], key.shape[3], value.shape[3]) for key, value in first.layers),
        key=lambda shape: shape[0] * (shape[1] + shape[2]),
    )
    layer = tokens * kv_heads * (key_size + value_size)
    copy = layer * number if moved else 0
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = number * (4 * text.hidden_size + 2 * (heads + kv_heads) * (key_size + value_size) + 4 * inner)
    queries = [query for of_set in inputs.sets.values() for query in of_set]
    longest = max(len(inputs.chat.query_ids(query.input)) for query in queries) + config.new_tokens
    rows = min(config.sample_batch, len(queries))
    found = {
        "context": min(tokens, CAPTURE_TOKENS) * activations + copy,
        "answers": rows * longest * first.nbytes + rows * text.vocab_size * 4 + CAPTURE_TOKENS * activations + copy,
    }
    if config.init == "matched":
        row = 4 * heads * (key_size + 2 * value_size + 1) * config.matching_rows
        fp32 = 4 * layer if dtype != torch.float32 or moved else 0
        # The rows of a group; of one layer its rows as they are read, sorted, and split; Gram matrices and P.
        grams = 6 * 8 * kv_heads * config.tokens**2
        packed = 8 * key_size * min(torch.get_num_threads(), kv_heads)
        keys = (BYTES_FOR_EACH_KEY * kv_heads + packed) * tokens
        found["matching"] = max(GROUP_BYTES, row) + 4 * row + grams + keys + fp32
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had without taking them from another process: of a GPU, or of the CPU within a container's
    limit. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    for limit_file, used_file, parts_file in _CGROUPS:
        with suppress(OSError, ValueError):
            limit, used = (int(Path(path).read_text(encoding="ascii")) for path in (limit_file, used_file))
            parts = dict(line.split() for line in Path(parts_file).read_text(encoding="ascii").splitlines())
            left = max(0, limit - used + int(parts.get("inactive_file", 0)))
            free = left if free is None else min(free, left)
    return free
