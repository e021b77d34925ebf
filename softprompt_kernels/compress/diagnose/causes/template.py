"""Broken template: the teacher's answers run past their turn, so that the prompt learns to write the next turn too.

A model ends an answer with the token that its training data had there. If the chat template does not write that token,
or another one is taken for the end, or the model never learnt any, the answers go on: with the next question of a chat,
or without end.
"""

from __future__ import annotations

from softprompt_kernels.compress.diagnose.evidence import Evidence
from softprompt_kernels.compress.evaluate.diagnosis import Finding

RUNS_ON = 0.2
"""A share of answers. Below it may be those that rightly quote a chat, such as a quiz that was asked for."""

HARDLY_EVER = 0.05
"""A share of answers that end. Where answers are cut at `new_tokens`, few may end, but some do."""

LONG = 32
"""Tokens. Shorter answers are cut before they could end, so that only the next turn in them is a sign."""

FEWEST = 5
"""With fewer answers, shares say nothing."""


def broken_template(evidence: Evidence) -> Finding | None:
    """Whether answers go on with the next turn, or cannot end."""
    turns = evidence.turns
    if turns.answers < FEWEST:
        return None
    shown = [
        ("answers of the teacher", str(turns.answers)),
        ("that end by themselves", f"{turns.ended} ({turns.ended / turns.answers:.0%})"),
        ("that go on with the next turn", f"{turns.running_on} ({turns.running_on / turns.answers:.0%})"),
    ]
    if turns.end_probability is not None:
        shown.append(("mean probability of an end", f"{turns.end_probability:.1g} for each token"))
    if not turns.end_rendered:
        shown.append(("the template's end of an answer", "no token"))
    if turns.example:
        shown.append(("one that goes on", turns.example))
    runs_on = turns.running_on / turns.answers >= RUNS_ON
    never = evidence.config.new_tokens >= LONG and turns.ended / turns.answers <= HARDLY_EVER
    endless = turns.end_probability is not None and turns.end_probability * turns.window < 1
    if runs_on:
        what = "The teacher's answers go on with the next turn of the chat."
    elif never and not turns.end_rendered:
        what = "The chat template writes no token at the end of an answer, and the teacher's answers do not end."
    elif never and endless:
        what = (
            "The teacher's answers do not end: the model gives the end of an answer so little probability that its "
            f"window of {turns.window} tokens would be full before."
        )
    else:
        return None
    return Finding(
        cause="broken template",
        sentence=what,
        evidence=tuple(shown),
        change="Use the chat template that the model was trained with, and see that eos_token_id in its "
        "generation_config.json is the token that ends a turn there; a base model has no turns: give the outputs of "
        "the queries in the file of --queries.",
        expected="Answers that end with their turn. Until then the figures count tokens that nobody will ask for.",
    )
