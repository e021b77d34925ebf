"""A training step with cached moments against the obvious way of writing it: seconds, peak memory, and the same loss.

    python benchmarks/step/comparison.py --model .cache/SmolLM2-135M-Instruct --context demo/handbook.txt

Ours is `compress.Trainer.train_step` with a KV prompt, on the backend that the ops choose and on `composed`. The
obvious way is transformers and PEFT: a CARTRIDGE of the same size, the teacher run over context + query + output in
every step, logits of all tokens, `F.kl_div` on those that predict the output, AdamW. All get the same batch and start
from the same prompt, so their first loss has to be the same within 1e-4: the script fails if it is not.
`step_sides.py` has them side by side.

Seconds: steps of all take turns, after one each that does not count; median, least and most. Memory: see
`step_memory.py`. What cached moments cost before training is said below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.machine import processor
from benchmarks.step.implementations import SIDES, Side
from benchmarks.step.memory import peak_of
from benchmarks.step.problem import Preparation, Problem, make_problem, timed
from benchmarks.step.profile import breakdown
from softprompt_kernels.compress import load_model
from softprompt_kernels.compress.inputs import read_text
from softprompt_kernels.compress.sources.queries import load_queries, write_text
from softprompt_kernels.errors import SoftPromptError

LOSS_TOLERANCE = 1e-4
QUERIES = Path(__file__).parents[2] / "demo" / "queries.jsonl"


@dataclass(frozen=True)
class Result:
    """One side: loss of its first step, seconds of each step that counts, bytes above the loaded model."""

    loss: float
    seconds: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """All sides by name, ours first, the obvious one last; ‖difference‖ / ‖gradient‖ of these two's first gradients."""

    results: dict[str, Result]
    gradient_difference: float

    def seconds_ratio(self) -> float:
        """How many of our steps fit into one of theirs."""
        ours, *_, theirs = (median(result.seconds) for result in self.results.values())
        return theirs / ours

    def memory_ratio(self) -> float:
        """Our peak as a part of theirs."""
        ours, *_, theirs = (result.peak_bytes for result in self.results.values())
        return ours / theirs


def compare(problem: Problem, repeats: int, say: Callable[[str], None]) -> Comparison:
    """Measure all sides.

    Args:
        problem: what they work on.
        repeats: steps of each that count.
        say: told what has been measured so far.

    Raises:
        SoftPromptError: their first losses differ.
    """
    peaks = {}
    for name in SIDES:
        peaks[name] = peak_of(name, problem)
        say(f"{name}: {peaks[name] / 2**20:.0f} MiB")
    sides, losses, difference = first_steps(problem)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side.step)[1])
            say(f"{name}: step {number + 1} of {repeats} took {seconds[name][-1]:.2f} s")
    results = {name: Result(losses[name], tuple(seconds[name]), peaks[name]) for name in SIDES}
    return Comparison(results, difference)


def first_steps(problem: Problem) -> tuple[dict[str, Side], dict[str, float], float]:
    """All sides after a step each, the losses of that, and how far the first and the last one's gradients are apart.

    Raises:
        SoftPromptError: the losses differ.
    """
    sides: dict[str, Side] = {name: way(problem, way.load(problem.model)) for name, way in SIDES.items()}
    losses = {name: side.step() for name, side in sides.items()}
    check_same_loss(losses)
    ours, *_, theirs = (side.gradient() for side in sides.values())
    return sides, losses, float((ours - theirs).norm() / theirs.norm())


def check_same_loss(losses: dict[str, float]) -> None:
    """Refuses losses that are further apart than `LOSS_TOLERANCE`: then the sides do different work."""
    if not max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE:
        raise SoftPromptError(f"loss: got {losses}, accepted is the same within {LOSS_TOLERANCE}")


