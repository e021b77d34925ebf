"""Data: the prompt is good for queries like those that it was trained on, and not for the held-out ones."""

from __future__ import annotations

from collections.abc import Iterable

from softprompt_kernels.compress.diagnose.causes.words import count, part
from softprompt_kernels.compress.diagnose.evidence import AskedQuery, Evidence, Gain, difference
from softprompt_kernels.compress.evaluate.diagnosis import Family, Finding

WORST = 3
"""Queries that are shown."""

LARGE_SHARE = 0.25
"""Of what is missing on held-out queries: a family with so much of it is named in the change."""

SELF_STUDY = ("general", "phrase", "sentence")
"""Families of queries that are made from the text."""


def families(evidence: Evidence) -> tuple[Family, ...]:
    """The families of the held-out queries, that with the largest part of the KL that is left first."""
    left = sum(one.prompt for one in evidence.heldout) or 1.0
    found = []
    for name in dict.fromkeys(one.family for one in evidence.heldout):
        members = [one for one in evidence.heldout if one.family == name]
        none, prompt = sum(one.none for one in members), sum(one.prompt for one in members)
        found.append(
            Family(
                name=name,
                queries=len(members),
                train_queries=evidence.train_families.get(name, 0),
                recovered=1 - prompt / none if none else 0.0,
                share=prompt / left,
            )
        )
    return tuple(sorted(found, key=lambda family: -family.share))


def worst(queries: Iterable[AskedQuery]) -> list[AskedQuery]:
    """The queries whose answers are furthest from the teacher's."""
    return sorted(queries, key=lambda one: -one.prompt)[:WORST]


def data(evidence: Evidence) -> Finding | None:
    """Whether held-out queries recover less than training queries."""
    found = difference(evidence.train, evidence.heldout)
    return _finding(evidence, found) if found.counts else None


def perhaps_data(evidence: Evidence) -> Finding:
    """What is left for a prompt that is good on training queries: the held-out ones differ, perhaps by chance."""
    return _finding(evidence, difference(evidence.train, evidence.heldout))


def _finding(evidence: Evidence, found: Gain) -> Finding:
    kinds = families(evidence)
    missing = [one for one in kinds if not one.train_queries]
    change, options = _change(evidence, kinds)
    named = f" None of them is of the kind {', '.join(repr(one.name) for one in missing)}." if missing else ""
    return Finding(
        cause="data",
        sentence=f"The prompt recovers {part(evidence.train_recovered)} on training queries, and only "
        f"{part(evidence.recovered)} on held-out ones: the training queries do not cover what is asked.{named}",
        evidence=(
            (
                "difference and its standard error",
                f"{part(found.value)} ± {part(found.error)}" + ("" if found.counts else ", which may be chance"),
            ),
            *(
                (
                    f"{one.name}: {count(one.queries, 'query', 'queries')} held out, {one.train_queries} for training",
                    f"recovered {part(one.recovered)}, {one.share:.0%} of what is missing",
                )
                for one in kinds
            ),
            *(
                (f"far from the teacher: {one.query[:80]}", f"KL {one.prompt:.2g} of {one.none:.2g} nats")
                for one in worst(evidence.heldout)
            ),
        ),
        change=change,
        options=options,
        expected=f"At most {part(evidence.recovered)} → {part(evidence.train_recovered)} held-out: what the training "
        "queries have.",
        gain=found.value if found.counts else None,
    )


def _change(evidence: Evidence, kinds: tuple[Family, ...]) -> tuple[str, str]:
    """What to train on: more of what self-study makes, or queries from a file, by the kinds that are far off."""
    config, more = evidence.config, evidence.more_selfstudy
    far = [one.name for one in kinds if one.share >= LARGE_SHARE] or [kinds[0].name]
    made = f"{config.selfstudy + more} queries that are made from the text"
    options = f"--selfstudy {config.selfstudy + more}" if more else ""
    if more and all(name in SELF_STUDY for name in far):
        return f"Train on {made}.", options
    where = f"to {config.queries}" if config.queries else "to a file of --queries"
    return f"Add queries like those, in other words, {where}{f', and train on {made}' if more else ''}.", options
