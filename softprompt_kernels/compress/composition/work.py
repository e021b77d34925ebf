"""The inputs of a composition: everything that is loaded and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from softprompt_kernels.compress.composition.documents import Document, joined_text, load_documents
from softprompt_kernels.compress.composition.join import check_movable, join_prompts
from softprompt_kernels.compress.composition.settings import Composition
from softprompt_kernels.compress.composition.teaching import check_queries, unclear_queries
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.compress.inputs import RunInputs, check_window
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of
from softprompt_kernels.models.families import max_positions


@dataclass(frozen=True, eq=False)
class Work:
    """A composition with all that is loaded.

    Args:
        composition: the settings.
        documents: in the order of their prompts.
        inputs: of the joined prompt: the queries of all documents, and their texts as one.
        prompt: the joined prompt.
        unclear: inputs of queries that are left out.
        left_out: their number.
    """

    composition: Composition
    documents: tuple[Document, ...]
    inputs: RunInputs
    prompt: Prompt
    unclear: frozenset[str]
    left_out: int

    @property
    def fits_whole(self) -> bool:
        """Whether the full texts of all documents fit into the model's window, with each query and its answer."""
        inputs = self.inputs
        queries = (*inputs.train, *inputs.heldout, *inputs.test)
        try:
            check_window(inputs.model, inputs.chat, inputs.context_tokens, queries, inputs.config.new_tokens)
        except SoftPromptError:
            return False
        return True

    @property
    def remark(self) -> str | None:
        """What the user should know of the queries, if anything."""
        if not self.left_out:
            return None
        return (
            f"{self.left_out} queries are left out: they do not say which document they mean (general requests, and "
            "questions that several documents are asked)."
        )


def prepare(composition: Composition) -> Work:
    """Load the model, the runs and their prompts, join these, and check all that can be checked.

    Raises:
        SoftPromptError: something does not fit.
    """
    config = composition.config
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_model(config.model, config.dtype, config.device)
    model = loaded[0]
    if config.kind == "kv":
        check_movable(model)
    documents = load_documents(composition.sources, loaded)
    unclear = unclear_queries(documents)
    left_out = check_queries(documents, unclear)
    prompt = join_prompts(model, [document.prompt for document in documents]).to(model.device)
    first, text = documents[0].inputs, joined_text(documents)

    def clear(of_set: str) -> tuple[Query, ...]:
        asked = (query for document in documents for query in document.inputs.sets.get(of_set, ()))
        return tuple(query for query in asked if query.input not in unclear)

    ids = first.chat.context_ids(text).to(model.device)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs = replace(
        first,
        config=config,
        text=text,
        context_ids=ids,
        objective=Objective("kl", head_of(model)),
        train=clear("train"),
        heldout=clear("heldout"),
        test=clear("test"),
    )
    check_joined_window(inputs, prompt.length)
    return Work(composition, documents, inputs, prompt, unclear, left_out)


def check_joined_window(inputs: RunInputs, tokens: int) -> None:
    """Check that each query and its answer fit into the model's window behind a joined prompt of so many tokens.

    Raises:
        SoftPromptError: one does not.
    """
    try:
        queries = (*inputs.train, *inputs.heldout, *inputs.test)
        check_window(inputs.model, inputs.chat, tokens, queries, inputs.config.new_tokens)
    except SoftPromptError as error:
        raise SoftPromptError(
            f"runs: the joined prompt has {tokens} tokens, too many for the model's window of "
            f"{max_positions(inputs.model.config)} with a query and its answer; accepted are fewer or shorter prompts "
            f"({error})"
        ) from error
