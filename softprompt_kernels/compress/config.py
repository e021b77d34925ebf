"""The configuration of a run: one flat list of fields, which are the keys of the YAML file and the options of the CLI.

A field means the same in both places, and an option overrides the file. Relative paths, also those in the file, start
at the current folder. This module checks what can be checked without reading files or models. The rest (a text is not
empty, k is less than the length of the context) is checked by the code that reads them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class ConfigLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML would silently keep the last one, and reads dates as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if keys[index] in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{keys[index]} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _refuse_bool(value: Any) -> Any:
    """YAML's `on` and `yes` are not numbers, although Python's True equals 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool", "a bool is not a number")
    return value


def _refuse_empty_path(value: Any) -> Any:
    """An empty path would mean the current folder."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("empty_path", "an empty path")
    return value


def _expand_home(value: Path) -> Path:
    """The path without `~`. Python raises for the home of a user that does not exist."""
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("no_home", "a home folder that does not exist") from error


def _parse_mapping(value: Any) -> Any:
    """A mapping may be given as text, as on the command line: JSON, which is YAML too."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, Loader=ConfigLoader)  # a SafeLoader
    except Exception as error:  # PyYAML's errors, and those of Python that it lets through
        raise PydanticCustomError("mapping", "not a mapping") from error


OBJECTIVES = ("kl", "reverse_kl", "jsd", "nll")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_own(objective: str) -> bool:
    """Whether an objective names a function of the user, "package.module:function"."""
    return ":" in objective


def _parse_objective(value: Any) -> Any:
    """A name, or a function in place of the name that it can be imported by."""
    if callable(value):
        name = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
        found: Any = sys.modules.get(name.partition(":")[0])
        for part in name.partition(":")[2].split("."):
            found = getattr(found, part, None)
        if found is not value:
            raise PydanticCustomError(
                "combination",
                "objective: {name} cannot be found by its name, accepted is a function at the top level of a module",
                {"name": name},
            )
        return name
    if isinstance(value, str) and (value in OBJECTIVES or _FUNCTION.fullmatch(value)):
        return value
    raise PydanticCustomError("objective", "not an objective")


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
FilePath = Annotated[Path, BeforeValidator(_refuse_empty_path), AfterValidator(_expand_home)]
ChatArguments = Annotated[dict[str, JsonValue], BeforeValidator(_parse_mapping)]
Kind = Literal["kv", "embedding"]
Init = Literal["matched", "strided", "first", "text", "vocabulary", "random", "compressor"]
Objective = Annotated[str, BeforeValidator(_parse_objective)]
TokenWeights = Literal["uniform", "entropy", "student"]
State = Literal["replaced", "accumulated"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "8bit", "4bit"]
KeptDtype = Literal["auto", "float32", "bfloat16", "float16"]

WITHOUT_SEGMENTS = (
    "server",  # knows no prompt of the segments before
    "rounds",
    "save_best",  # what is held out of one segment does not say what is left of those before
    "patience",
    "context_dtype",
    "context_memory",
    "contexts_together",
    "converged",
)
"""Fields that a compression in segments does not have."""

DTYPE_HELP = (
    "Dtype of the model. auto: float32 on a CPU, as stored on a GPU. 8bit, 4bit: weights quantised by torchao or "
    "bitsandbytes, which compute as with auto. Needs the extra quantize."
)
DEVICE_HELP = "auto, cpu, cuda, cuda:1, ... split: the layers over all GPUs, the rest in the CPU's memory and on disk."


