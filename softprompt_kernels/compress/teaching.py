"""The teacher's part of a run: its answers, and what training, matching and evaluation need of it.

The teacher is recorded while it writes its answers, so that it need not read them afterwards. It reads given outputs,
and answers whose records have been lost from the folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor

from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import RunInputs, server_options
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import Query, save_queries, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, watch
from softprompt_kernels.compress.teacher.moments_cache import Form, Targets, TargetWriter, read_targets
from softprompt_kernels.compress.teacher.recording import Recording, RowsAlone
from softprompt_kernels.compress.teacher.rows import RowRecorder, Rows, enough_examples, read_rows, row_bytes
from softprompt_kernels.compress.teacher.server.answers import Asking, server_answers
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import Prefix
from softprompt_kernels.prompts.fingerprint import as_recorded, model_fingerprint

Examples = dict[str, list[Example]]


@dataclass(frozen=True, eq=False)
class Taught:
    """What the teacher leaves.

    Args:
        examples: of each set of queries.
        evaluated: those that are evaluated: a sample of the training set, and all of the others.
        queries: those of the evaluated examples, as they were asked.
        states: the teacher's hidden states of the evaluated examples, `[n_i, d]`.
        targets: of training; None for an objective that needs none, or without training.
        rows: for matching; None where they are not needed, or no longer.
    """

    examples: Examples
    evaluated: Examples
    queries: dict[str, list[Query]]
    states: dict[str, list[Tensor]]
    targets: Targets | None
    rows: Rows | None


@dataclass(frozen=True, eq=False)
class Replay:
    """Examples of another teacher, which the prompt is trained on too: those of earlier segments of a text.

    Args:
        examples: queries with that teacher's answers.
        targets: what that teacher left for them; None for an objective that needs none, or without training.
    """

    examples: Sequence[Example]
    targets: Targets | None


@dataclass(frozen=True, eq=False)
class Teaching:
    """The teacher of a run.

    Args:
        inputs: config, model, queries and so on.
        folder: of the run.
        context: the captured context.
        reporter: receives the progress.
        matched: the prompt is already matched, so that no rows are needed.
        replay: examples of another teacher, added to the training set with its targets. This teacher reads them for
            rows alone.
    """

    inputs: RunInputs
    folder: RunFolder
    context: Prefix
    reporter: Reporter
    matched: bool = False
    replay: Replay | None = None

    def teach(self) -> Taught:
        """What the teacher leaves: read from the folder, or made now and stored there.

        Raises:
            SoftPromptError: the records cannot be read back.
        """
        examples = self._read_examples()
        if ranks.of_first(examples is None):
            recording = self._recording(None)
            examples = self._answer(recording)
            self._finish(recording, examples)
            token_ids = {name: [(e.input_ids, e.output_ids) for e in examples[name]] for name in examples}
            if ranks.is_first():
                write_text(self.folder.examples, json.dumps(token_ids))  # last: it says that all is there
                self.folder.server_answers.unlink(missing_ok=True)
            ranks.barrier(self.folder.examples)
        elif examples is None:
            raise self._unreadable()
        else:
            self._finish(self._recording(examples), examples)
        targets, states, rows = self._read_targets(examples), self._read_states(examples), self._read_rows(examples)
        missing = (targets is None and self._form is not None) or (rows is None and self._matches)
        if states is None or missing:
            raise self._unreadable()
        by_set = {
            name: [states.hidden([number], self.inputs.model.device) for number in numbers]
            for name, numbers in self._evaluated_numbers.items()
        }
        sample = [examples["train"][index] for index in self._training_sample]
        queries = {name: list(of_set) for name, of_set in self.inputs.sets.items()}
        queries["train"] = [queries["train"][index] for index in self._training_sample]
        evaluated = examples | {"train": sample}
        if self.replay is not None:
            offset, examples = len(examples["train"]), examples | {"train": [*examples["train"], *self.replay.examples]}
            if targets is not None and self.replay.targets is not None:
                targets = targets.joined(self.replay.targets, offset)
        return Taught(examples, evaluated, queries, by_set, targets, rows)

    def _unreadable(self) -> SoftPromptError:
        return SoftPromptError(
            f"output: what the teacher left in {self.folder.cache} cannot be read back; delete that folder, and the "
            "same call makes it again"
        )

    def _answer(self, recording: Recording) -> Examples:
        inputs, config, queries = self.inputs, self.inputs.config, self.inputs.sets
        self.folder.cache.mkdir(exist_ok=True)
        everything = [query for of_set in queries.values() for query in of_set]
        if config.server is None:
            found = answer(
                inputs.model,
                inputs.chat,
                self.context,
                everything,
                new_tokens=config.new_tokens,
                temperature=config.sample_temperature,
                batch_size=config.sample_batch,
                seed=config.seed,
                reporter=self.reporter,
                recorder=recording,
            )
        else:
            asking = Asking(
                server_options(config),
                inputs.context_ids[0].tolist(),
                config.new_tokens,
                config.sample_temperature,
                config.seed,
                self.folder.server_answers,
            )
            found = []
            if ranks.is_first():
                found = server_answers(inputs.model, inputs.chat, self.context, everything, asking, self.reporter)
            told = ranks.of_first([(example.input_ids, example.output_ids) for example in found])
            found = [Example(tuple(x), tuple(y)) for x, y in told]
        answers = iter(found)
        examples = {name: list(islice(answers, len(of_set))) for name, of_set in queries.items()}
        if not ranks.is_first():
            return examples
        texts = {name: inputs.as_text(examples[name]) for name in queries}
        save_queries(
            self.folder.queries,
            {name: [replace(q, output=y) for q, y in zip(queries[name], texts[name], strict=True)] for name in queries},
        )
        return examples

    def _read_examples(self) -> Examples | None:
        """The stored examples; None if there are none yet, or a crash has cut off their file."""
        try:
            saved = json.loads(self.folder.examples.read_text(encoding="utf-8"))
            return {name: [Example(tuple(x), tuple(y)) for x, y in saved[name]] for name in self.inputs.sets}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _finish(self, recording: Recording, examples: Examples) -> None:
        """Let the teacher read what the recording needs and has not seen, and close it."""
        config, train = self.inputs.config, examples["train"]
        already = {number for of_rank in ranks.gather(sorted(recording.seen)) for number in of_rank}
        wanted = set(recording.evaluated if recording.states is not None else ())
        if recording.targets is not None:
            wanted.update(range(len(train)))
        elif recording.rows is not None:
            # A part of the examples is enough, but would be too few beside all of those that have been seen.
            seen = any(number < len(train) for number in already)
            few = enough_examples(train, config.matching_rows, config.seed)
            wanted.update(range(len(train)) if seen else few)
        missing = sorted(wanted - already)
        everything = [example for of_set in examples.values() for example in of_set]
        own = [missing[index] for index in ranks.share([everything[number].length for number in missing])]
        if own:
            chosen = [everything[number] for number in own]
            watch(self.inputs.model, self.context, chosen, own, recording, self.reporter, "Given answers")
        if recording.rows is not None and self.replay is not None and self.replay.examples:
            again, first = self.replay.examples, len(everything)
            own = ranks.share([example.length for example in again])
            chosen, numbers = [again[index] for index in own], [first + index for index in own]
            recorder, title = RowsAlone(recording.rows), "Queries about earlier segments"
            watch(self.inputs.model, self.context, chosen, numbers, recorder, self.reporter, title)
        if recording.targets is not None:
            recording.targets.close(self._targets_key(examples))
        if recording.rows is not None:
            # Those that were answered came by length and tokens, and then those that were read, by length.
            seen_at = sorted(already, key=lambda n: (len(everything[n].input_ids), everything[n].input_ids, n))
            everyone = [*everything, *(() if self.replay is None else self.replay.examples)]
            for of_pass in (missing, range(len(everything), len(everyone))):
                seen_at += sorted(of_pass, key=lambda n: (everyone[n].length, n))
            turns = {number: turn for turn, number in enumerate(seen_at)}
            recording.rows.close(self._rows_key(examples), turns)
        if recording.states is not None:
            recording.states.close(self._states_key(examples))

    def _recording(self, examples: Examples | None) -> Recording:
        """Of what is needed and, for stored examples, not on disk."""
        inputs, config, cache = self.inputs, self.inputs.config, self.folder.cache
        head, form = inputs.objective.head, self._form
        targets = rows = states = None
        no_targets, no_rows, no_states = ranks.of_first(
            [
                form is not None and (examples is None or self._read_targets(examples) is None),
                self._matches and (examples is None or self._read_rows(examples) is None),
                examples is None or self._read_states(examples) is None,
            ]
        )
        if form is not None and no_targets:
            targets = TargetWriter(self.folder.targets, head, form, config.loss_temperature)
        if no_rows:
            heads = inputs.model.config.get_text_config().num_attention_heads
            size = row_bytes(self.context, heads, inputs.model.dtype)
            rows = RowRecorder(cache, config.matching_rows, size, config.seed)
        if no_states:
            states = TargetWriter(self.folder.states, head, "hidden", 1.0)
        evaluated = [number for numbers in self._evaluated_numbers.values() for number in numbers]
        return Recording(len(inputs.train), evaluated, targets=targets, rows=rows, states=states)

    @property
    def _matches(self) -> bool:
        return self.inputs.config.init == "matched" and not self.matched

    @property
    def _form(self) -> Form | None:
        """What is stored for each token of training; None for nothing."""
        return self.inputs.objective.form if self.inputs.config.steps else None

    @cached_property
    def _training_sample(self) -> list[int]:
        train, config = len(self.inputs.train), self.inputs.config
        return random.Random(config.seed).sample(range(train), min(config.evaluation_sequences, train))

    @cached_property
    def _evaluated_numbers(self) -> dict[str, list[int]]:
        """The numbers of the evaluated examples of each set, counted over all sets."""
        first, numbers = 0, {}
        for name, queries in self.inputs.sets.items():
            own = self._training_sample if name == "train" else range(len(queries))
            numbers[name] = [first + index for index in own]
            first += len(queries)
        return numbers

    def _read_targets(self, examples: Examples) -> Targets | None:
        if self._form is None:
            return None
        head, temperature = self.inputs.objective.head, self.inputs.config.loss_temperature
        return read_targets(self.folder.targets, self._targets_key(examples), head, self._form, temperature)

    def _read_states(self, examples: Examples) -> Targets | None:
        return read_targets(self.folder.states, self._states_key(examples), self.inputs.objective.head, "hidden", 1.0)

    def _read_rows(self, examples: Examples) -> Rows | None:
        return read_rows(self.folder.cache, self._rows_key(examples)) if self._matches else None

    def _targets_key(self, examples: Examples) -> str:
        temperature = self.inputs.config.loss_temperature
        return self._key(examples["train"], form=self._form, temperature=temperature)

    def _rows_key(self, examples: Examples) -> str:
        config = self.inputs.config
        return self._key(examples["train"], rows=config.matching_rows, seed=config.seed)

    def _states_key(self, examples: Examples) -> str:
        everything = [example for of_set in examples.values() for example in of_set]
        return self._key(everything, evaluated=self._evaluated_numbers)

    def _key(self, examples: Sequence[Example], **settings: Any) -> str:
        """A digest of the model, the context, the examples and the settings."""
        hasher = hashlib.sha256(json.dumps({**self._identity, **settings}, sort_keys=True).encode())
        for example in examples:
            hasher.update(repr((example.input_ids, example.output_ids)).encode())
        return hasher.hexdigest()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        inputs, saved = self.inputs, self.folder.identity.get("model")
        return {
            "model": as_recorded(saved, model_fingerprint(inputs.model, saved)),
            "dtype": str(inputs.model.dtype),
            "context": inputs.context_ids.tolist(),
        }
