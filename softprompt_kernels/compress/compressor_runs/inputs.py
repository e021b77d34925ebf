"""The inputs of the training of a compressor: contexts and their queries, the split, the model; loaded and checked."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress.compressor.form import Form
from softprompt_kernels.compress.compressor.lessons import Assignment
from softprompt_kernels.compress.compressor.segments import even_lengths
from softprompt_kernels.compress.compressor_runs.config import DEFAULT_SEGMENT, CompressorConfig
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import CHAT_FILE, Loaded, check_window, sha256
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.contexts import NamedContext, read_contexts
from softprompt_kernels.compress.sources.model import check_ids, load_model, resolve_device
from softprompt_kernels.compress.sources.self_study import self_study
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import check_fixed_frequencies, head_of
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts.fingerprint import as_recorded, model_fingerprint, tokenizer_fingerprint

SETS = ("train", "heldout", "test")
_SHOWN = 5  # skipped contexts that are named in messages


@dataclass(frozen=True, eq=False)
class CompressorInputs:
    """The inputs of a training, loaded and checked.

    Args:
        config: the configuration.
        model, tokenizer: from `load_model`.
        chat: the chat format of the tokenizer.
        form: of the compressor.
        sets: the contexts to train on ("train"), to choose the best step by ("heldout") and to report ("test").
        skipped: the reason for each context that cannot be used, by its name.
        digest: of all contexts and queries.
        objective: the training loss.
    """

    config: CompressorConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    form: Form
    sets: dict[str, list[Assignment]]
    skipped: dict[str, str]
    digest: str
    objective: Objective

    def identity(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the result of the run, JSON-able.

        Args:
            recorded: the identity of the run that the folder holds; empty if it holds none.
        """
        left_out = {"output", "threads", "device", "checkpoint_every", "micro_batch_size"}
        identity = self.config.model_dump(mode="json", exclude=left_out)
        model, tokenizer = recorded.get("model"), recorded.get("tokenizer")
        return identity | {
            "contexts": self.digest,
            "model": as_recorded(model, model_fingerprint(self.model, model)),
            "tokenizer": as_recorded(tokenizer, tokenizer_fingerprint(self.tokenizer, tokenizer)),
        }


def load_compressor_inputs(
    config: CompressorConfig, reporter: Reporter, loaded: Loaded | None = None
) -> CompressorInputs:
    """Load the inputs and check them. Nothing is written.

    A context that cannot be used is skipped, with a message.

    Args:
        config: the configuration.
        reporter: is told of skipped contexts.
        loaded: as in `inputs.load_inputs`.

    Raises:
        SoftPromptError: an input is invalid, or fewer than three contexts can be used.
    """
    try:
        found = read_contexts(config.contexts)
    except SoftPromptError as error:
        raise SoftPromptError(str(error).replace("context:", "contexts:", 1)) from error
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    resolve_device(config.device)
    model, tokenizer = loaded or load_model(config.model, config.dtype, config.device)
    check_fixed_frequencies(model)
    folder = RunFolder(config.output)
    stored = folder.cache.exists() and folder.read_evaluation() is None
    chat = ChatFormat.pinned(tokenizer, folder.path / CHAT_FILE, config.template_arguments, needed=stored)
    window = max_positions(model.config)
    form = Form(
        config.tokens, config.state, config.segment_tokens or min(DEFAULT_SEGMENT, window // 2), config.lora_rank
    )
    assignments, skipped = [], dict(found.skipped)
    for context in found.contexts:
        try:
            assignments.append(_assignment(config, model, chat, form, context))
        except SoftPromptError as error:
            skipped[context.name] = str(error)
    segments = max((len(even_lengths(one.ids.shape[0], form.segment_tokens)) for one in assignments), default=1)
    for one in [
        one for one in assignments if one.ids.shape[0] < segments
    ]:  # a step cuts its contexts into equally many
        assignments.remove(one)
        skipped[one.name] = (
            f"it has {one.ids.shape[0]} tokens, accepted are {segments} or more, the segments of the longest context"
        )
    for name, reason in list(skipped.items())[:_SHOWN]:
        reporter.message(f"Skipped the context {name}: {reason}")
    if len(skipped) > _SHOWN:
        reporter.message(f"Skipped {len(skipped) - _SHOWN} more contexts; evaluation.json names them all.")
    if len(assignments) < len(SETS):
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:2])
        raise SoftPromptError(
            f"contexts: got {len(assignments)} that can be used, accepted are three or more: one to train on, one to "
            f"choose the best step by, one to report{reasons}"
        )
    asked = [(one.name, one.ids.tolist(), [(q.input, q.output) for q in one.queries]) for one in assignments]
    objective = Objective(config.objective, head_of(model))
    sets = _split(assignments, config)
    return CompressorInputs(config, model, tokenizer, chat, form, sets, skipped, sha256(repr(asked)), objective)


def _assignment(
    config: CompressorConfig, model: PreTrainedModel, chat: ChatFormat, form: Form, context: NamedContext
) -> Assignment:
    """A context with its queries.

    Raises:
        SoftPromptError: it cannot be used.
    """
    ids = chat.context_ids(context.text)[0].cpu()
    check_ids(model, chat.tokenizer, ids.tolist(), "context")
    tokens = ids.shape[0]
    if tokens <= form.prompt_tokens(tokens):
        raise SoftPromptError(
            f"it has {tokens} tokens, accepted are more than the {form.prompt_tokens(tokens)} of its prompt"
        )
    given = [query for part in (context.queries, context.heldout, context.test) for query in part or ()]
    known = {query.input for query in given}
    made = [query for query in self_study(context.text, config.selfstudy, config.seed) if query.input not in known]
    queries = tuple(dict.fromkeys((*given, *made)))
    if not queries:
        raise SoftPromptError("it has no queries, and selfstudy=0 generates none")
    check_window(model, chat, tokens, queries, config.new_tokens)
    lengths = even_lengths(tokens, form.segment_tokens)
    most = max(len(lengths), min(config.segments, tokens))
    form.check_window(max_positions(model.config), most, form.segment_tokens if most > 1 else max(lengths))
    return Assignment(context.name, ids, queries)


def _split(assignments: Sequence[Assignment], config: CompressorConfig) -> dict[str, list[Assignment]]:
    """The sets, by name. Each has at least one context."""
    shuffled = sorted(assignments, key=lambda one: one.name)
    random.Random(config.seed).shuffle(shuffled)
    count = len(shuffled)
    heldout, test = (
        min(max(1, round(share * count)), (count - 1) // 2) for share in (config.heldout_share, config.test_share)
    )
    parts = {"heldout": shuffled[:heldout], "test": shuffled[heldout : heldout + test]}
    return {"train": shuffled[heldout + test :], **parts}
