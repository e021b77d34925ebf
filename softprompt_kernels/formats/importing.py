"""Make a saved prompt of this package from a prompt of any format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.cartridges import moved
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.inspection import fit, mapping
from softprompt_kernels.prompts import save
from softprompt_kernels.prompts.weights import StoredDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def import_prompt(
    content: Content,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    dtype: StoredDtype = "float32",
    force: bool = False,
) -> None:
    """Write a prompt as a folder of this package, with the fingerprints of the model that it is for.

    Keys are moved to positions 0..k−1 where their format has them elsewhere. Context, objective and figures are taken
    over where the file has them.

    Args:
        content: the prompt, as `files.read` gave it.
        model: prepared.
        tokenizer: the model's.
        output: the folder.
        dtype: of the stored numbers.
        force: warn where the file names other weights, instead of raising. Shapes must fit all the same.

    Raises:
        SoftPromptError: the prompt does not fit the model, its keys cannot be moved, or the folder holds something
            else.
    """
    check_fit(content, model, tokenizer, force)
    if content.format == "cartridges":
        content = moved(content, model, "k")
    save(
        output,
        content.prompt,
        model=model,
        tokenizer=tokenizer,
        dtype=dtype,
        kv_type="PREFIX_TUNING" if content.config.get("peft_type") == "PREFIX_TUNING" else "CARTRIDGE",
        context=mapping(content.record, "context"),
        objective=mapping(content.record, "objective") or {"name": f"imported from {content.format}"},
        figures=mapping(content.record, "figures"),
    )


def check_fit(content: Content, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, force: bool) -> None:
    """Raise a SoftPromptError unless a prompt fits a model; with `force`, warn where only the shapes fit."""
    reasons = fit(content, model, tokenizer)
    if not reasons:
        return
    shapes = [reason for reason in reasons if reason.startswith("shape:")]
    message = f"the prompt does not fit this model: {'; '.join(shapes or reasons)}"
    if shapes or not force:
        raise SoftPromptError(message if shapes else f"{message}; force (--force) takes it all the same")
    warnings.warn(message, stacklevel=2)
