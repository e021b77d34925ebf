"""A dry run of a compression in segments: what one segment would cost, times their number."""

from __future__ import annotations

from dataclasses import replace

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.forecast import Plan, plan_inputs
from softprompt_kernels.compress.inputs import Loaded
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sequential.long_text import LongText, load_long_text


@own_torch_modes()
def plan_segments(config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None) -> Plan:
    """What `compress_segments` would do with a text. Results and errors as `plan` in start.py.

    The longest segment is measured, without a prompt before it, and counts for all.

    Args:
        config: of the run, with `segment_tokens`.
        reporter: receives the progress; None reports nothing.
        loaded: as in `load_inputs`.
    """
    reporter = reporter or SilentReporter()
    text = load_long_text(config, loaded)
    count = len(text.segments)
    reporter.message(f"{count} segments. The longest is measured.")
    index = max(range(count), key=lambda number: text.segments[number].tokens)
    inputs = text.segment_inputs(index)
    if not inputs.heldout:  # the forecast asks held-out queries first
        inputs = replace(inputs, heldout=inputs.train[:1])
    one = plan_inputs(inputs, reporter)
    grows = config.state == "accumulated"
    prompts = count if grows else 1
    before = config.tokens * (prompts - 1 if grows else int(count > 1))
    per_token = one.context_kv_bytes // inputs.context_tokens
    return replace(
        one,
        context_tokens=text.inputs.context_tokens,
        prompt_tokens=config.tokens * prompts,
        ratio=text.inputs.context_tokens / (config.tokens * prompts),
        prompt_bytes=one.prompt_bytes * prompts,
        context_kv_bytes=one.context_kv_bytes + per_token * before,
        train_queries=sum(len(own.train) for own in text.queries),
        heldout_queries=sum(len(own.heldout) for own in text.queries),
        test_queries=sum(len(own.test) for own in text.queries),
        estimated_seconds={name: seconds * count for name, seconds in one.estimated_seconds.items()},
        segments=count,
        disk_bytes=_disk_bytes(text, per_token, one.prompt_bytes),
    )


def _disk_bytes(text: LongText, token_bytes: int, prompt_bytes: int) -> int:
    """Most that the run has on disk: what is kept of each segment, and the work on one.

    Args:
        text: with its queries.
        token_bytes: of the keys and values of a token, in all layers.
        prompt_bytes: of k tokens.
    """
    config, model = text.inputs.config, text.inputs.model.config.get_text_config()
    heads = model.num_attention_heads
    answer_bytes = 4 * (model.hidden_size + 1) * config.new_tokens
    asked = max(len(own.train) for own in text.queries)
    kept = sum(len(own.heldout) + len(own.test) + config.evaluation_sequences for own in text.queries)
    rows = min(config.matching_rows, (asked + config.replay) * config.new_tokens) * (config.init == "matched")
    row_bytes = token_bytes * heads // (getattr(model, "num_key_value_heads", None) or heads)
    targets = asked + 2 * config.replay if config.steps else 0
    prompts = prompt_bytes * (len(text.segments) + 1)
    return prompts + answer_bytes * (kept + targets) + rows * row_bytes + 4 * prompt_bytes * (config.steps > 0)
