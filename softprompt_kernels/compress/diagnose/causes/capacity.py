"""Capacity: a prompt of this length, or of this kind, cannot hold what the queries ask for.

Matching alone, in closed form, says what a prompt of k tokens can hold without any training. If the curve still rises
at k, more tokens hold more. Training lifts the whole curve, so its rise at k is an estimate for a trained prompt too.
"""

from __future__ import annotations

from softprompt_kernels.compress.diagnose.causes.optimisation import fault_of_training
from softprompt_kernels.compress.diagnose.causes.words import MATCHED_OPTIONS, count, part
from softprompt_kernels.compress.diagnose.evidence import MEANINGFUL, Evidence, gain, recovered
from softprompt_kernels.compress.evaluate.diagnosis import Finding


def capacity(evidence: Evidence) -> Finding | None:
    """More tokens, if the curve rises at the length of the prompt, or keys and values in place of embeddings.

    It must rise on the training queries too: what a longer prompt holds only of other queries is a matter of data.
    """
    k, here, longer = evidence.config.tokens, evidence.matched_at(evidence.config.tokens), evidence.longer
    if here is None:
        return None
    if evidence.config.kind == "embedding":
        return _kind(evidence)
    if longer is None:
        return None
    found = gain(evidence.heldout, here.heldout, longer.heldout)
    if not found.counts or gain(evidence.train, here.train, longer.train).value <= MEANINGFUL:
        return None
    curve = {one.tokens: recovered(evidence.heldout, one.heldout) for one in evidence.matched}
    last, ratio = evidence.matched[-1].tokens, evidence.context_tokens / k
    more = f"; at {last}: {part(curve[last])}" if last > longer.tokens else ""
    # Of what is missing, the longer prompt leaves the same part with and without refinement and training.
    left = (1 - curve[longer.tokens]) / (1 - curve[k])
    missing = min(1 - curve[k], 1 - evidence.recovered)
    matched = f"{part(curve[k])} → {part(curve[longer.tokens])} held-out{more}"
    made = f" Made as in the run, {part(evidence.recovered)} → about {part(1 - left * missing)}."
    return Finding(
        cause="capacity",
        sentence=f"{k} tokens are too few for {evidence.context_tokens} tokens of text ({ratio:.1f}x): by matching "
        "alone, a longer prompt recovers more.",
        evidence=tuple(
            (f"recovered by matching alone, {count(tokens, 'token')}", part(value)) for tokens, value in curve.items()
        ),
        change=f"Give the prompt {longer.tokens} tokens.",
        options=f"--tokens {longer.tokens}",
        expected=f"By matching alone at {longer.tokens}: {matched}.{made if missing < 1 - curve[k] else ''}",
        gain=(1 - left) * missing,
    )


def _kind(evidence: Evidence) -> Finding | None:
    """Keys and values of all layers hold more than input embeddings of the same length, unless the rate was wrong."""
    if fault_of_training(evidence) is not None:
        return None
    k, here = evidence.config.tokens, evidence.matched_at(evidence.config.tokens)
    assert here is not None
    found = gain(evidence.heldout, [one.prompt for one in evidence.heldout], here.heldout)
    if not found.counts:
        return None
    there = part(recovered(evidence.heldout, here.heldout))
    return Finding(
        cause="capacity",
        sentence=f"{k} embeddings hold less than {k} tokens of keys and values.",
        evidence=(
            (f"recovered, {k} embeddings", part(evidence.recovered)),
            (f"recovered by matching alone, {k} tokens of keys and values", there),
        ),
        change="Use a prompt of keys and values.",
        options=f"--kind kv {MATCHED_OPTIONS}",
        expected=f"By matching alone at {k}: {part(evidence.recovered)} → {there} held-out.",
        gain=found.value,
    )
