"""Objective: the most likely token is right and the distribution is not.

A loss on single tokens (nll), or with a temperature, has its least value at another distribution than the teacher's.
And reverse_kl and jsd forgive other faults than KL does. The training queries show it: there the prompt reached what it
was trained for, so its most likely tokens are the teacher's, but most of the KL that is left lies at those very tokens.

A prompt that is only too short can look the same. So matching alone must do better with as many tokens, if it was
tried. A prompt that was not trained, or on the plain KL, has no such fault.
"""

from __future__ import annotations

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.diagnose.causes.words import part
from softprompt_kernels.compress.diagnose.evidence import MEANINGFUL, Evidence, gain, recovered
from softprompt_kernels.compress.evaluate.diagnosis import Finding

AGREES = 0.75
"""Top-1 agreement on training queries from which the most likely tokens are called right."""

RUINED = 0.5
"""The part of the KL that is left which lies at tokens whose most likely token is right."""


def objective(evidence: Evidence) -> Finding | None:
    """Whether the objective of a run ruins the distribution."""
    instead = _options(evidence.config)
    left, tokens = sum(one.prompt for one in evidence.train), sum(one.tokens for one in evidence.train)
    if not instead or not evidence.config.steps or not tokens or not left:
        return None
    agreement = sum(one.agreeing for one in evidence.train) / tokens
    share = sum(one.agreeing_prompt for one in evidence.train) / left
    if agreement < AGREES or share < RUINED:
        return None
    here = evidence.matched_at(evidence.config.tokens)
    if here and gain(evidence.train, [one.prompt for one in evidence.train], here.train).value <= MEANINGFUL:
        return None
    found = None if here is None else gain(evidence.heldout, [one.prompt for one in evidence.heldout], here.heldout)
    known = found is not None and found.counts
    certain = "too certain" if evidence.entropy_gap < 0 else "too uncertain"
    return Finding(
        cause="objective",
        sentence=f"With {_name(evidence.config)} the prompt finds the most likely tokens and ruins the distribution.",
        evidence=(
            ("top-1 agreement, training queries", part(agreement)),
            ("recovered, training queries", part(evidence.train_recovered)),
            ("KL that is left at tokens whose most likely token is right", f"{share:.0%}"),
            ("entropy, prompt minus teacher", f"{evidence.entropy_gap:+.2f} nats per token ({certain})"),
            *(
                [("recovered by matching alone, held-out", part(recovered(evidence.heldout, here.heldout)))]
                if here is not None
                else []
            ),
        ),
        change="Train on the KL of the whole distribution.",
        options=instead,
        expected=f"At least what matching alone gives with the same tokens: {part(evidence.recovered)} → "
        f"{part(recovered(evidence.heldout, here.heldout))} held-out."
        if known and here is not None
        else "",
        gain=found.value if known and found is not None else None,
    )


def _name(config: CompressConfig) -> str:
    """The objective in words."""
    if config.objective != "kl":
        return f"objective {config.objective}"
    return f"nll_weight {config.nll_weight:g}" if config.nll_weight else f"loss_temperature {config.loss_temperature:g}"


def _options(config: CompressConfig) -> str:
    """What makes the objective the plain KL; "" if it is."""
    options = {"--objective kl": config.objective != "kl", "--nll-weight 0": config.nll_weight != 0}
    options["--beta 0.5"] = config.beta != 0.5
    options["--loss-temperature 1"] = config.loss_temperature != 1
    return " ".join(option for option, needed in options.items() if needed)
