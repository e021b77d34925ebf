"""From the evidence of a run to its findings, the most probable cause first.

What makes the figures meaningless comes first and alone: a broken template, nothing to compress. A good prompt needs no
cause. Otherwise causes are ordered by what they explain of what is missing, `1 − recovered` on held-out queries:

    causes that explain at least a quarter of it, the largest first
    causes whose part is not known
    where there is neither: the queries if the prompt is good on those of the training, or else too little training
    the others, the largest first
"""

from __future__ import annotations

from softprompt_kernels.compress.diagnose.causes.capacity import capacity
from softprompt_kernels.compress.diagnose.causes.data import data, perhaps_data
from softprompt_kernels.compress.diagnose.causes.objective import objective
from softprompt_kernels.compress.diagnose.causes.optimisation import optimisation, unfinished_training
from softprompt_kernels.compress.diagnose.causes.template import broken_template
from softprompt_kernels.compress.diagnose.causes.unneeded import nothing_to_compress
from softprompt_kernels.compress.diagnose.causes.words import part
from softprompt_kernels.compress.diagnose.evidence import Evidence, recovered
from softprompt_kernels.compress.evaluate.diagnosis import Finding

GOOD = 0.9
"""Recovered on held-out queries: a prompt that lacks a tenth of what the text gives, or less, is called good."""

MAIN = 0.25
"""A cause that explains a smaller part of what is missing is not the main one."""


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """The findings for a run, at least one."""
    meaningless = meaningless_figures(evidence)
    if meaningless:
        return meaningless
    if is_good(evidence):
        return (_nothing_wrong(evidence),)
    found = [one for cause in (capacity, optimisation, objective, data) if (one := cause(evidence))]
    missing = 1 - evidence.recovered
    main = [one for one in found if one.gain is not None and one.gain >= MAIN * missing]
    unknown = [one for one in found if one.gain is None]
    minor = [one for one in found if one not in main and one not in unknown]
    if not main and not unknown:
        unknown = [perhaps_data(evidence) if evidence.train_recovered >= GOOD else unfinished_training(evidence)]
        minor = [one for one in minor if one.cause != unknown[0].cause]
    return (*_largest_first(main), *unknown, *_largest_first(minor))


def meaningless_figures(evidence: Evidence) -> tuple[Finding, ...]:
    """The findings that make all other figures meaningless. They need no prompt, no matching and no rate range test."""
    return tuple(one for cause in (broken_template, nothing_to_compress) if (one := cause(evidence)))


def is_good(evidence: Evidence) -> bool:
    """Whether nothing is to be mended. It needs no matching and no rate range test."""
    return evidence.recovered >= GOOD


def _nothing_wrong(evidence: Evidence) -> Finding:
    here, longer = evidence.matched_at(evidence.config.tokens), evidence.longer
    more = ""
    if here is not None and longer is not None:
        before, after = (recovered(evidence.heldout, one.heldout) for one in (here, longer))
        more = f"By matching alone, {longer.tokens} tokens give {part(before)} → {part(after)} held-out."
    return Finding(
        cause="nothing wrong",
        sentence=f"The prompt recovers {part(evidence.recovered)} of what the text gives, on held-out queries.",
        evidence=(
            ("recovered, held-out", part(evidence.recovered)),
            ("recovered, training queries", part(evidence.train_recovered)),
        ),
        expected=more,
    )


def _largest_first(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda one: -(one.gain or 0.0))
