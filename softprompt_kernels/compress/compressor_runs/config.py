"""The configuration of the training of a compressor: one flat list of fields, as in `compress/config.py`."""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from softprompt_kernels.compress.compressor.form import State
from softprompt_kernels.compress.config import DEVICE_HELP, DTYPE_HELP, ChatArguments, Dtype, FilePath, Integer, Number

DEFAULT_SEGMENT = 1024


class CompressorConfig(BaseModel):
    """The configuration of a compressor and of its training."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    model: str = Field(min_length=1, description="Folder of the model and its tokenizer, or its name on the hub.")
    contexts: FilePath = Field(description="Folder of texts, or JSON Lines with a text and its queries in each line.")
    output: FilePath = Field(description="Folder of the run: saved compressor, figures, cache, checkpoint.")
    template_arguments: ChatArguments | None = Field(
        None,
        description="Arguments of the chat template: a mapping of its variables to values, such as "
        '{"enable_thinking": false}.',
    )

    tokens: Integer = Field(ge=1, description="Number k of summary tokens, which is the length of a prompt.")
    state: State = Field(
        "replaced",
        description="What becomes of earlier segments. replaced: the next prompt stands for them too. accumulated: "
        "their prompts stay, so that n segments give n·k tokens.",
    )
    segment_tokens: Integer | None = Field(
        None,
        ge=1,
        description="Longest segment, in tokens. Longer contexts are read in several. Default: 1024, or half of the "
        "model's window if that is less.",
    )
    lora_rank: Integer = Field(
        0, ge=0, description="Rank of LoRA on all linear layers while the compressor reads; 0: none. Needs PEFT."
    )

    heldout_share: Number = Field(
        0.1, gt=0, lt=1, description="Share of the contexts that choose the best step and are not trained on."
    )
    test_share: Number = Field(
        0.1, gt=0, lt=1, description="Share of the contexts that are reported, and neither trained on nor chosen by."
    )
    selfstudy: Integer = Field(
        32, ge=0, description="Number of queries to generate from each context (self-study), beside its own."
    )
    new_tokens: Integer = Field(48, ge=1, description="Maximum length of a sampled answer, in tokens.")
    sample_temperature: Number = Field(1.0, ge=0, description="Temperature for sampling answers; 0 is greedy.")
    sample_batch: Integer = Field(128, ge=1, description="Most answers that are sampled at a time.")

    objective: Literal["kl", "reverse_kl", "jsd", "nll"] = Field("kl", description="Training loss, as of compress.")
    steps: Integer = Field(1000, ge=1, description="Optimiser steps.")
    batch_contexts: Integer = Field(8, ge=1, description="Contexts per step.")
    batch_queries: Integer = Field(8, ge=1, description="Queries of each context per step.")
    micro_batch_size: Integer | None = Field(
        None, ge=1, description="Sequences that go through the student at once. Default: all of a step."
    )
    segments: Integer = Field(
        2,
        ge=1,
        description="In training, a context is cut at random into up to so many segments, or as many as it needs.",
    )
    backprop_segments: Integer = Field(2, ge=1, description="The gradient goes back through the last so many segments.")
    learning_rate: Number = Field(1e-2, gt=0, description="Peak learning rate of the summary tokens.")
    lora_learning_rate: Number = Field(1e-3, gt=0, description="Peak learning rate of LoRA.")
    warmup_steps: Integer = Field(
        default_factory=lambda fields: min(20, fields.get("steps", 20)),
        ge=0,
        description="Steps of linear warm-up, followed by a cosine decay to 0. Default: 20, or steps if that is less.",
    )
    weight_decay: Number = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: Number | None = Field(1.0, gt=0, description="Clip the gradient to this norm.")

    checkpoint_every: Integer = Field(50, ge=1, description="Steps between checkpoints.")
    evaluate_every: Integer = Field(100, ge=1, description="Steps between evaluations on held-out contexts.")

    seed: Integer = Field(0, ge=0, lt=2**32, description="Seed of the split, sampling, initialisation and batches.")
    dtype: Dtype = Field("auto", description=DTYPE_HELP)
    device: str = Field("auto", pattern=r"^[a-z]+(:\d+)?$", description=DEVICE_HELP)
    threads: Integer | None = Field(None, ge=1, description="CPU threads. Default: PyTorch's number.")

    @model_validator(mode="after")
    def _check_combinations(self) -> CompressorConfig:
        if self.warmup_steps > self.steps:
            message = f"warmup_steps: got {self.warmup_steps}, accepted is at most steps={self.steps}"
            raise PydanticCustomError("combination", "{message}", {"message": message})
        if self.heldout_share + self.test_share >= 1:
            message = (
                f"test_share: got {self.test_share:g} with heldout_share={self.heldout_share:g}, accepted is less than "
                f"{1 - self.heldout_share:g}: some contexts must be left to train on"
            )
            raise PydanticCustomError("combination", "{message}", {"message": message})
        return self

    def to_yaml(self) -> str:
        """The configuration as YAML. `load_config` reads it back as an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
