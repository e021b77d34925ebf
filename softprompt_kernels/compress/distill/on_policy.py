"""On-policy rounds: the student answers the training queries itself, and the teacher says what it would have answered.

    part 0 of the training    the teacher's answers alone
    round r                   the prompt as it is after part r − 1 answers all N training queries, and the teacher
                              reads the answers
    part r                    of each query that is drawn: with probability `share` the answer of the student from
                              round r, else that of the teacher

A prompt that is trained on the teacher's answers alone never sees what follows after a mistake of its own. This is GKD
(arXiv 2306.13649), with the student's answers renewed once a round instead of in every step. The targets are of the
same form as those of the teacher's answers. No held-out or test query is asked.

Cost of a round: N answers behind the prompt, and one pass of the teacher over them. They are stored in `cache/rounds`,
so that an interrupted run resumes with the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, watch
from softprompt_kernels.compress.teacher.moments_cache import Targets, TargetWriter, read_targets
from softprompt_kernels.compress.teacher.recording import Recording
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import Prefix


class Part(NamedTuple):
    """A part of the training: the round before it (0: none), its first step (counted from 0) and the step after its
    last."""

    round: int
    first: int
    last: int


def parts(steps: int, rounds: int) -> Iterator[Part]:
    """The `rounds` + 1 parts of a training of `steps` steps. Their lengths differ by one step at most."""
    for number in range(rounds + 1):
        yield Part(number, steps * number // (rounds + 1), steps * (number + 1) // (rounds + 1))


class StudentAnswers(NamedTuple):
    """What a round leaves: an example for each training query, with the student's answer, and the teacher's targets."""

    examples: list[Example]
    targets: Targets


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """The rounds of a run.

    Args:
        model, chat: the model and its chat format.
        context: the teacher's prefix.
        queries: the training queries, N of them.
        objective: of the training; it needs the teacher.
        folder: where rounds are stored, each in a folder of its own.
        key: of the run.
        new_tokens, temperature, batch_size, seed: of sampling, as in `teacher.answers.answer`.
        reporter: receives the progress.
    """

    model: PreTrainedModel
    chat: ChatFormat
    context: Prefix
    queries: Sequence[Query]
    objective: Objective
    folder: Path
    key: str
    new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    reporter: Reporter

    def answers(self, number: int, student: Prefix | None) -> StudentAnswers:
        """What round `number` leaves: read from the folder, or made now and stored there.

        Args:
            number: from 1.
            student: the prompt's prefix, if it is still that of the round.

        Raises:
            SoftPromptError: nothing that can be read is stored, and the prompt is another one by now.
        """
        found = self._read(number)
        if ranks.of_first(found is None) and student is not None:
            self._make(number, student)
            found = self._read(number)
        if found is None:
            raise SoftPromptError(
                f"output: the student's answers in {self._folder(number)} cannot be read back; delete the run's "
                "checkpoint.safetensors to train again from the start"
            )
        return found

    def seconds(self, rounds: int) -> float:
        """Seconds that the stored ones of the first `rounds` rounds took."""
        stored = (self._stored(number) for number in range(1, rounds + 1))
        return sum(float(record["seconds"]) for record in stored if record)

    def _make(self, number: int, student: Prefix) -> None:
        begin, folder = time.perf_counter(), self._folder(number)
        examples = answer(
            self.model,
            self.chat,
            student,
            [Query(query.input) for query in self.queries],
            new_tokens=self.new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=self.seed + (number << 32),  # other random numbers than the teacher's, and in every round
            reporter=self.reporter,
            description=f"Student's answers, round {number}",
        )
        assert self.objective.form is not None, "the NLL of the student's own answers is refused"
        writer = TargetWriter(folder, self.objective.head, self.objective.form, self.objective.temperature)
        recording = Recording(len(examples), targets=writer)
        description = f"Teacher reads them, round {number}"
        own = ranks.share([example.length for example in examples])
        watch(self.model, self.context, [examples[i] for i in own], own, recording, self.reporter, description)
        writer.close(self._key(number))
        record = {
            "key": self._key(number),
            "seconds": time.perf_counter() - begin,
            "examples": [(example.input_ids, example.output_ids) for example in examples],
        }
        if ranks.is_first():
            write_text(folder / "answers.json", json.dumps(record))  # last: it says that all is there
        ranks.barrier(folder / "answers.json")

    def _read(self, number: int) -> StudentAnswers | None:
        stored, objective = self._stored(number), self.objective
        if stored is None or objective.form is None:
            return None
        targets = read_targets(
            self._folder(number), self._key(number), objective.head, objective.form, objective.temperature
        )
        examples = [Example(tuple(x), tuple(y)) for x, y in stored["examples"]]
        return None if targets is None else StudentAnswers(examples, targets)

    def _stored(self, number: int) -> dict[str, Any] | None:
        """The record of a round; None if there is none of this run."""
        try:
            record: dict[str, Any] = json.loads((self._folder(number) / "answers.json").read_text(encoding="utf-8"))
            return record if record["key"] == self._key(number) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _folder(self, number: int) -> Path:
        return self.folder / str(number)

    def _key(self, number: int) -> str:
        return f"{self.key}:{number}"
