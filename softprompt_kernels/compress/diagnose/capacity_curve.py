"""Recovered against the length of the prompt, by matching alone in closed form.

The rows of all layers are read once. A layer's rows are split once, and fitted at each length. So the lengths cost a
closed form each, and one evaluation: seconds, without any step of training.
"""

from __future__ import annotations

import time

from torch import Tensor

from softprompt_kernels.compress.diagnose.evidence import Matched
from softprompt_kernels.compress.evaluate.distance import measure_tokens
from softprompt_kernels.compress.initial_prompt import matched_prompt
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.matching.closed_form import fit_layer
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.teacher.rows import Rows
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix


def lengths(tokens: int, context: int) -> list[int]:
    """The lengths that are tried for a prompt of `tokens` tokens, shorter than the context of `context` tokens.

    These are a quarter, a half, once, twice and four times the length of the prompt.
    """
    tried = {max(1, tokens // 4), max(1, tokens // 2), tokens, 2 * tokens, 4 * tokens}
    return sorted(length for length in tried if length < context)


def capacity_curve(
    inputs: RunInputs, context: Prefix, taught: Taught, rows: Rows, reporter: Reporter
) -> tuple[list[Matched], dict[int, KVPrompt]]:
    """The matched prompts of some lengths, what they recover, and the prompts themselves, by length in tokens.

    Args:
        inputs: of the run.
        context: the captured context.
        taught: with the evaluated examples and the teacher's hidden states.
        rows: that the teacher recorded behind this context.
        reporter: receives the progress.
    """
    tried = lengths(inputs.config.tokens, context.length)
    layers: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in tried}
    seconds = dict.fromkeys(tried, 0.0)
    with reporter.progress("Matching at other lengths", context.num_layers * len(tried), "layer") as advance:
        for layer, pair in enumerate(context.layers):
            layer_rows = rows.layer(layer, inputs.model.device)
            key, value = (tensor[0].to(inputs.model.device, layer_rows.query.dtype) for tensor in pair)
            parts = split(layer_rows, key, value)
            for k in tried:
                begin = time.perf_counter()
                fitted = fit_layer(layer_rows, parts, key, value, k)
                layers[k].append((fitted[0][None], fitted[1][None]))
                seconds[k] += time.perf_counter() - begin
                advance(1)
    found, prompts = [], {}
    with reporter.progress("Measuring them", len(tried), "prompt") as advance:
        for k in tried:
            begin = time.perf_counter()
            prompts[k] = matched_prompt(inputs, context, Prefix.of(layers.pop(k)))
            student = {"prompt": prefix_of(inputs.model, prompts[k]).detach()}
            sums = {name: _sums(inputs, context, student, taught, name) for name in ("heldout", "train")}
            found.append(Matched(k, sums["heldout"], sums["train"], seconds[k] + time.perf_counter() - begin))
            advance(1)
    return found, prompts


def _sums(
    inputs: RunInputs, context: Prefix, student: dict[str, Prefix], taught: Taught, name: str
) -> tuple[float, ...]:
    """KL of each example of a set, summed over its answer, in nats."""
    examples = taught.evaluated[name]
    measured = measure_tokens(
        inputs.model, context, student, examples, SilentReporter(), name, teacher=taught.states[name]
    )
    parts = measured["prompt"].kl.split([example.targets for example in examples])
    return tuple(float(one.double().sum()) for one in parts)
