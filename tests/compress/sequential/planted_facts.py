"""A long text with planted facts for the model of `recall_model.py`, which is exact, and what segments keep of them.

A fact is a pair of words, "key value", between other words. Each key stands in the text once, and a query ends with it.
So how much of a fact a prompt has kept is known, and nothing but the compression can lose it.

`python -m tests.compress.sequential.planted_facts FOLDER window` compresses texts of four windows, whole and in four
segments. `... FOLDER long` compresses 100,000 tokens in segments. Both print tables.
"""

import json
import random
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softprompt_kernels.compress import CompressConfig, compress
from softprompt_kernels.compress.report.table import table_text
from softprompt_kernels.compress.sequential.table import distance_table
from tests.compress.distill.recall_model import FILLERS, VALUES, recall_model, recall_tokenizer

KEYS, NOISE, WORDING = FILLERS[:500], FILLERS[500:900], FILLERS[900:]
PARAGRAPH = 20  # words


def save_long_model(folder: Path, window: int = 4096) -> Path:
    """The model of `recall_model.py` with another window, in transformers' layout."""
    tokenizer = recall_tokenizer()
    model = recall_model(len(tokenizer))
    model.config.max_position_embeddings = window
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plant(folder: Path, seed: int, words: int, facts: int, wordings: int = 4) -> dict[str, Path]:
    """Write a text of so many words with facts at even distances, and queries about them.

    Returns:
        The files as fields of a CompressConfig.
    """
    draw = random.Random(seed)
    text = [draw.choice(NOISE) for _ in range(words)]
    train, heldout = [], []
    for number, key in enumerate(draw.sample(KEYS, facts)):
        place = int((number + 0.5) * words / facts)
        text[place : place + 2] = [key, draw.choice(VALUES)]
        asked = [f"{word} {key}" for word in draw.sample(WORDING, wordings + 2)]
        train += asked[:wordings]
        heldout += asked[wordings:]
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.txt" for name in ("context", "queries", "heldout")}
    paragraphs = (" ".join(text[start : start + PARAGRAPH]) for start in range(0, words, PARAGRAPH))
    files["context"].write_text("\n\n".join(paragraphs))
    for name, queries in (("queries", train), ("heldout", heldout)):
        files[name].write_text("".join(json.dumps({"input": query}) + "\n" for query in queries))
    return files


def settings(model: Path, files: dict[str, Path], output: Path, **options: Any) -> CompressConfig:
    """A run with these files. Options override its settings."""
    common = {"model": str(model), "output": output, "selfstudy": 0, "new_tokens": 1, "device": "cpu", "seed": 0}
    common |= {"steps": 100, "batch_size": 32, "learning_rate": 0.05, "evaluation_sequences": 4, "replay": 128}
    common |= files | options
    if "segment_tokens" not in common:
        del common["replay"]
    return CompressConfig.model_validate(common)


@contextmanager
def silent() -> Iterator[None]:
    """Runs draw no pages: there are many of them."""
    from softprompt_kernels.compress import run

    drawn = run.save_curves, run.save_report
    run.save_curves = run.save_report = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        run.save_curves, run.save_report = drawn


def four_windows(folder: Path, seeds: int = 5) -> None:
    """Texts of 400 tokens with 24 facts: whole, and in four segments of 100."""
    model, segments = save_long_model(folder / "model"), {"segment_tokens": 105}
    accumulated = segments | {"state": "accumulated"}
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "whole": (32, {}),
        "replaced": (32, segments),
        "replaced, without replay": (32, segments | {"replay": 0}),
        "replaced, k = 12": (12, segments),
        "whole, k = 12": (12, {}),
        "accumulated, k = 8 each": (8, accumulated),
    }
    rows = []
    for name, (tokens, options) in ways.items():
        found = []
        for seed in range(seeds):
            output = folder / f"run-{seed}-{re.sub('[^a-z0-9]+', '-', name)}"
            files = plant(folder / f"text-{seed}", seed, 390, 24)
            found.append(compress(settings(model, files, output, tokens=tokens, **options))["heldout"]["recovered"])
        rows.append([name, f"{sum(found) / seeds:.3f}", f"{min(found):.3f}", f"{max(found):.3f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    print(table_text(["recovered", "mean", "least", "most"], rows))


def long_text(folder: Path, words: int, facts: int, tokens: int, state: str, size: int, **options: Any) -> None:
    """One long text in segments: what is recovered by distance, and the time and memory of segments."""
    model = save_long_model(folder / "model", 8192)
    files = plant(folder / f"text-{words}-{facts}", 1, words, facts)
    output = folder / f"long-{state}-{words}-{facts}-{tokens}"
    begin = time.perf_counter()
    found = compress(
        settings(model, files, output, tokens=tokens, state=state, segment_tokens=size, **options), Memory(words)
    )
    print(f"\n{found['context_tokens']} tokens, {facts} facts, {state}, a prompt of {found['prompt_tokens']}: ", end="")
    print(f"{found['heldout']['recovered']:.3f} recovered, {time.perf_counter() - begin:.0f} s")
    print(table_text(*distance_table(found["segments"])))
    by_segment = found["segments"]["by_segment"]
    quarter = max(1, len(by_segment) // 4)
    for first in range(0, len(by_segment), quarter):
        part = by_segment[first : first + quarter]
        seconds = sum(one["seconds"] for one in part) / len(part)
        print(f"segments {first + 1} to {first + len(part)}: {seconds:.2f} s each")


class Memory:
    """A reporter that prints the process's peak memory and processor time now and then."""

    def __init__(self, words: int) -> None:
        self.words = words

    def message(self, text: str) -> None:
        """Print every tenth segment."""
        number = text.split()[1] if text.startswith("Segment") else ""
        if number.isdigit() and int(number) % 10 == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            used = f"peak memory so far {peak:.0f} MiB, {time.process_time():.0f} s of the processor"
            print(f"{text} ({used})", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Any]:
        """Shows nothing."""
        yield lambda count, **figures: None


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with silent():
        if sys.argv[2] == "window":
            four_windows(target)
        else:
            more = {"steps": 60, "replay": 200}
            for tokens, state in ((128, "replaced"), (32, "replaced"), (8, "accumulated")):
                long_text(target, 100_000, 100, tokens, state, 2560, **more)
