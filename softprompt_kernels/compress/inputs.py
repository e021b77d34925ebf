"""The inputs of a run: texts, queries and model, loaded and checked against each other before anything is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress.compressor.store import check_compressor, digest
from softprompt_kernels.compress.config import CompressConfig, is_own
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.own_loss import check_own_loss, load_own_loss, source_digest
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids, load_model, resolve_device
from softprompt_kernels.compress.sources.queries import Query, hold_out, load_queries, remove_held_out
from softprompt_kernels.compress.sources.self_study import few_about_text, self_study
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.server.client import ServerOptions, served_model
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import check_fixed_frequencies, head_of
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts.fingerprint import as_recorded, model_fingerprint, tokenizer_fingerprint

CHAT_FILE = "chat.json"
"""In the folder of a run: what its chats are rendered from, with the date. A resumed run reads what it began with."""


WITHOUT_EFFECT = (
    "output",
    "threads",
    "track",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "micro_batch_size",
    "gradient_checkpointing",
    "context_memory",
    "contexts_together",
    "server_requests",
    "server_timeout",
    "device",
)
"""Fields of the configuration that do not decide the result of a run, except by rounding."""

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""A model and its tokenizer, from `load_model`."""


@dataclass(frozen=True, eq=False)
class RunInputs:
    """The inputs of a run, loaded and checked.

    Args:
        config: the configuration.
        model, tokenizer: from `load_model`.
        chat: the chat format of the tokenizer.
        text: the context.
        context_ids: `[1, C]` int64: the tokens of the context, on the model's device.
        train, heldout, test: queries. No input is in two of them. Without test queries `test` is empty.
        objective: the training loss.
    """

    config: CompressConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    text: str
    context_ids: Tensor
    train: tuple[Query, ...]
    heldout: tuple[Query, ...]
    test: tuple[Query, ...]
    objective: Objective

    @property
    def context_tokens(self) -> int:
        """C, the length of the context."""
        return self.context_ids.shape[1]

    @property
    def remark(self) -> str | None:
        """What the user should know of the queries, if anything."""
        return few_about_text(self.text, self.config.selfstudy, self.config.seed)

    @property
    def sets(self) -> dict[str, tuple[Query, ...]]:
        """The sets of queries, by their key in evaluation.json; "test" only if there are test queries."""
        return {"train": self.train, "heldout": self.heldout} | ({"test": self.test} if self.test else {})

    def as_text(self, examples: Iterable[Example]) -> list[str]:
        """The outputs of examples as text."""
        decode = self.tokenizer.decode
        return [str(decode(list(example.output_ids), skip_special_tokens=True)) for example in examples]


def read_text(path: Path, name: str) -> str:
    """The content of a UTF-8 file; `name` is the option that names it.

    Raises:
        SoftPromptError: the file is missing, empty or not UTF-8.
    """
    text = read_utf8(path, f"{name}: {path}")
    if not text.strip():
        raise SoftPromptError(f"{name}: {path} is empty, accepted is text with at least one word")
    return text


def read_queries(config: CompressConfig, text: str) -> tuple[tuple[Query, ...], tuple[Query, ...], tuple[Query, ...]]:
    """`(training, held-out, test)` queries from files and self-study.

    A training query is repeated for each of its samples. Inputs of test queries are removed before the rest is split.

    Raises:
        SoftPromptError: a query file is invalid, a test query is held out too, or no query is left for one of the first
            two sets.
    """
    test = [] if config.test is None else load_queries(config.test)
    queries = [] if config.queries is None else load_queries(config.queries)
    known = {query.input for query in queries}
    queries += [query for query in self_study(text, config.selfstudy, config.seed) if query.input not in known]
    queries = remove_held_out(queries, test)
    if config.heldout is None:
        train, heldout = hold_out(queries, config.heldout_share, config.seed)
    else:
        heldout = load_queries(config.heldout)
        tested = {query.input for query in test}
        if both := next((query.input for query in heldout if query.input in tested), None):
            raise SoftPromptError(
                f"test: {config.test} has {both[:40]!r}, which is held out too; "
                f"accepted are queries that are not in {config.heldout}"
            )
        train = remove_held_out(queries, heldout)
    if not train:
        raise SoftPromptError("queries: none is left to train on: every one is held out or a test query")
    train = [query for query in train for _ in range(config.samples if query.output is None else 1)]
    return tuple(train), tuple(heldout), tuple(test)


