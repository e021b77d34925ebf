"""The evaluation of the final prompt: over all segments, and by how long ago a segment was read.

The teacher of a query is the model with the whole text before it, where that fits the window; it then answers the
evaluated queries itself. Beyond the window it is the model that had read the query's segment, with the prompt of the
segments before that one: its answers and states were kept.

    recovered = 1 − Σ KL(teacher ‖ prompt) / Σ KL(teacher ‖ no context)      over the tokens of the answers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt_kernels.compress.evaluate.distance import NEGLIGIBLE_KL, TokenDistances
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sequential.asked import Asked
from softprompt_kernels.compress.sequential.table import OWN, WHOLE
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, hidden_states
from softprompt_kernels.prompts import Prefix


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What was measured on one set of queries.

    Args:
        queries, examples: of all segments, one after the other.
        distances: of these examples, by student.
        by_segment: the same distances of each segment that has queries in this set, by its number.
    """

    queries: list[Query]
    examples: list[Example]
    distances: dict[str, TokenDistances]
    by_segment: dict[int, dict[str, TokenDistances]]


def evaluate(
    inputs: RunInputs,
    folders: Sequence[Path],
    students: Mapping[str, Prefix | None],
    whole: Prefix | None,
    reporter: Reporter,
) -> dict[str, Evaluated]:
    """Measure students on what was asked about each segment; by set, those with queries only.

    Args:
        inputs: of the whole text.
        folders: of the segments, in order, with what was asked about them.
        students: their prefixes by key, with "none" and "prompt". Others are not measured on the test set.
        whole: the captured whole text; None where it does not fit.
        reporter: receives the progress.
    """
    found: dict[str, Evaluated] = {name: Evaluated([], [], {}, {}) for name, _ in SETS}
    with reporter.progress("Evaluation of the final prompt", len(folders), "segment") as advance:
        for number, folder in enumerate(folders, 1):
            own = Asked.read(folder)
            if whole is not None:
                own = _answered(inputs, own, whole)
            for name, examples in own.examples.items():
                chosen = {k: v for k, v in students.items() if name != "test" or k in ("none", "prompt")}
                found[name].queries.extend(own.queries[name])
                found[name].examples.extend(examples)
                found[name].by_segment[number] = own.measure(inputs.model, name, chosen, SilentReporter())
            advance(1)
    for of_set in found.values():
        of_set.distances.update(joined(of_set.by_segment.values()))
    return {name: of_set for name, of_set in found.items() if of_set.examples}


def _answered(inputs: RunInputs, asked: Asked, whole: Prefix) -> Asked:
    """The same queries with the answers of the model that has the whole text before it."""
    config, examples, states, reporter = inputs.config, {}, {}, SilentReporter()
    for name, queries in asked.queries.items():
        examples[name] = answer(
            inputs.model,
            inputs.chat,
            whole,
            queries,
            new_tokens=config.new_tokens,
            temperature=config.sample_temperature,
            batch_size=config.sample_batch,
            seed=config.seed,
            reporter=reporter,
        )
        states[name] = torch.cat(hidden_states(inputs.model, whole, examples[name], reporter, "")).cpu()
    return Asked(asked.queries, examples, states)


def joined(parts: Iterable[Mapping[str, TokenDistances]]) -> dict[str, TokenDistances]:
    """The distances of several sets of examples, one after the other, by student."""
    by_student: dict[str, list[TokenDistances]] = {}
    for part in parts:
        for name, distances in part.items():
            by_student.setdefault(name, []).append(distances)
    return {
        name: TokenDistances(
            *(torch.cat([getattr(one, field) for one in found]) for field in TokenDistances.__dataclass_fields__)
        )
        for name, found in by_student.items()
    }


def segment_figures(
    evaluated: Evaluated, done: Sequence[Mapping[str, Any]], state: str, with_whole: bool
) -> dict[str, Any]:
    """What evaluation.json says of the segments, from the held-out queries.

    Args:
        evaluated: the held-out set.
        done: the content of each segment's `segment.json`.
        state: of the run.
        with_whole: the teacher has the whole text before it.
    """
    by_segment = []
    for number, figures in enumerate(done, 1):
        kl = {name: figures.get(f"kl_{name}") for name in ("none", "prompt")}
        read = None if None in kl.values() else _recovered(kl["none"], kl["prompt"])
        by_segment.append({**figures, "recovered_when_read": read, **_figures(evaluated.by_segment.get(number))})
    last, by_distance, first = len(done), [], 0
    while first < last:
        stop = min(last, max(first + 1, 2 * first))  # 0, 1, 2 to 3, 4 to 7, …
        near = [evaluated.by_segment.get(last - ago) for ago in range(first, stop)]
        if parts := [one for one in near if one]:
            by_distance.append({"from": first, "to": stop - 1, **_figures(joined(parts))})
        first = stop
    return {
        "state": state,
        "teacher": WHOLE if with_whole else OWN,
        "by_distance": by_distance,
        "by_segment": by_segment,
    }


def _figures(found: Mapping[str, TokenDistances] | None) -> dict[str, Any]:
    if not found:
        return {}
    none, prompt = found["none"].mean(), found["prompt"].mean()
    return {
        "final_kl_none": none.kl,
        "final_kl_prompt": prompt.kl,
        "recovered": _recovered(none.kl, prompt.kl),
        "top1_agreement": prompt.top1_agreement,
        "answer_tokens": prompt.tokens,
    }


def _recovered(none: float | None, prompt: float | None) -> float | None:
    """None where the context does not matter."""
    return None if none is None or prompt is None or not none > NEGLIGIBLE_KL else 1 - prompt / none
