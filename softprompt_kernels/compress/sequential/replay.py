"""Queries about earlier segments that are asked again, so that a prompt keeps what they are about.

Each keeps the answer, and the training targets, that the model gave when it had read the segment itself. So a student
of segment 20 learns about segment 3 from a teacher with segment 3 before it, and not from a chain of students.

There are at most so many, equally many from each earlier segment. They are drawn anew after each segment from what is
there, so their number, and the time they take, do not grow with the text.

In a folder: `examples.json`, and `targets/` if the objective needs any.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.moments_cache import Targets, copy_targets, read_targets
from softprompt_kernels.compress.teaching import Replay
from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class Replayed:
    """What is asked again.

    Args:
        replay: the examples and their targets.
        segments: the number of the segment of each example.
    """

    replay: Replay
    segments: tuple[int, ...]


def choose(segments: Sequence[int], most: int, seed: int) -> list[int]:
    """The indices of at most `most` examples, of each segment equally many, ascending.

    Args:
        segments: the segment of each example.
        most: 0 or more.
        seed: of the choice.
    """
    draw = random.Random(seed)
    by_segment: dict[int, list[int]] = {number: [] for number in sorted(set(segments))}
    for index, number in enumerate(segments):
        by_segment[number].append(index)
    for own in by_segment.values():
        draw.shuffle(own)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < most and any(turn < len(own) for own in by_segment.values()):
        left = [own[turn] for own in by_segment.values() if turn < len(own)]
        if len(left) > most - len(chosen):
            left = draw.sample(left, most - len(chosen))
        chosen += left
        turn += 1
    return sorted(chosen)


def store(found: Replayed, most: int, seed: int, folder: Path, key: str) -> None:
    """Store at most `most` of these examples in a folder, equally many of each segment."""
    chosen = choose(found.segments, most, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if found.replay.targets is not None and chosen:
        copy_targets(found.replay.targets, chosen, folder / "targets", key)
    examples = [found.replay.examples[index] for index in chosen]
    record = {
        "segments": [found.segments[index] for index in chosen],
        "examples": [(example.input_ids, example.output_ids) for example in examples],
    }
    write_text(folder / "examples.json", json.dumps(record))


def read(folder: Path, key: str, objective: Objective, with_targets: bool) -> Replayed:
    """What was stored in a folder.

    Args:
        folder, key: as in `store`.
        objective: of the training.
        with_targets: whether there are steps of training, so that targets were stored.

    Raises:
        SoftPromptError: it cannot be read.
    """
    targets: Targets | None = None
    try:
        record = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        examples = [Example(tuple(x), tuple(y)) for x, y in record["examples"]]
        segments = tuple(int(number) for number in record["segments"])
        if with_targets and objective.form is not None and examples:
            targets = read_targets(folder / "targets", key, objective.head, objective.form, objective.temperature)
            if targets is None:
                raise ValueError("no targets")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SoftPromptError(
            f"output: what is asked again in {folder} cannot be read ({error}); delete {folder.parent.parent} to read "
            "the text again from the start"
        ) from error
    return Replayed(Replay(examples, targets), segments)
