"""The prompt before training: what `init` names, as a module of the kind that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.inputs import Setup, read_text
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, prefix_of, shift_keys
from softprompt_kernels.models.families import rope_parameters
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, initialise

Prompt = KVPrompt | EmbeddingPrompt


def initial_prompt(setup: Setup, context: Prefix) -> Prompt:
    """k tokens as `config.init` says, trainable but for `config.frozen`, on the model's device.

    Args:
        setup: what is compressed.
        context: its captured prefix.
    """
    config, model = setup.config, setup.model
    k, generator = config.tokens, torch.Generator().manual_seed(config.seed)
    if config.kind == "kv":
        if config.init in ("first", "strided"):
            prefix = cut(model, context, k, config.init)
        elif config.init == "random":
            prefix = initialise.random_prefix(context, k, generator=generator)
        else:
            prefix = capture(model, tokens_of(setup, generator)[None].to(model.device))
        return KVPrompt.from_prefix(prefix, frozen_tokens=config.frozen).to(model.device)
    embed = cast(Callable[[Tensor], Tensor], model.get_input_embeddings())
    if config.init == "random":
        table = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
        rows = initialise.random_embedding(embed, table.shape[0], k, device=model.device, generator=generator)
    else:
        rows = initialise.embed_tokens(embed, tokens_of(setup, generator).to(model.device))
    return EmbeddingPrompt(rows, frozen_tokens=config.frozen).to(model.device)


def cut(model: PreTrainedModel, context: Prefix, k: int, how: str) -> Prefix:
    """k tokens of a captured context as a prefix of their own: the first, or strided ones.

    Raises:
        SoftPromptError: strided keys of a model whose rotary frequencies depend on the length cannot be moved.
    """
    # Learned positions are in the keys for good: strided ones are taken as they are.
    rotate = partial(shift_keys, model) if rope_parameters(model.config) else None
    return initialise.from_prefix(context, k, how, rotate=rotate)


def nothing(model: PreTrainedModel, chat: ChatFormat) -> Prefix | None:
    """What stands before a query when there is neither context nor prompt."""
    ids = chat.bare_ids()
    return None if ids is None else capture(model, ids.to(model.device))


def baselines(setup: Setup, context: Prefix, prompt: Prompt) -> dict[str, Prefix | None]:
    """What a trained prompt of k tokens has to beat, by name.

    "none": no context; "truncated": the first k tokens of the context; "untrained": k of the context's own keys and
    values, strided (left out where they cannot be moved); "initial": the prompt before training, where it is neither.
    """
    model, config = setup.model, setup.config
    students: dict[str, Prefix | None] = {
        "none": nothing(model, setup.chat),
        "truncated": cut(model, context, config.tokens, "first"),
    }
    with suppress(SoftPromptError):
        students["untrained"] = cut(model, context, config.tokens, "strided")
    if start_row(config) == "initial":
        students["initial"] = prefix_of(model, prompt).detach()
    return students


def start_row(config: CompressConfig) -> str:
    """The baseline that the prompt is before training."""
    return (
        {"first": "truncated", "strided": "untrained"}.get(config.init, "initial") if config.kind == "kv" else "initial"
    )


def tokens_of(setup: Setup, generator: torch.Generator) -> Tensor:
    """`[k]`: the tokens that the prompt starts as."""
    config, ids = setup.config, setup.context_ids[0].cpu()
    if config.init == "first":
        return initialise.first_tokens(ids, config.tokens)
    if config.init == "strided":
        return initialise.strided_tokens(ids, config.tokens)
    if config.init == "text":
        assert config.init_text is not None
        return initialise.tiled_tokens(
            setup.chat.context_ids(read_text(config.init_text, "init_text"))[0], config.tokens
        )
    special = setup.tokenizer.all_special_ids
    return initialise.vocabulary_tokens(len(setup.tokenizer), config.tokens, exclude=special, generator=generator)
