"""What a compressor learns from and is judged on: contexts, with the teacher's answers and what is kept of them.

The teacher is the frozen model behind the full context. For a context to train on, the objective's targets are kept.
For one to evaluate, the teacher's hidden states. Each context has a folder of its own, and what is finished there is
read back by a later call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, watch
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.compress.teacher.moments_cache import Targets, TargetWriter, read_targets
from softprompt_kernels.compress.teacher.recording import Recording


@dataclass(frozen=True, eq=False)
class Assignment:
    """A context and what is asked about it.

    Args:
        name: of the context.
        ids: `[C]` int64, its tokens, on the CPU.
        queries: at least one.
    """

    name: str
    ids: Tensor
    queries: tuple[Query, ...]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A context that the teacher has answered.

    Args:
        name, ids: as in `Assignment`.
        examples: its queries with the teacher's answers.
        targets: of these examples by their index, in the form that was asked for; None where none was.
    """

    name: str
    ids: Tensor
    examples: list[Example]
    targets: Targets | None


@dataclass(frozen=True, eq=False)
class Teacher:
    """Makes lessons.

    Args:
        model, chat: the model, prepared and frozen, and its chat format.
        objective: of the training.
        folder: where lessons are kept. It exists.
        key: a digest of everything that decides them, but for the context and its queries.
        new_tokens, temperature, batch_size, seed: of the answers, as in `teacher.answers.answer`.
    """

    model: PreTrainedModel
    chat: ChatFormat
    objective: Objective
    folder: Path
    key: str
    new_tokens: int
    temperature: float
    batch_size: int
    seed: int

    def lessons(
        self, assignments: Sequence[Assignment], *, evaluated: bool, reporter: Reporter, description: str
    ) -> list[Lesson]:
        """The lessons of contexts, in the same order: read back, or made and stored now.

        Args:
            assignments: the contexts.
            evaluated: keep the teacher's hidden states, and not the objective's targets.
            reporter, description: receives the progress under this description.
        """
        found = []
        with reporter.progress(description, len(assignments), "context") as advance:
            for assignment in assignments:
                found.append(self._stored(assignment, evaluated) or self._taught(assignment, evaluated))
                advance(1)
        return found

    def _taught(self, assignment: Assignment, evaluated: bool) -> Lesson:
        context = capture_context(self.model, assignment.ids[None])
        folder, form = self._folder(assignment, evaluated), "hidden" if evaluated else self.objective.form
        temperature = 1.0 if evaluated else self.objective.temperature
        writer = None if form is None else TargetWriter(folder, self.objective.head, form, temperature)
        recording = Recording(len(assignment.queries), targets=writer)
        examples = answer(
            self.model,
            self.chat,
            context,
            assignment.queries,
            new_tokens=self.new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=self.seed,
            reporter=SilentReporter(),
            recorder=recording,
        )
        given = sorted(set(range(len(examples))) - recording.seen)
        if writer is not None and given:
            watch(self.model, context, [examples[i] for i in given], given, recording, SilentReporter(), "")
        folder.mkdir(parents=True, exist_ok=True)
        if writer is not None:
            writer.close(self._key(assignment, evaluated))
        record = {
            "key": self._key(assignment, evaluated),
            "examples": [(example.input_ids, example.output_ids) for example in examples],
        }
        write_text(folder / "examples.json", json.dumps(record))  # last: it says that all is there
        lesson = self._stored(assignment, evaluated)
        assert lesson is not None
        return lesson

    def _stored(self, assignment: Assignment, evaluated: bool) -> Lesson | None:
        """The lesson that an earlier call left; None if there is none, or a crash has cut off a file."""
        folder, key = self._folder(assignment, evaluated), self._key(assignment, evaluated)
        form = "hidden" if evaluated else self.objective.form
        try:
            record = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
            if record["key"] != key:
                return None
            examples = [Example(tuple(x), tuple(y)) for x, y in record["examples"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        targets = None
        if form is not None:
            temperature = 1.0 if evaluated else self.objective.temperature
            targets = read_targets(folder, key, self.objective.head, form, temperature)
            if targets is None:
                return None
        return Lesson(assignment.name, assignment.ids, examples, targets)

    def _folder(self, assignment: Assignment, evaluated: bool) -> Path:
        return self.folder / ("evaluated" if evaluated else "trained") / assignment.name

    def _key(self, assignment: Assignment, evaluated: bool) -> str:
        asked = [(query.input, query.output) for query in assignment.queries]
        return hashlib.sha256(repr((self.key, assignment.ids.tolist(), asked, evaluated)).encode()).hexdigest()


def all_targets(lessons: Sequence[Lesson]) -> Targets | None:
    """The targets of all examples of all lessons, numbered one lesson after the other; None if they have none."""
    shards: list[object] = []
    rows: dict[int, tuple[int, int, int]] = {}
    first, targets = 0, None
    for lesson in lessons:
        targets = lesson.targets
        if targets is not None:
            found = targets.rows.items()
            rows |= {first + number: (len(shards) + shard, start, stop) for number, (shard, start, stop) in found}
            shards += targets.shards
        first += len(lesson.examples)
    if targets is None:
        return None
    return Targets(targets.form, tuple(shards), rows, targets.temperature, targets.logit_scale, targets.has_bias)
