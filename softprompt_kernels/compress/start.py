"""Where a compression starts: what the context is decides what runs."""

from __future__ import annotations

from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.forecast import Plan, plan_one
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.run import compress_one


def compress(config: CompressConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Compress a context into a soft prompt.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.

    Returns:
        The content of evaluation.json. KL in nats per token.

    Raises:
        SoftPromptError: bad input. Most is found before anything is written; otherwise the last good state is kept.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP during matching or training. The state is saved first. A second signal
            ends the process at once. The other two signals count in the main thread, unless they are ignored or have a
            handler already.
        KeyboardInterrupt: the same in another stage.
    """
    return compress_one(config, reporter)


def plan(config: CompressConfig, reporter: Reporter | None = None) -> Plan:
    """Measure on a few queries what `compress` would do with all of them. Nothing is written.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.

    Raises:
        SoftPromptError: as `compress`.
    """
    return plan_one(config, reporter)