def show(console: Console, problem: Problem, cost: Preparation, comparison: Comparison) -> None:
    """The table, and what has to be known to read it."""
    table = Table("training step", title=describe(problem), title_justify="left")
    for column in ("seconds", "min..max", "faster", "peak MiB", "memory", "loss"):
        table.add_column(column, justify="right")
    theirs = list(comparison.results.values())[-1]
    for name, result in comparison.results.items():
        seconds = result.seconds
        table.add_row(
            name,
            f"{median(seconds):.3f}",
            f"{min(seconds):.3f}..{max(seconds):.3f}",
            f"{median(theirs.seconds) / median(seconds):.2f}×",
            f"{result.peak_bytes / 2**20:.0f}",
            f"{result.peak_bytes / theirs.peak_bytes:.2f}×",
            f"{result.loss:.6f}",
        )
    console.print(table)
    console.print(f"First gradients of the prompt differ by {comparison.gradient_difference:.1e} of their norm.")
    console.print(
        f"Before training, not in the step: {cost.context:.2f} s for the context, once, and "
        f"{cost.moments_per_sequence:.3f} s for the moments of each sequence, once."
    )
    console.print("Peak: resident memory above the loaded model, memory-mapped moments included.")


def describe(problem: Problem) -> str:
    """Sizes, processor and threads in two lines."""
    return (
        f"{len(problem.examples)} sequences (ours: {problem.micro_batch_size} at once), {problem.targets} tokens in "
        f"the loss; context {len(problem.context_ids)}, prompt {problem.tokens} tokens\n"
        f"{processor()}, {problem.threads} threads, torch {torch.__version__}, fp32"
    )


def show_profile(console: Console, problem: Problem) -> None:
    """Two tables: the parts of our step, and what the largest of the rest are."""
    name, way = next(iter(SIDES.items()))
    side = way(problem, way.load(problem.model))
    side.step()
    parts, rest = breakdown(side)
    total = sum(parts.values())
    for title, figures in ((f"{name}: {total:.3f} s", parts), ("elsewhere", dict(list(rest.items())[:12]))):
        table = Table(title, "seconds", "share")
        for part, seconds in figures.items():
            table.add_row(part, f"{seconds:.3f}", f"{seconds / total:.1%}")
        console.print(table)


def as_json(problem: Problem, cost: Preparation, comparison: Comparison) -> str:
    """All figures and what they were measured on."""
    record = {
        "model": problem.model,
        "batch": len(problem.examples),
        "micro_batch_size": problem.micro_batch_size,
        "context_tokens": len(problem.context_ids),
        "prompt_tokens": problem.tokens,
        "loss_tokens": problem.targets,
        "processor": processor(),
        "threads": problem.threads,
        "torch": torch.__version__,
        "sides": {name: asdict(result) for name, result in comparison.results.items()},
        "times_faster": comparison.seconds_ratio(),
        "memory_ratio": comparison.memory_ratio(),
        "gradient_difference": comparison.gradient_difference,
        "preparation_seconds": asdict(cost),
    }
    return json.dumps(record, indent=1) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--context", type=Path, required=True, help="the text that the teacher reads")
    parser.add_argument("--queries", type=Path, default=QUERIES, help="JSON lines; the first ones make the batch")
    parser.add_argument("--tokens", type=int, help="of the prompt (default: an eighth of the context)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, at most 64 (default: 8)")
    parser.add_argument("--micro-batch-size", type=int, help="sequences that ours runs at once (default: all)")
    parser.add_argument("--new-tokens", type=int, default=48, help="of each answer (default: 48)")
    parser.add_argument("--repeats", type=int, default=5, help="steps that count, of each side (default: 5)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", type=Path, help="write all figures here as well")
    parser.add_argument("--profile", action="store_true", help="say where the time of our step goes as well")
    options = parser.parse_args(arguments)
    for name in ("tokens", "batch", "micro_batch_size", "new_tokens", "repeats", "threads"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name.replace('_', '-')}: got {given}, accepted is 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(options.model, "float32", "cpu")
        problem, cost = make_problem(
            options.model,
            model,
            tokenizer,
            read_text(options.context, "context"),
            load_queries(options.queries)[: options.batch],
            Path(folder),
            tokens=options.tokens,
            micro_batch_size=options.micro_batch_size,
            new_tokens=options.new_tokens,
        )
        del model
        say = Console(stderr=True, highlight=False).print
        say(describe(problem))
        comparison = compare(problem, options.repeats, say)
        show(console, problem, cost, comparison)
        if options.json:
            write_text(options.json, as_json(problem, cost, comparison))
        if options.profile:
            show_profile(console, problem)


if __name__ == "__main__":
    try:
        main()
    except BrokenProcessPool:
        sys.exit("Error: a measuring process was killed, most likely because memory ran out; try a smaller --batch")
    except SoftPromptError as error:
        sys.exit(f"Error: {error}")
