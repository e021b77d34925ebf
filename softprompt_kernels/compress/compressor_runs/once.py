"""A prompt of a context in one forward pass, without queries, teacher or training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.compressor.compressor import read_once
from softprompt_kernels.compress.compressor.store import digest, load_compressor, read_form
from softprompt_kernels.compress.inputs import Loaded, read_text, sha256
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids, load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import KVPrompt, check_destination, save


@own_torch_modes()
def read_context(
    model_name: str,
    context: Path,
    compressor_dir: Path,
    output: Path,
    *,
    template_arguments: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    loaded: Loaded | None = None,
) -> dict[str, int]:
    """Read a context with a compressor, and save the prompt that it gives.

    Args:
        model_name: folder or hub name of the model that the compressor was trained for.
        context: file with the text, in UTF-8.
        compressor_dir: folder of the saved compressor.
        output: folder of the prompt. A prompt that was saved there before is replaced.
        template_arguments: of the chat template, as in `CompressConfig`; None: those of the compressor's training.
        dtype, device: as in `load_model`.
        loaded: the model and its tokenizer, from `load_model`; None: they are loaded.

    Returns:
        `{"context_tokens", "prompt_tokens"}`.

    Raises:
        SoftPromptError: bad input; nothing was written.
    """
    text = read_text(context, "context")
    check_destination(output)
    compressor_digest = digest(compressor_dir)
    if template_arguments is None:
        trained = read_form(compressor_dir)[1].get("trained")
        template_arguments = trained.get("template_arguments") if isinstance(trained, dict) else None
    model, tokenizer = loaded or load_model(model_name, dtype, device)
    ids = ChatFormat(tokenizer, template_arguments).context_ids(text)[0]
    check_ids(model, tokenizer, ids.tolist(), "context")
    compressor = load_compressor(compressor_dir, model, tokenizer)
    try:
        tokens = compressor.form.prompt_tokens(ids.shape[0])
        if tokens >= ids.shape[0]:
            raise SoftPromptError(
                f"context: got {ids.shape[0]} tokens, accepted are more than the {tokens} of the prompt that the "
                "compressor makes of it"
            )
        prefix = read_once(compressor, ids)
    finally:
        if compressor.lora is not None:
            compressor.lora.detach()
    save(
        output,
        KVPrompt.from_prefix(prefix, frozen_tokens=min(1, prefix.length - 1)),
        model=model,
        tokenizer=tokenizer,
        context={
            "sha256": sha256(text),
            "tokens": ids.shape[0],
            **({"template_arguments": dict(template_arguments)} if template_arguments else {}),
        },
        objective={"name": "read once", "steps": 0, "init": "compressor", "compressor": compressor_digest},
    )
    return {"context_tokens": ids.shape[0], "prompt_tokens": prefix.length}
