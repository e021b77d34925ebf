"""Where a compression starts: what the context is decides what runs."""

from __future__ import annotations

from typing import Any

from softprompt_kernels.compress.bank.forecast import BankPlan, plan_bank
from softprompt_kernels.compress.bank.run import compress_bank
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.forecast import Plan, plan_one
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.run import compress_one
from softprompt_kernels.compress.sequential.forecast import plan_segments
from softprompt_kernels.compress.sequential.run import compress_segments
from softprompt_kernels.compress.sources.contexts import holds_many


@ranks.started()
def compress(config: CompressConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Compress a context into a soft prompt.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.

    Returns:
        The content of evaluation.json. KL in nats per token. For a folder or JSON Lines of contexts: the summary of
        `compress_bank`, with that content for each context by its name.

    Raises:
        SoftPromptError: bad input. Most is found before anything is written; otherwise the last good state is kept.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP during matching or training. The state is saved first. A second signal
            ends the process at once. The other two signals count in the main thread, unless they are ignored or have a
            handler already.
        KeyboardInterrupt: the same in another stage.
    """
    if is_bank(config):
        return compress_bank(config, reporter)
    if config.segment_tokens is not None:
        return compress_segments(config, reporter)
    return compress_one(config, reporter)


def plan(config: CompressConfig, reporter: Reporter | None = None) -> Plan | BankPlan:
    """Measure on a few queries what `compress` would do with all of them. Nothing is written.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.

    Raises:
        SoftPromptError: as `compress`.
    """
    if is_bank(config):
        return plan_bank(config, reporter)
    if config.segment_tokens is not None:
        return plan_segments(config, reporter)
    return plan_one(config, reporter)


def is_bank(config: CompressConfig) -> bool:
    """Whether a configuration is for many contexts, and not for a run of a version that read JSON Lines as one."""
    return holds_many(config.context) and (config.context.is_dir() or not (config.output / "run.json").exists())
