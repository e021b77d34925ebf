"""`python -m tests.compress.compressor_runs.measure_recall FOLDER`: a compressor on the model that recalls.

For each seed, a compressor is trained on contexts of key-value pairs (see `tests/compress/distill/recall_model.py`). On
contexts that it was not trained on it is compared, with as many tokens and on the same queries, with

    closed form   matching of each context by itself, without refinement (`matching_steps=0`)
    matched       the same with refinement

Both of these have the teacher's answers to queries about the very context. The compressor has read the context once.
What is printed is the recovered share of the KL, pooled over the test contexts: by seed, and mean ± standard deviation.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from softprompt_kernels.compress import CompressConfig, CompressorConfig, load_model, train_compressor
from softprompt_kernels.compress.run import compress_one
from tests.compress.distill.recall_model import RecallTask, save_recall_model

TESTED = 16  # test contexts, and as many to choose the step by


def recall_task(number: int, pairs: int, words: int) -> RecallTask:
    """The task of this number. All seeds of a comparison have tasks of their own."""
    return RecallTask.of(number, pairs=pairs, words=words)


def training(
    folder: Path,
    model: Path,
    seed: int,
    *,
    pairs: int,
    words: int,
    contexts: int,
    tested: int = TESTED,
    **options: Any,
) -> CompressorConfig:
    """The training of a compressor on so many contexts, beside those that choose and test."""
    folder.mkdir(parents=True, exist_ok=True)
    total = contexts + 2 * tested
    with (folder / "contexts.jsonl").open("w") as file:
        for number in range(seed * 100_000, seed * 100_000 + total):
            task = recall_task(number, pairs, words)
            queries = [{"input": query} for query in task.heldout]
            file.write(json.dumps({"name": f"task-{number}", "text": task.context, "queries": queries}) + "\n")
    settings = {
        "model": str(model),
        "contexts": folder / "contexts.jsonl",
        "output": folder / "training",
        "heldout_share": tested / total,
        "test_share": tested / total,
        "selfstudy": 0,
        "new_tokens": 1,
        "segments": 1,
        "batch_contexts": 16,
        "evaluate_every": 250,
        "device": "cpu",
        "seed": seed,
    }
    return CompressorConfig.model_validate(settings | options)


def matched(folder: Path, config: CompressorConfig, loaded: Any, task: RecallTask, steps: int) -> dict[str, Any]:
    """The figures of one context that is matched by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": config.model,
        "output": folder / f"run-{steps}",
        "tokens": config.tokens,
        "selfstudy": 0,
        "new_tokens": 1,
        "steps": 0,
        "matching_steps": steps,
        "device": "cpu",
        **task.write(folder),
    }
    found: dict[str, Any] = compress_one(CompressConfig.model_validate(settings), None, loaded)["heldout"]
    return found


def recovered(of_contexts: list[dict[str, Any]]) -> float:
    """Of contexts with equally many tokens each."""
    return 1 - sum(one["kl_prompt"] for one in of_contexts) / sum(one["kl_none"] for one in of_contexts)


def compare(folder: Path, seed: int, reporter: Any = None, **options: Any) -> dict[str, float]:
    """The recovered shares on the test contexts of one seed."""
    model = folder / "model"
    if not model.exists():
        save_recall_model(model)
    config = training(folder / f"seed-{seed}", model, seed, **options)
    loaded = load_model(config.model, "float32", "cpu")
    figures = train_compressor(config, reporter, loaded)
    tested = figures["test"]["contexts"]
    rows: dict[str, float] = {"read once": recovered(list(tested.values()))}
    for name, steps in (("closed form", 0), ("matched", 300)):
        found = []
        for context in tested:
            task = recall_task(int(context.removeprefix("task-")), options["pairs"], options["words"])
            found.append(matched(folder / f"seed-{seed}" / context, config, loaded, task, steps))
        rows[name] = recovered(found)
        # The same queries of the same contexts.
        assert abs(sum(one["kl_none"] for one in found) - sum(one["kl_none"] for one in tested.values())) < 1e-3
    return rows | {"best step": figures["best_step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, default in (("pairs", 4), ("words", 4), ("tokens", 4), ("contexts", 1000), ("steps", 3000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--lora-learning-rate", type=float, default=5e-3)
    given = vars(parser.parse_args())
    folder, seeds = given.pop("folder"), given.pop("seeds")
    import torch

    from softprompt_kernels.cli.progress import terminal_reporter

    torch.set_num_threads(1)
    rows = []
    for seed in seeds:
        rows.append(compare(folder, seed, terminal_reporter(), **given, max_grad_norm=None))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    for name in rows[0]:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:12} {statistics.mean(values):8.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main()
