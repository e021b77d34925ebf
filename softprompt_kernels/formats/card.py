"""The model card of a prompt: README.md with the hub's metadata, written by huggingface_hub.

It says what the prompt is, how to use it here and in PEFT, what it was made from (a digest, never the text), its
figures and its limits. What the record does not say is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from shlex import quote
from typing import Any

from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.inspection import mapping
from softprompt_kernels.prompts import EmbeddingPrompt

TAGS = ("soft-prompt", "context-compression", "softprompt-kernels")
FIGURES = {
    "kl_prompt": "KL of the prompt from the full context, nats per token",
    "kl_none": "KL without context, nats per token",
    "recovered": "recovered, 1 − KL / KL without context",
    "top1_agreement": "top-1 agreement with the full context",
    "kl_truncated": "KL of the context cut to the same length",
    "tokens": "tokens that this was measured on",
}


def card_text(content: Content, dtype: str, repository: str) -> str:
    """The text of README.md.

    Args:
        content: the prompt and its record.
        dtype: that of the stored numbers.
        repository: what the commands of the page call the prompt.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = content.base_model
    readable = dtype != "int8"
    data = ModelCardData(
        base_model=base,
        library_name="peft" if readable else None,
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model_relation="adapter" if base else None,
    )
    body = "\n\n".join(sections(content, dtype, repository, readable))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def sections(content: Content, dtype: str, repository: str, readable: bool) -> Iterator[str]:
    """The parts of the page, in order."""
    prompt, record = content.prompt, content.record
    context, objective, figures = (mapping(record, name) for name in ("context", "objective", "figures"))
    name = " ".join((content.base_model or "").split())
    base = f"`{name}`" if name else "one model"
    kind = "vectors" if isinstance(prompt, EmbeddingPrompt) else "keys and values"
    yield f"# A soft prompt of {prompt.length} tokens for {base}"
    replaced = f" of {context['tokens']} tokens" if isinstance(context.get("tokens"), int) else ""
    yield (
        f"The model reads these {prompt.length} learned tokens ({kind}, {dtype}) in place of a text{replaced}, and "
        "then answers nearly as if it had the text. The weights of the model stay as they are. "
        "Made with softprompt-kernels."
    )
    name = name or "MODEL"
    yield "## Use"
    yield (
        "With softprompt-kernels (download the repository first, for example with `hf download`):\n\n"
        f'```bash\nsoftprompt generate --model {quote(name)} --prompt {quote(repository)} "your question"\n```'
    )
    if readable:
        yield (
            "With PEFT:\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({text_of(name)})\n"
            f"model = PeftModel.from_pretrained(model, {text_of(repository)})\n```\n\n"
            "Questions need the chat template of the model, without the part that comes before the context."
        )
    else:
        yield "PEFT cannot read a prompt in 8 bits. `softprompt export --to peft` makes one that it can read."
    yield "## Made from"
    yield "\n".join(f"- {line}" for line in origin(context, objective)) or "The record of the prompt does not say."
    if rows := [(text, figures[key]) for key, text in FIGURES.items() if isinstance(figures.get(key), (int, float))]:
        yield "## Measured"
        table = "\n".join(f"| {text} | {value:.4g} |" for text, value in rows)
        yield f"On held-out queries, in float32:\n\n| figure | value |\n|---|---|\n{table}"
    yield "## Limits"
    yield (
        "- It works with exactly these weights. Another checkpoint of the same shape loads, and gives nonsense.\n"
        "- It can lose details of its text, and answers that sound sure can be wrong. Try your own questions first.\n"
        "- What the text says can be asked out of it. Share it as you would share the text."
    )


def origin(context: dict[str, Any], objective: dict[str, Any]) -> Iterator[str]:
    """What is known of the text and of the training."""
    if isinstance(context.get("sha256"), str):
        yield f"a text with the SHA-256 `{context['sha256']}`"
    if isinstance(context.get("contexts"), list):
        yield f"{len(context['contexts'])} texts, whose prompts were joined"
    if isinstance(context.get("tokens"), int):
        yield f"{context['tokens']} tokens of the model"
    if objective:
        yield "objective: " + " ".join(", ".join(f"{key} {value}" for key, value in objective.items()).split())


def text_of(name: str) -> str:
    """A name as a literal of Python."""
    return json.dumps(name, ensure_ascii=False)
