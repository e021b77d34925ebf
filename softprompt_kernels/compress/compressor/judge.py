"""How good the prompts of a compressor are: their distance from the teacher on contexts that it was not trained on.

Figures of a set pool the tokens of all its contexts, as those of one context pool the tokens of its queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt_kernels.compress.compressor.compressor import Compressor, read_once
from softprompt_kernels.compress.compressor.lessons import Lesson
from softprompt_kernels.compress.evaluate.baselines import baseline_prefixes
from softprompt_kernels.compress.evaluate.distance import (
    NEGLIGIBLE_KL,
    TokenDistances,
    check_context_matters,
    summary,
    token_distances,
)
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import Prefix

ByStudent = dict[str, TokenDistances]


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges a compressor on a set of contexts.

    Args:
        lessons: with the teacher's hidden states.
        baselines: the distances of the students that are no compressor, for each lesson.
    """

    lessons: Sequence[Lesson]
    baselines: Sequence[ByStudent]

    @classmethod
    def of(
        cls, compressor: Compressor, chat: ChatFormat, lessons: Sequence[Lesson], reporter: Reporter, description: str
    ) -> Judge:
        """Measure the baselines, once for all times: no context, and as many tokens of it as the prompt has.

        Raises:
            SoftPromptError: the contexts do not matter for their queries.
        """
        model, found = compressor.model, []
        with reporter.progress(description, len(lessons), "context") as advance:
            for lesson in lessons:
                context = capture_context(model, lesson.ids[None])
                tokens = compressor.form.prompt_tokens(lesson.ids.shape[0])
                found.append(_distances(compressor, lesson, baseline_prefixes(model, chat, context, tokens)))
                advance(1)
        judge = cls(lessons, found)
        check_context_matters(judge.kl_none)
        return judge

    @property
    def kl_none(self) -> float:
        """The KL without context, nats per token."""
        return _pooled(self.baselines)["none"].mean().kl

    def kl(self, compressor: Compressor) -> float:
        """The KL of the compressor's prompts, nats per token."""
        return _pooled(self._prompts(compressor))["prompt"].mean().kl

    def figures(self, compressor: Compressor) -> dict[str, Any]:
        """The figures of a set, as in evaluation.json, and "contexts" with those of each context by its name."""
        prompts = self._prompts(compressor)
        by_context = [before | prompt for before, prompt in zip(self.baselines, prompts, strict=True)]
        figures: dict[str, Any] = summary({name: found.mean() for name, found in _pooled(by_context).items()})
        figures["contexts"] = {
            lesson.name: _of_context(found) for lesson, found in zip(self.lessons, by_context, strict=True)
        }
        return figures

    def _prompts(self, compressor: Compressor) -> list[ByStudent]:
        return [
            _distances(compressor, lesson, {"prompt": read_once(compressor, lesson.ids)}) for lesson in self.lessons
        ]


def _distances(compressor: Compressor, lesson: Lesson, students: Mapping[str, Prefix | None]) -> ByStudent:
    """The distances of students of one context, by name."""
    model, targets = compressor.model, lesson.targets
    assert targets is not None
    hidden = {
        name: torch.cat(hidden_states(model, prefix, lesson.examples, SilentReporter(), ""))
        for name, prefix in students.items()
    }
    return token_distances(head_of(model), hidden, targets.hidden(range(len(lesson.examples)), model.device))


def _pooled(parts: Sequence[ByStudent]) -> ByStudent:
    """The distances at the tokens of all parts, of the students that all have."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    fields = ("kl", "agrees", "entropy", "teacher_entropy")
    return {
        name: TokenDistances(*(torch.cat([getattr(part[name], field) for part in parts]) for field in fields))
        for name in names
    }


def _of_context(found: ByStudent) -> dict[str, float | None]:
    none, prompt = found["none"].mean().kl, found["prompt"].mean().kl
    return {"kl_none": none, "kl_prompt": prompt, "recovered": 1 - prompt / none if none > NEGLIGIBLE_KL else None}