def load_inputs(config: CompressConfig, loaded: Loaded | None = None) -> RunInputs:
    """Load the inputs and check them. Nothing is written.

    Args:
        config: the configuration of the run.
        loaded: the model and the tokenizer that the configuration names, where several runs share them; None: they are
            loaded.

    Raises:
        SoftPromptError: an input is invalid, or two of them do not fit together.
    """
    if any("\ud800" <= character <= "\udfff" for character in str(config.output)):  # safetensors could not write there
        raise SoftPromptError(f"output: got {str(config.output)!a}, accepted is a path in UTF-8")
    text = read_text(config.context, "context")
    train, heldout, test = read_queries(config, text)
    if config.init_text is not None:
        read_text(config.init_text, "init_text")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    resolve_device(config.device)
    folder = RunFolder(config.output)
    if config.server is not None and ranks.is_first() and not folder.examples.exists():
        served_model(server_options(config))
    own_loss = load_own_loss(config.objective) if is_own(config.objective) else None
    model, tokenizer = loaded or load_model(config.model, config.dtype, config.device)
    stored = (folder.examples.exists() or folder.checkpoint.exists()) and folder.read_evaluation() is None
    chat = ChatFormat.pinned(tokenizer, folder.path / CHAT_FILE, config.template_arguments, needed=stored)
    context_ids = chat.context_ids(text).to(model.device)
    context_tokens = context_ids.shape[1]
    check_ids(model, tokenizer, context_ids[0].tolist(), "context")
    if config.init_text is not None:
        check_ids(model, tokenizer, chat.context_ids(read_text(config.init_text, "init_text"))[0].tolist(), "init_text")
    if config.tokens >= context_tokens:
        raise SoftPromptError(
            f"tokens: got {config.tokens} for a context of {context_tokens} tokens, "
            f"accepted is 1 to {context_tokens - 1}"
        )
    if config.kind == "kv" and config.init in ("matched", "strided"):
        check_fixed_frequencies(model)
    if config.compressor is not None:
        check_compressor(config.compressor, model, tokenizer, context_tokens, config.tokens)
    if config.segment_tokens is None:  # else a segment has to fit, with the prompt of those before it
        check_window(model, chat, context_tokens, (*train, *heldout, *test), config.new_tokens)
    if config.gradient_checkpointing:
        # This takes effect only in training mode. The model stays in evaluation mode, and the trainer switches the
        # layers while it needs them to recompute (see `recompute_activations`).
        model.activation_checkpointing_enable({"use_reentrant": False})
    head = head_of(model)
    objective = Objective(
        config.objective,
        head,
        config.nll_weight,
        config.beta,
        config.loss_temperature,
        config.token_weights,
        own_loss,
    )
    if own_loss is not None:
        check_own_loss(own_loss, model, head, context_ids)
    return RunInputs(config, model, tokenizer, chat, text, context_ids, train, heldout, test, objective)


def server_options(config: CompressConfig) -> ServerOptions:
    """The server of a configuration that has one."""
    assert config.server is not None
    return ServerOptions(config.server, config.server_model, config.server_timeout, config.server_requests)


def check_window(
    model: PreTrainedModel, chat: ChatFormat, context_tokens: int, queries: Sequence[Query], new_tokens: int
) -> None:
    """Check that the context, and each query with its output behind it, fits into the model's window, and that all
    tokens of the queries have an embedding.

    Raises:
        SoftPromptError: one is too long, or needs a token that the model does not have.
    """
    given = [
        (
            query,
            [*query.lead, *chat.query_ids(query.input, answered=query.output is not None)],
            None if query.output is None else chat.output_ids(query.output),
        )
        for query in queries
    ]
    for query, question, answer in given:
        check_ids(model, chat.tokenizer, [*question, *(answer or ())], f"queries: {query.input[:40]!r}")
    window = max_positions(model.config)
    if context_tokens >= window:
        raise SoftPromptError(
            f"context: got {context_tokens} tokens for a model with a window of {window}, accepted is a shorter text"
        )
    for query, question, answer in given:
        total = context_tokens + len(question) + (new_tokens if answer is None else len(answer))
        if total > window:
            raise SoftPromptError(
                f"queries: {query.input[:40]!r} needs {total} tokens with context and output, "
                f"accepted are {window}, the model's window"
            )


def sha256(text: str) -> str:
    """The SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_run(inputs: RunInputs, reporter: Reporter) -> None:
    """Check that all ranks have the same inputs. Says to the reporter that there are many.

    Raises:
        SoftPromptError: they differ; the message names a rank, and in what.
    """
    if ranks.world() == 1:
        return
    own = inputs.config.model_dump(mode="json", exclude={"device", "threads"})
    config = own | identity(inputs) | {"output": str(inputs.config.output.absolute())}
    queries = [inputs.chat.query_ids(query.input) for of_set in inputs.sets.values() for query in of_set]
    tokens = sha256(json.dumps([inputs.context_ids.tolist(), queries]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    ranks.check_same(
        {**config, "tokens of context and queries": tokens, **versions},
        "accepted are the same options, files and versions for all processes",
    )
    reporter.message(f"{ranks.world()} processes. What is shown here is the part of the first.")


def identity(inputs: RunInputs, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that decides the result of a run, JSON-able. Two runs of equal identity are the same run.

    Files, model and tokenizer count by their content.

    Args:
        inputs: of the run.
        recorded: the identity of the run that the folder holds. What means the same, and is only written in another way
            or with a default that its version did not have, is given as it is there.
    """
    recorded = recorded or {}
    without = {*WITHOUT_EFFECT}
    if inputs.config.save_best or inputs.config.patience:
        without.remove("evaluate_every")  # it decides for them
    config = inputs.config.model_dump(mode="json", exclude=without)
    for name, path in (
        ("queries", inputs.config.queries),
        ("heldout", inputs.config.heldout),
        ("test", inputs.config.test),
        ("init_text", inputs.config.init_text),
    ):
        if path is not None:
            config[name] = sha256(read_utf8(path, f"{name}: {path}"))
    if inputs.config.compressor is not None:
        config["compressor"] = digest(inputs.config.compressor)
    if inputs.objective.function is not None:
        config["objective"] += " " + source_digest(inputs.objective.function)
    config["server"] = config["server"] and "yes"  # a server may move
    config["context"] = sha256(inputs.text)
    model, tokenizer = recorded.get("model"), recorded.get("tokenizer")
    config["model"] = as_recorded(model, model_fingerprint(inputs.model, model))
    config["tokenizer"] = as_recorded(tokenizer, tokenizer_fingerprint(inputs.tokenizer, tokenizer))
    defaults = {name: field.default for name, field in CompressConfig.model_fields.items()}
    added = {name for name in defaults if recorded and name not in recorded and config.get(name) == defaults[name]}
    return {name: value for name, value in config.items() if name not in added}
