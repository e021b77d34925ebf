"""The options of a composition. This module needs no torch: the command line reads it for its help."""

from __future__ import annotations

OPTIONS = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "warmup_steps",
    "gradient_checkpointing",
    "checkpoint_every",
    "evaluate_every",
    "seed",
    "device",
    "threads",
)
"""Fields of `CompressConfig` that a composition has too."""

DEFAULTS = {"steps": 100}
"""Where a composition has another default than `compress`: it starts from prompts that are made already."""

DECIDING = ("steps", "batch_size", "learning_rate", "warmup_steps", "seed")
"""Options that change the result."""
