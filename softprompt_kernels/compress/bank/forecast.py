"""A dry run of a bank: its contexts with their tokens, and what they would cost, measured on one of them.

All contexts are read and checked. The one of median length is measured (see `compress/forecast.py`), and the others are
estimated from it: the capture by their tokens, all else by their queries. The sum is what they would take one after the
other. In one batch they take less, the more the smaller a step is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from softprompt_kernels.compress.bank.contexts import context_config
from softprompt_kernels.compress.bank.folder import BankFolder
from softprompt_kernels.compress.bank.run import check_config
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.forecast import Plan, plan_one
from softprompt_kernels.compress.inputs import Loaded, RunInputs, load_inputs
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.contexts import read_contexts
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of


@dataclass(frozen=True)
class BankPlan:
    """What a bank would be.

    Args:
        tokens: C of each context that would be compressed, by name.
        queries: its training, held-out and test queries, by name.
        finished: the contexts that are finished already.
        skipped: why others would be skipped, by name.
        measured: the name of the context that was measured.
        one: its plan.
        estimated_seconds: by stage, all contexts one after the other.
        disk_bytes: of what stays in the folder: targets, hidden states and prompts.
    """

    tokens: dict[str, int]
    queries: dict[str, int]
    finished: tuple[str, ...]
    skipped: dict[str, str]
    measured: str
    one: Plan
    estimated_seconds: dict[str, float]
    disk_bytes: int


def plan_bank(config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None) -> BankPlan:
    """What `compress_bank` would do. Arguments and errors as there. Nothing is written."""
    reporter = reporter or SilentReporter()
    check_config(config)
    contexts, skipped = read_contexts(config.context)
    loaded = loaded or load_model(config.model, config.dtype, config.device)
    folder = BankFolder(config.output)
    found: dict[str, RunInputs] = {}
    finished = []
    skipped = dict(skipped)
    with tempfile.TemporaryDirectory() as scratch:
        for context in contexts:
            if folder.run(context.name).read_evaluation() is not None:
                finished.append(context.name)
                continue
            try:
                own = context_config(config, context, Path(scratch), folder.run(context.name).path)
                found[context.name] = load_inputs(own, loaded)
            except SoftPromptError as error:
                skipped[context.name] = str(error)
        for name, reason in skipped.items():
            reporter.message(f"Would skip {name}: {reason}")
        if not found:
            raise SoftPromptError(
                f"context: {config.context} has no context left to compress: {len(finished)} are finished, "
                f"{len(skipped)} would be skipped"
            )
        by_length = sorted(found, key=lambda name: found[name].context_tokens)
        measured = by_length[len(by_length) // 2]
        reporter.message(f"Measuring {measured}")
        one = plan_one(found[measured].config, reporter, loaded)
    tokens = {name: inputs.context_tokens for name, inputs in found.items()}
    queries = {name: sum(map(len, inputs.sets.values())) for name, inputs in found.items()}
    return BankPlan(
        tokens,
        queries,
        tuple(finished),
        skipped,
        measured,
        one,
        _seconds(one, measured, tokens, queries),
        sum(_disk_bytes(inputs, one) for inputs in found.values()),
    )


def _seconds(one: Plan, measured: str, tokens: Mapping[str, int], queries: Mapping[str, int]) -> dict[str, float]:
    by_queries = sum(queries.values()) / queries[measured]
    more = {
        "context": sum(tokens.values()) / tokens[measured],
        "matching": float(len(tokens)),  # with as many rows and steps for each
        "training": float(len(tokens)),
    }
    return {name: seconds * more.get(name, by_queries) for name, seconds in one.estimated_seconds.items()}


def _disk_bytes(inputs: RunInputs, one: Plan) -> int:
    """Targets of training, hidden states of evaluated answers, and the prompt, which is also stored as it was matched.
    Answers count with their full length."""
    config, width = inputs.config, head_of(inputs.model).weight.shape[1]
    evaluated = min(config.evaluation_sequences, len(inputs.train)) + len(inputs.heldout) + len(inputs.test)
    itemsize = torch.empty(0, dtype=inputs.model.dtype).element_size()
    trained = len(inputs.train) if config.steps and inputs.objective.form is not None else 0
    prompt = one.prompt_bytes // itemsize * 4
    copies = 2 if config.init == "matched" else 1
    return config.new_tokens * (trained * 4 * (width + 1) + evaluated * itemsize * width) + copies * prompt