class CompressConfig(BaseModel):
    """The configuration of a run: model and context, the prompt, the queries, the objective, training, evaluation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    model: str = Field(min_length=1, description="Folder of the model and its tokenizer, or its name on the hub.")
    context: FilePath = Field(
        description="File with the text to compress, in UTF-8. A folder or a file of JSON Lines (.jsonl) has many "
        "contexts, and each gets a prompt."
    )
    output: FilePath = Field(description="Folder of the run: saved prompt, figures, cache, checkpoint.")

    template_arguments: ChatArguments | None = Field(
        None,
        description="Arguments of the chat template: a mapping of its variables to values, such as "
        '{"enable_thinking": false}.',
    )

    kind: Kind = Field(
        "kv",
        description="kv: keys and values of every layer (prefix tuning). embedding: input embeddings (prompt tuning).",
    )
    tokens: Integer = Field(ge=1, description="Length k of the soft prompt, in tokens; less than that of the context.")
    init: Init = Field(
        default_factory=lambda fields: "matched" if fields.get("kind", "kv") == "kv" else "strided",
        description="How the prompt is initialised. matched: fitted to the attention of the teacher, layer by layer. "
        "strided: k tokens spread evenly over the context. first: its first k tokens. text: the text of "
        "--init-text. vocabulary: random tokens. random: noise. compressor: read once by that of --compressor. "
        "Default: matched for kv, strided for embedding.",
    )
    init_text: FilePath | None = Field(None, description="File with the text for init=text, in UTF-8.")
    compressor: FilePath | None = Field(
        None, description="Folder of a compressor for init=compressor, from train-compressor."
    )
    matching_rows: Integer = Field(
        6144,
        ge=1,
        description="Tokens of the queries and answers that init=matched fits, in every layer. Long prompts need more.",
    )
    matching_steps: Integer = Field(
        300, ge=0, description="Refinement steps of init=matched. 0: the closed form alone."
    )
    frozen_tokens: Integer | None = Field(
        None,
        ge=0,
        description="First tokens of the prompt that are not trained (the attention sink). "
        "Default: 1 for kv, 0 for embedding.",
    )

    segment_tokens: Integer | None = Field(
        None,
        ge=2,
        description="Compress segment by segment, for a text of any length: most tokens of a segment. The model reads "
        "each behind the prompt of those before. Default: the whole text at once.",
    )
    state: State = Field(
        "replaced",
        description="With --segment-tokens. replaced: one prompt of k tokens stands for all segments so far. "
        "accumulated: k more tokens for each segment.",
    )
    replay: Integer = Field(
        256,
        ge=0,
        description="With --segment-tokens: most queries about earlier segments that each segment is trained on too, "
        "so that they are not forgotten.",
    )

    queries: FilePath | None = Field(
        None, description='File of training queries: JSON Lines of {"input": ..., "output": ...}; output is optional.'
    )
    heldout: FilePath | None = Field(
        None, description="File of held-out queries, as --queries. Without it, a share of the queries is held out."
    )
    test: FilePath | None = Field(
        None, description="File of test queries, as --queries; never used for training or choosing, reported once."
    )
    heldout_share: Number = Field(0.1, gt=0, lt=1, description="Share of the queries to hold out without --heldout.")
    selfstudy: Integer = Field(256, ge=0, description="Number of queries to generate from the context (self-study).")
    samples: Integer = Field(1, ge=1, description="Answers sampled for each training query without an output.")
    new_tokens: Integer = Field(48, ge=1, description="Maximum length of a sampled answer, in tokens.")
    sample_temperature: Number = Field(1.0, ge=0, description="Temperature for sampling answers; 0 is greedy.")
    sample_batch: Integer = Field(128, ge=1, description="Most answers that are sampled at a time.")

    server: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Address of a server with OpenAI's protocol that holds the same model, such as "
        "http://localhost:8000/v1. It writes the teacher's answers. Needs the extra server. The key is read from "
        "OPENAI_API_KEY.",
    )
    server_model: str | None = Field(
        None, min_length=1, description="The server's name of the model. Default: the only one that it has."
    )
    server_requests: Integer = Field(16, ge=1, description="Most requests to the server at a time.")
    server_timeout: Number = Field(120.0, gt=0, description="Seconds that a request to the server may take.")

    objective: Objective = Field(
        "kl",
        description="Training loss. kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: generalised "
        "Jensen-Shannon divergence. nll: negative log-likelihood of the answers. package.module:function: a loss of "
        "your own, which is imported and run.",
    )
    token_weights: TokenWeights = Field(
        "uniform",
        description="Weights of the tokens in the loss. entropy: the teacher's entropy. student: less for tokens on "
        "which the student is near the teacher already; not for nll.",
    )
    nll_weight: Number = Field(
        0.0, ge=0, le=1, description="Weight of the NLL in a mixture with objective kl: (1 - w) KL + w NLL."
    )
    beta: Number = Field(
        0.5, ge=1e-4, le=1 - 1e-4, description="Weight of the teacher in the mixture of objective jsd."
    )
    loss_temperature: Number = Field(
        1.0, gt=0, description="Divides the logits of student and teacher in the loss, as in distillation."
    )

    rounds: Integer = Field(
        0,
        ge=0,
        description="On-policy rounds: so many times during training the student answers the training queries, the "
        "teacher reads the answers, and training goes on with both.",
    )
    student_share: Number = Field(
        0.5, gt=0, le=1, description="Share of the student's answers in the training after a round."
    )
    steps: Integer = Field(
        200, ge=0, description="Optimiser steps of the training end to end. 0: the prompt stays as it is initialised."
    )
    batch_size: Integer = Field(8, ge=1, description="Sequences per step.")
    micro_batch_size: Integer | None = Field(
        None,
        ge=1,
        description="Sequences per forward and backward pass. A smaller value saves memory; the gradient is the same. "
        "Default: batch_size.",
    )
    learning_rate: Number = Field(
        default_factory=lambda fields: 5e-3 if fields.get("init") in ("matched", "compressor") else 2e-2,
        gt=0,
        description="Peak learning rate. Default: 5e-3 with init=matched or compressor, else 2e-2.",
    )
    relative_learning_rate: bool = Field(
        True,
        description="The learning rate of a kv prompt counts in standard deviations of each head's keys and values. "
        "false: it is absolute.",
    )
    warmup_steps: Integer = Field(
        default_factory=lambda fields: min(5, fields.get("steps", 5)),
        ge=0,
        description="Steps of linear warm-up, followed by a cosine decay to 0. Default: 5, or steps if that is less.",
    )
    weight_decay: Number = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: Number | None = Field(
        None, gt=0, description="Clip the gradient to this norm. Default: no clipping."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    contexts_together: Integer = Field(
        32, ge=1, description="Of many contexts, so many train in one batch. The others follow."
    )
    converged: Number = Field(
        0.01,
        ge=0,
        lt=1,
        description="Of many contexts, one leaves the training when its loss is below this share of the KL without "
        "context. 0: none leaves. Only for the plain KL.",
    )

    checkpoint_every: Integer = Field(25, ge=1, description="Steps between checkpoints.")
    evaluate_every: Integer = Field(
        0, ge=0, description="Steps between held-out evaluations. 0: only before and after training."
    )
    keep_checkpoints: Integer = Field(
        1, ge=1, description="Checkpoints to keep. If the newest is damaged, the run goes on from the one before it."
    )
    save_best: bool = Field(
        False,
        description="Save the prompt of the lowest held-out KL, of the evaluations during training and the prompt "
        "before it, and not that of the last step. Needs evaluate_every.",
    )
    patience: Integer = Field(
        0,
        ge=0,
        description="Stop training when so many held-out evaluations in a row are not below the best one. The schedule "
        "of the learning rate keeps its length. Needs evaluate_every. 0: train to the last step.",
    )
    evaluation_sequences: Integer = Field(
        24, ge=1, description="Number of training sequences to evaluate. Held-out sequences are all evaluated."
    )

    context_dtype: KeptDtype = Field(
        "auto",
        description="Dtype of the context's stored keys and values. auto: that of the model. 16 bits round them.",
    )
    context_memory: Number | None = Field(
        None,
        ge=0,
        description="GiB of memory for the context's keys and values. If they need more, they are kept on disk, which "
        "changes no result. Default: half of what is free.",
    )

    seed: Integer = Field(0, ge=0, lt=2**32, description="Seed of sampling, split, initialisation and batch order.")
    dtype: Dtype = Field("auto", description=DTYPE_HELP)
    device: str = Field("auto", pattern=r"^[a-z]+(:\d+)?$", description=DEVICE_HELP)
    threads: Integer | None = Field(None, ge=1, description="CPU threads. Default: PyTorch's number.")
    track: Literal["tensorboard", "wandb"] | None = Field(
        None, description="Log every step and the final figures to this service too. Needs the extra tracking."
    )

    @property
    def frozen(self) -> int:
        """`frozen_tokens`, or its default, which leaves at least one token to train."""
        if self.frozen_tokens is not None:
            return self.frozen_tokens
        return min(1, self.tokens - 1) if self.kind == "kv" else 0

    @model_validator(mode="after")
    def _check_combinations(self) -> CompressConfig:
        for holds, message in (
            (
                self.frozen < self.tokens,
                f"frozen_tokens: got {self.frozen}, accepted is less than tokens={self.tokens}",
            ),
            (self.init != "text" or self.init_text, "init_text: missing, but init=text needs it"),
            (
                self.init != "matched" or self.kind == "kv",
                f"init: got matched with kind={self.kind}, accepted are strided, first, text, vocabulary and random",
            ),
            (
                self.init != "compressor" or (self.kind == "kv" and self.compressor),
                f"compressor: got {self.compressor} with kind={self.kind}, accepted with init=compressor is a folder, "
                "and kind=kv",
            ),
            (
                self.init == "compressor" or not self.compressor,
                f"compressor: given, but init={self.init} does not use it",
            ),
            (self.init == "text" or not self.init_text, f"init_text: given, but init={self.init} does not use it"),
            (
                self.nll_weight == 0 or self.objective == "kl",
                f"nll_weight: got {self.nll_weight:g}, accepted with objective={self.objective} is 0",
            ),
            (
                self.beta == 0.5 or self.objective == "jsd",
                f"beta: got {self.beta:g}, accepted with objective={self.objective} is 0.5: only jsd uses it",
            ),
            (
                self.token_weights != "student" or (self.objective != "nll" and self.nll_weight == 0),
                f"token_weights: got student with objective={self.objective} and nll_weight={self.nll_weight:g}, "
                "accepted are uniform and entropy: an NLL does not say what the student has already",
            ),
            (
                self.rounds == 0 or (self.objective != "nll" and self.nll_weight == 0),
                f"rounds: got {self.rounds} with objective={self.objective} and nll_weight={self.nll_weight:g}, "
                "accepted is 0: what the student samples is no label to learn from",
            ),
            (
                self.rounds == 0 or self.rounds < self.steps,
                f"rounds: got {self.rounds}, accepted is less than steps={self.steps}",
            ),
            (
                self.student_share == 0.5 or self.rounds,
                f"student_share: got {self.student_share:g}, accepted with rounds=0 is 0.5: only rounds use it",
            ),
            *(
                (
                    self.server or getattr(self, name) == type(self).model_fields[name].default,
                    f"{name}: got {getattr(self, name)} without a server, accepted is none: only a server uses it",
                )
                for name in ("server_model", "server_requests", "server_timeout")
            ),
            (
                self.queries or self.selfstudy or self.context.suffix.lower() == ".jsonl",  # which may have its own
                "queries: missing, and selfstudy=0 generates none",
            ),
            (
                self.segment_tokens is not None or (self.state == "replaced" and self.replay == 256),
                f"state, replay: got {self.state} and {self.replay}, accepted without segment_tokens are replaced and "
                "256: only segments use them",
            ),
            (
                self.segment_tokens is None or self.segment_tokens > self.tokens,
                f"segment_tokens: got {self.segment_tokens}, accepted is more than tokens={self.tokens}",
            ),
            (
                self.segment_tokens is None or (self.kind == "kv" and self.init in ("matched", "strided", "first")),
                f"segment_tokens: got kind={self.kind} and init={self.init}, accepted are kind=kv and init=matched, "
                "strided or first",
            ),
            *(
                (
                    self.segment_tokens is None or getattr(self, name) == type(self).model_fields[name].default,
                    f"{name}: got {getattr(self, name)} with segment_tokens, accepted is its default: segments do not "
                    "use it",
                )
                for name in WITHOUT_SEGMENTS
            ),
            *(
                (
                    not value or self.evaluate_every,
                    f"{name}: got {str(value).lower()}, but evaluate_every=0 evaluates nothing during training",
                )
                for name, value in (("save_best", self.save_best), ("patience", self.patience))
            ),
            (
                (self.micro_batch_size or 1) <= self.batch_size,
                f"micro_batch_size: got {self.micro_batch_size}, accepted is at most batch_size={self.batch_size}",
            ),
            (
                self.steps == 0 or self.warmup_steps <= self.steps,
                f"warmup_steps: got {self.warmup_steps}, accepted is at most steps={self.steps}",
            ),
        ):
            if not holds:
                raise PydanticCustomError("combination", "{message}", {"message": message})
        return self

    def to_yaml(self) -> str:
        """The configuration as YAML. `load_config` reads it back as an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def accepted(name: str, of: type[BaseModel] = CompressConfig) -> str:
    """The accepted values of a field, in words.

    Args:
        name: of the field.
        of: the configuration that it belongs to.
    """
    field: FieldInfo = of.model_fields[name]
    type_name, bounds = _type_name(field.annotation), []
    if name == "template_arguments":
        return "a mapping of names to JSON values"
    if name == "objective" and of is CompressConfig:
        return f"one of {', '.join(OBJECTIVES)}, or package.module:function"
    if name == "server":
        return "an address that begins with http:// or https://"
    if name == "device":
        return "auto, cpu, cuda, cuda:1, split or similar"
    for bound in field.metadata + [item for part in get_args(field.annotation) for item in _metadata(part)]:
        for kind, attribute, text in ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<")):
            if isinstance(bound, kind):
                bounds.append(f"{text} {getattr(bound, attribute)}")
    return " ".join((type_name, " and ".join(bounds))).rstrip()


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    if annotation in names:
        return names[annotation]
    return next((_type_name(part) for part in get_args(annotation) if part is not type(None)), "a value")
