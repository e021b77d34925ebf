"""`python -m tests.compress.bank.measure_recall FOLDER`: the seconds of a bank of 8 contexts against runs of one.

On the model that recalls, with PyTorch's number of threads, on a machine that does nothing else. Pictures are left out
on both sides. Recovered is on held-out queries.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from softprompt_kernels.compress import CompressConfig, compress
from tests.compress.distill.recall_model import RecallTask, save_recall_model

CONTEXTS = 8
WAYS: dict[str, dict[str, Any]] = {
    "trained, 150 steps": {"new_tokens": 1, "steps": 150, "init": "strided", "learning_rate": 0.1},
    "matched and 200 steps": {"new_tokens": 3, "steps": 200},
    "matched": {"new_tokens": 8, "steps": 0},
}


def measure(folder: Path, context: Path, output: Path, **options: Any) -> tuple[float, dict[str, Any]]:
    """Seconds of a run, and its figures."""
    shutil.rmtree(output, ignore_errors=True)
    settings = {"model": folder / "model", "context": context, "output": output, "selfstudy": 0, "tokens": 8}
    config = CompressConfig.model_validate({**settings, "model": str(folder / "model"), "converged": 0, **options})
    begin = time.perf_counter()
    with patch("softprompt_kernels.compress.run.save_curves"), patch("softprompt_kernels.compress.run.save_report"):
        figures = compress(config)
    return time.perf_counter() - begin, figures


def main(folder: Path) -> None:
    """Print a line for each way."""
    print(f"{torch.get_num_threads()} threads\n")
    save_recall_model(folder / "model")
    alone, lines = [], []
    for seed in range(CONTEXTS):
        task = RecallTask.of(seed)
        (folder / f"{seed}").mkdir(parents=True, exist_ok=True)
        alone.append(task.write(folder / f"{seed}"))
        queries = {name: [{"input": text} for text in getattr(task, name)] for name in ("train", "heldout")}
        content = {"queries": queries["train"], "heldout": queries["heldout"], "text": task.context}
        lines.append(json.dumps({"name": f"{seed}", **content}))
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    measure(folder, folder / "all.jsonl", folder / "warm", new_tokens=1, steps=2, matching_steps=2)
    print("| bank of 8 | alone | one after the other | bank | bank / alone | largest difference of recovered |")
    print("|---|---|---|---|---|---|")
    for name, options in WAYS.items():
        runs = [
            measure(folder, one["context"], folder / "run", queries=one["queries"], heldout=one["heldout"], **options)
            for one in alone
        ]
        seconds, bank = measure(folder, folder / "all.jsonl", folder / "bank", **options)
        differences = [
            abs(figures["heldout"]["recovered"] - bank["contexts"][f"{seed}"]["heldout"]["recovered"])
            for seed, (_, figures) in enumerate(runs)
        ]
        total = sum(one for one, _ in runs)
        one = total / CONTEXTS
        print(f"| {name} | {one:.2f} | {total:.1f} | {seconds:.2f} | {seconds / one:.2f} | {max(differences):.1e} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
