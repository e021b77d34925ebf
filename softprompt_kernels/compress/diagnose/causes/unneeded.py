"""Nothing to compress: the model answers the queries nearly the same without the context.

`compress` refuses a KL without context of at most 1e-3 nats per token. Above it, "recovered" is defined, but it divides
one small number by another.
"""

from __future__ import annotations

from softprompt_kernels.compress.diagnose.causes.words import count
from softprompt_kernels.compress.diagnose.evidence import AskedQuery, Evidence
from softprompt_kernels.compress.evaluate.diagnosis import Finding

NEEDLESS_KL = 1e-2
"""Nats per token. By Pinsker's inequality two distributions of this KL differ by at most √(KL / 2) = 7 % in total
variation: at most 7 of 100 sampled tokens would be others without the context."""


def nothing_to_compress(evidence: Evidence) -> Finding | None:
    """Whether the queries of a set, as a whole, do not need the context."""
    sets = {"held-out": evidence.heldout, "training": evidence.train}
    small = [name for name, queries in sets.items() if queries and mean_kl(queries) <= NEEDLESS_KL]
    if not small and not evidence.refused:
        return None
    asked = [*evidence.heldout, *evidence.train]
    needless = [one for one in asked if mean_kl([one]) <= NEEDLESS_KL]
    most = sorted(asked, key=lambda one: -mean_kl([one]))[:3]
    which = " and the ".join(small or ["test"])
    refused = " The run was refused for this." if evidence.refused else ""
    return Finding(
        cause="nothing to compress",
        sentence=f"The model answers the {which} queries nearly the same without the text.{refused}",
        evidence=(
            *(
                (f"KL without context, {name} queries", f"{mean_kl(queries):.2g} nats per token")
                for name, queries in sets.items()
                if queries
            ),
            ("queries that do not need the text", f"{len(needless)} of {count(len(asked), 'query', 'queries')}"),
            *((f"needs it most: {one.query[:60]}", f"{mean_kl([one]):.2g} nats per token") for one in most),
        ),
        change="Ask what only the text answers, such as its names, numbers and events, with --queries. If the model "
        "knows the text already, no prompt is needed.",
        expected="A prompt can recover no more than the KL without context.",
    )


def mean_kl(queries: list[AskedQuery] | tuple[AskedQuery, ...]) -> float:
    """KL without context, nats per token."""
    return sum(one.none for one in queries) / max(1, sum(one.tokens for one in queries))
