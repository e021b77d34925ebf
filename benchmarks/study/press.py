"""Compresses the captured keys and values of a context with a press of kvpress, in a process of its own.

    python -m benchmarks.study.press JOB.json OUT.safetensors

A press keeps k keys and values of the context for each head, at the positions that they have in the context. A query
continues at position C, as kvpress itself has it. `press_prefix` therefore moves the keys by k − C, which changes no
score, and the result is a prefix of k tokens like all others.

kvpress is not a dependency. On import it wraps all attention functions of transformers, hence the process. It asks for
`cache_position`, which transformers no longer hands to the attention, so the prefill passes it. KVzip chooses how many
keys each head keeps. A prefix has the same number for each head, so of KVzip's scores the best k of each head are kept
("pair-uniform" in its paper).

Cost: one pass of the model over the context, KVzip two and more.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.study.corpus import ROOT
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import shift_keys
from softprompt_kernels.prompts import Prefix


def missing() -> str | None:
    """Why no press can run here; None if they can."""
    return None if importlib.util.find_spec("kvpress") else "kvpress is not installed (make study installs it)"


def press_prefix(
    model: PreTrainedModel, name: str, ids: Tensor, before: int, k: int, settings: dict[str, Any], folder: Path
) -> tuple[Prefix, float]:
    """The prefix of k tokens that a press makes of a context, and the seconds that it took.

    Args:
        model: prepared; it moves the keys.
        name: the folder of the model, which the process loads.
        ids: `[1, C]`, the tokens of the context.
        before: tokens before the text itself, such as an opening of the chat. KVzip does not repeat them.
        k: tokens to keep.
        settings: "press", the name of the class in kvpress, and its options.
        folder: where the result is kept for the other seeds.

    Raises:
        SoftPromptError: kvpress is not installed, or the press fails.
    """
    if reason := missing():
        raise SoftPromptError(f"method: {reason}")
    job = {
        "model": str(Path(name).resolve()) if Path(name).exists() else name,
        "ids": ids[0].tolist(),
        "before": before,
        "tokens": k,
        "settings": settings,
        "threads": torch.get_num_threads(),
    }
    folder = folder.resolve()  # the process starts in the root of the repository
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{settings['press']}-{k}.safetensors"
    if not _is_complete(out, job):
        file = folder / f"{settings['press']}-{k}.json"
        file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.study.press", str(file), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SoftPromptError(f"method: {settings['press']} fails: {last[:300]}")
    with safe_open(out, framework="pt") as tensors:
        seconds = float(tensors.metadata()["seconds"])
        layers = [
            (tensors.get_tensor(f"key.{layer}"), tensors.get_tensor(f"value.{layer}"))
            for layer in range(model.config.num_hidden_layers)
        ]
    prefix = Prefix.of(layers).to(model.device)
    return shift_keys(model, prefix, k - ids.shape[1]), seconds


def _is_complete(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` was made by this job; the number of threads does not count."""
    try:
        with safe_open(out, framework="pt") as tensors:
            return bool(tensors.metadata()["job"] == _key(job))
    except Exception:  # no file, a damaged one, or one of another job
        return False


def _key(job: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in job.items() if name != "threads"}, sort_keys=True)


def make_press(kvpress: Any, settings: dict[str, Any], context_tokens: int, k: int) -> Any:
    """The press that keeps k of C tokens for each head.

    Args:
        kvpress: the module.
        settings: as in `press_prefix`.
    """
    options = {name: value for name, value in settings.items() if name not in ("press", "heads")}
    # kvpress keeps int(C (1 − compression_ratio)) tokens; half a token more keeps rounding from losing one.
    ratio = 1 - (k + 0.5) / context_tokens
    if "window_size" in options:  # these last tokens are always kept; more than half of k would leave no choice
        options["window_size"] = min(options["window_size"], max(1, k // 2))
    if settings["press"] != "KVzipPress":
        return getattr(kvpress, settings["press"])(compression_ratio=ratio, **options)

    class EvenKVzip(kvpress.KVzipPress):  # type: ignore[name-defined,misc]
        """KVzip's scores, with the same number of keys for each head."""

        kept: list[Tensor]

        def compress_post(self, model: Any) -> None:
            self.score_val[..., : self.n_sink] = self.score_val.amax() + 1
            self.kept = list(self.score_val.topk(k, dim=-1).indices)  # [1, Hkv, k] for each layer

    return EvenKVzip(compression_ratio=ratio, **options)


@torch.no_grad()
def compressed(model: Any, press: Any, ids: Tensor, before: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, `[1, Hkv, k, D]`, at their positions in the context."""
    cache = DynamicCache()
    with press(model):
        if hasattr(press, "prefix_length"):
            press.prefix_length = before
        model.model(input_ids=ids, past_key_values=cache, cache_position=torch.arange(ids.shape[1]))
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if hasattr(press, "kept"):
        indices = [
            kept[..., None].expand(-1, -1, -1, key.shape[-1]) for kept, (key, _) in zip(press.kept, layers, strict=True)
        ]
        layers = [
            (key.gather(2, index), value.gather(2, index)) for index, (key, value) in zip(indices, layers, strict=True)
        ]
    return layers


def main(job_file: Path, out: Path) -> None:
    """Run one job in this process."""
    import kvpress

    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    ids, k = torch.tensor([job["ids"]]), job["tokens"]
    press = make_press(kvpress, job["settings"], ids.shape[1], k)
    begin = time.perf_counter()
    layers = compressed(model, press, ids, job["before"])
    seconds = time.perf_counter() - begin
    shapes = {key.shape[2] for key, _ in layers}
    if shapes != {k}:
        raise SoftPromptError(
            f"{job['settings']['press']} keeps {sorted(shapes)} tokens, accepted is {k} in each layer"
        )
    tensors = {f"key.{layer}": key.contiguous() for layer, (key, _) in enumerate(layers)}
    tensors |= {f"value.{layer}": value.contiguous() for layer, (_, value) in enumerate(layers)}
    partial = out.with_suffix(".partial")
    save_file(tensors, partial, {"job": _key(job), "seconds": str(seconds)})
    partial.replace(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
