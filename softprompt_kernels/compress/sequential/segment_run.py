"""One segment: the model reads it behind the prompt of those before, and a prompt takes its place.

    context → answers → matching → training → saved state

The teacher reads [σ; segment]. Of a state that is replaced, k tokens stand for all of it. Of one that is accumulated, k
tokens stand for the segment alone: for matching, all other keys are the rest that a query sees anyway, and in training
the tokens before are frozen.

Positions. A prompt's keys stand at 0, 1, …, and what follows continues there. The k keys for a segment are moved back
to behind those of an accumulated state, which stay. So earlier segments seem nearer than they were, but a text of any
length keeps its queries within the model's window.

The folder of a segment is that of a run. What later segments need is written at its end: `prompt/`, `replay/`,
`asked.safetensors` for the evaluation, and last `segment.json`. Caches and checkpoint are deleted then.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.initial_prompt import initial_prompt
from softprompt_kernels.compress.inputs import RunInputs, sha256
from softprompt_kernels.compress.matching.match import Matching, match, stored_layers, stored_match
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.signals import signal_of
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sequential.asked import Asked
from softprompt_kernels.compress.sequential.replay import Replayed, store
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.self_study import GENERAL
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.compress.teacher.context import capture_context, move_keys, no_context_prefix
from softprompt_kernels.compress.teacher.rows import Rows
from softprompt_kernels.compress.teaching import Replay, Taught, Teaching
from softprompt_kernels.compress.tracking.tracker import Tracker
from softprompt_kernels.compress.training import Training
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix, save

DONE = "segment.json"
"""In the folder of a segment that is finished: its figures."""

REPLAY = "replay"
"""In the folder of a segment: what the next one asks again."""


@dataclass(frozen=True, eq=False)
class SegmentRun:
    """The work on one segment.

    Args:
        inputs: those of a run with the segment as its context.
        number, last: of this segment, from 1, and of the last one.
        folder: of the segment.
        key: names the run and the segment.
        before: the prompt for the segments before; None for the first one.
        earlier: what is asked again.
        reporter, times, tracker: as in a run.
    """

    inputs: RunInputs
    number: int
    last: int
    folder: RunFolder
    key: str
    before: KVPrompt | None
    earlier: Replayed
    reporter: Reporter
    times: StageTimes
    tracker: Tracker

    def run(self) -> KVPrompt:
        """The prompt for all segments up to this one, saved with what later ones need."""
        inputs, folder, begin = self.inputs, self.folder, time.perf_counter()
        folder.path.mkdir(parents=True, exist_ok=True)
        with self.times("context"):
            before = None if self.before is None else prefix_of(inputs.model, self.before).detach()
            context = capture_context(inputs.model, inputs.context_ids, before=before)
            own = context.slice(self._kept, context.length)
        matched = inputs.config.init != "matched" or stored_match(own, folder.cache, self.key) is not None
        with self.times("answers"):
            taught = Teaching(inputs, folder, context, self.reporter, matched, self.earlier.replay).teach()
        with self.times("matching"):
            prompt = self._prompt(self._first(own, taught.rows))
        with self.times("training"):
            Training(inputs, folder, context, prompt, taught, self.key, self.reporter, self.tracker).run()
        with self.times("evaluation"):
            self._save(prompt, taught, context, time.perf_counter() - begin)
        return prompt

    @property
    def _kept(self) -> int:
        """The tokens before the segment that stay as they are."""
        return self.before.length if self.before is not None and self.inputs.config.state == "accumulated" else 0

    def _first(self, own: Prefix, rows: Rows | None) -> Prefix:
        """k tokens for the part that is replaced, with the last of them where a prompt has it."""
        inputs, config, folder = self.inputs, self.inputs.config, self.folder
        if config.init != "matched":
            return prefix_of(inputs.model, initial_prompt(inputs, own)).detach()
        matched = stored_match(own, folder.cache, self.key)
        if ranks.of_first(matched is None):
            assert rows is not None, "the teacher leaves rows where nothing is matched"
            settings = Matching(config.tokens, config.matching_steps, 0 if self._kept else config.frozen)
            folder.drop_metrics_after(config.steps)  # only a line that a crash cut off
            try:
                matched = match(
                    own,
                    rows,
                    settings,
                    reporter=self.reporter,
                    folder=folder.cache,
                    key=self.key,
                    record=self._record,
                    model=inputs.model,
                )
            except KeyboardInterrupt as stop:
                done = len(stored_layers(own, folder.cache, self.key))
                raise Interrupted("layer", done, own.num_layers, folder.path, signal_of(stop)) from None
        assert matched is not None, "all ranks see the same folder"
        return move_keys(inputs.model, matched, matched.length - own.length)

    def _prompt(self, first: Prefix) -> KVPrompt:
        """The prompt to train: `first`, behind what is kept of an accumulated state."""
        device = self.inputs.model.device
        prompt = KVPrompt.from_prefix(first, frozen_tokens=0 if self._kept else self.inputs.config.frozen).to(device)
        if not self._kept:
            return prompt
        assert self.before is not None
        both = zip(self.before.to(device).stacked(), prompt.stacked(), strict=True)
        return KVPrompt(*(torch.cat(pair, dim=2) for pair in both), frozen_tokens=self._kept).to(device)

    def _record(self, record: Mapping[str, Any]) -> None:
        self.folder.add_metrics(record)
        self.tracker.log(record)

    def _save(self, prompt: KVPrompt, taught: Taught, context: Prefix, seconds: float) -> None:
        inputs, config, folder = self.inputs, self.inputs.config, self.folder
        asked = Asked.of(taught, lambda q: not q.lead and (q.input not in GENERAL or self.number == self.last))
        if ranks.is_first():
            asked.save(folder.path)
        if self.number < self.last and ranks.is_first():
            store(self._asked_later(taught), config.replay, config.seed + self.number, folder.path / REPLAY, self.key)
        found: dict[str, float] = {
            "tokens": inputs.context_tokens,
            "prompt_tokens": prompt.length,
            "context_bytes": context.nbytes,
            "train_queries": len(inputs.train),
            "replayed_queries": len(self.earlier.segments),
        }
        students = {"none": no_context_prefix(inputs.model, inputs.chat)}
        students["prompt"] = prefix_of(inputs.model, prompt).detach()
        for name, distances in asked.measure(inputs.model, "heldout", students, self.reporter).items():
            found[f"kl_{name}"] = distances.mean().kl
        if not ranks.is_first():
            ranks.barrier(folder.path / DONE)
            return
        save(
            folder.prompt,
            prompt,
            model=inputs.model,
            tokenizer=inputs.tokenizer,
            context={"sha256": sha256(inputs.text), "tokens": inputs.context_tokens, "segment": self.number},
            objective={"name": config.objective, "steps": config.steps, "init": config.init},
        )
        write_text(folder.path / DONE, json.dumps({**found, "seconds": seconds}, indent=1) + "\n")
        ranks.barrier()
        tidy(folder)

    def _asked_later(self, taught: Taught) -> Replayed:
        """The queries of this segment and of earlier ones that later ones may ask again."""
        own = [index for index, query in enumerate(self.inputs.train) if not query.lead and query.input not in GENERAL]
        everything, first = taught.examples["train"], len(self.inputs.train)
        chosen = [*own, *range(first, len(everything))]
        examples = {index: everything[number] for index, number in enumerate(chosen)}
        targets = None
        if taught.targets is not None:
            rows = {index: taught.targets.rows[number] for index, number in enumerate(chosen)}
            targets = replace(taught.targets, rows=rows)
        numbers = (*(self.number for _ in own), *self.earlier.segments)
        return Replayed(Replay(list(examples.values()), targets), numbers)


def tidy(folder: RunFolder) -> None:
    """Delete what only an unfinished segment needs."""
    shutil.rmtree(folder.cache, ignore_errors=True)
    for checkpoint in folder.path.glob("checkpoint*.safetensors"):  # there may be several
        checkpoint.unlink(missing_ok=True)
