"""`python -m benchmarks.costs`: the tables of docs/cost-model.md. Counted on paper, nothing is measured."""

from __future__ import annotations

from benchmarks.costs.bounds import estimate, fits, sharded
from benchmarks.costs.stages import LLAMA_8B, LLAMA_70B, Job, Model, stages

MODELS, CONTEXTS, GPUS = (LLAMA_8B, LLAMA_70B), (10**4, 10**5, 10**6), (1, 8, 64)
RATIO = 50
SEGMENT, STATE = 8192, 1024


def job(context: int) -> Job:
    """The default run with a prompt of a fiftieth of the context."""
    return Job(context, context // RATIO)


def number(value: float) -> str:
    """Three digits with a unit: 12.3 P."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells: str) -> list[str]:
    """The first two rows of a table."""
    return [row(*cells), "|" + "---|" * len(cells)]


def sizes() -> list[str]:
    """What has to be held."""
    lines = head("model", "context", "weights, bytes", "keys and values, bytes", "prompt, bytes", "fits into one H100")
    for model in MODELS:
        for context in CONTEXTS:
            kv = model.kv_bytes * context
            prompt = model.kv_bytes * job(context).tokens
            place = "yes" if fits(model, context, 1) else "no"
            lines.append(row(model.name, f"{context:,}", number(model.weight_bytes), number(kv), number(prompt), place))
    return lines


def work() -> list[str]:
    """FLOP and bytes of each stage."""
    names = list(stages(LLAMA_8B, job(CONTEXTS[0])))
    lines = head("model", "context", *(f"{name}, FLOP and bytes" for name in names))
    for model in MODELS:
        for context in CONTEXTS:
            cells = [
                f"{number(sum(p.flop for p in pieces))}, {number(sum(p.bytes_moved for p in pieces))}"
                for pieces in stages(model, job(context)).values()
            ]
            lines.append(row(model.name, f"{context:,}", *cells))
    return lines


def bounds() -> list[str]:
    """The share of each stage in the bound, and what sets it."""
    names = list(stages(LLAMA_8B, job(CONTEXTS[0])))
    lines = head("model", "context", "GPUs", "base", "bound, s", *names)
    for model in MODELS:
        for context in CONTEXTS:
            for gpus in GPUS:
                if not fits(model, context, gpus):
                    lines.append(row(model.name, f"{context:,}", gpus, "does not fit", "", *[""] * len(names)))
                    continue
                found = estimate(model, job(context), gpus)
                total = sum(one.seconds for one in found.values())
                cells = [f"{one.seconds / total:.0%} {one.by}" for one in found.values()]
                base = "sharded" if sharded(model, context, gpus) else "whole"
                lines.append(row(model.name, f"{context:,}", gpus, base, f"{total:.3g}", *cells))
    return lines


def segments() -> list[str]:
    """A context in one piece against segments whose state is a prompt of `STATE` tokens."""
    lines = head("model", "context", "in one piece, FLOP", "segments, trained each", "segments, matched only")
    full, matched = Job(SEGMENT + STATE, STATE), Job(SEGMENT + STATE, STATE, queries=64, rows=2048, steps=0)
    for model in MODELS:
        for context in CONTEXTS:
            whole, count = all_flop(model, job(context)), -(-context // SEGMENT)
            shares = [f"{count * all_flop(model, one) / whole:.2f}×" for one in (full, matched)]
            lines.append(row(model.name, f"{context:,}", number(whole), *shares))
    return lines


def all_flop(model: Model, of: Job) -> float:
    """FLOP of all stages of a run."""
    return sum(piece.flop for pieces in stages(model, of).values() for piece in pieces)


def tables() -> dict[str, list[str]]:
    """All tables by name."""
    return {"sizes": sizes(), "work": work(), "bounds": bounds(), "segments": segments()}


def main() -> None:
    """Print the tables."""
    for name, lines in tables().items():
        print(f"{name}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
