"""The prompt before training: what `init` names, as a prompt of the configured kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from softprompt_kernels.compress.compressor.compressor import read_once
from softprompt_kernels.compress.compressor.store import load_compressor
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.compress.inputs import RunInputs, read_text
from softprompt_kernels.compress.teacher.context import move_keys, select_tokens
from softprompt_kernels.models import capture
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, initialise


def initial_prompt(inputs: RunInputs, context: Prefix) -> Prompt:
    """k tokens chosen by `config.init`, on the model's device. All but the first `config.frozen` are trainable.

    Not for init=matched, which needs the teacher's answers: see `matched_prompt`.

    Args:
        inputs: the inputs of the run.
        context: the captured context.
    """
    config, model = inputs.config, inputs.model
    k, generator = config.tokens, torch.Generator().manual_seed(config.seed)
    if config.kind == "kv":
        if config.init in ("first", "strided"):
            prefix = select_tokens(model, context, k, config.init)
        elif config.init == "random":
            prefix = initialise.random_prefix(context, k, generator=generator)
        elif config.init == "compressor":
            prefix = _read_by_compressor(inputs)
        else:
            prefix = capture(model, initial_token_ids(inputs, generator)[None].to(model.device))
        return KVPrompt.from_prefix(prefix, frozen_tokens=config.frozen).to(model.device)
    embed = cast(Callable[[Tensor], Tensor], model.get_input_embeddings())
    if config.init == "random":
        table = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
        rows = initialise.random_embedding(embed, table.shape[0], k, device=model.device, generator=generator)
    else:
        rows = initialise.embed_tokens(embed, initial_token_ids(inputs, generator).to(model.device))
    return EmbeddingPrompt(rows, frozen_tokens=config.frozen).to(model.device)


def _read_by_compressor(inputs: RunInputs) -> Prefix:
    """The prompt that the compressor of the configuration reads from the context."""
    assert inputs.config.compressor is not None
    compressor = load_compressor(inputs.config.compressor, inputs.model, inputs.tokenizer)
    try:
        return read_once(compressor, inputs.context_ids)
    finally:
        if compressor.lora is not None:
            compressor.lora.detach()


def matched_prompt(inputs: RunInputs, context: Prefix, matched: Prefix) -> KVPrompt:
    """The prompt that `match` found, with its keys at the positions of a prompt.

    A model with learned positions asks from position k instead of C then, and so with other queries than those that
    the prompt was matched to.

    Args:
        inputs: the inputs of the run.
        context: the captured context.
        matched: k tokens with keys at the positions of the context.
    """
    prefix = move_keys(inputs.model, matched, matched.length - context.length)
    return KVPrompt.from_prefix(prefix, frozen_tokens=inputs.config.frozen).to(inputs.model.device)


def initial_baseline(config: CompressConfig) -> str:
    """The key in evaluation.json of the student that the prompt equals before training.

    That is a baseline, or "prompt" itself if it is not trained, or else "initial".
    """
    baseline = {"first": "truncated", "strided": "untrained"}.get(config.init) if config.kind == "kv" else None
    return baseline or ("initial" if config.steps else "prompt")


def initial_token_ids(inputs: RunInputs, generator: torch.Generator) -> Tensor:
    """`[k]`: the tokens that the prompt is initialised from."""
    config, ids = inputs.config, inputs.context_ids[0].cpu()
    if config.init == "first":
        return initialise.first_tokens(ids, config.tokens)
    if config.init == "strided":
        return initialise.strided_tokens(ids, config.tokens)
    if config.init == "text":
        assert config.init_text is not None
        return initialise.tiled_tokens(
            inputs.chat.context_ids(read_text(config.init_text, "init_text"))[0], config.tokens
        )
    special = inputs.tokenizer.all_special_ids
    return initialise.vocabulary_tokens(len(inputs.tokenizer), config.tokens, exclude=special, generator=generator)
