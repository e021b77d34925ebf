"""A soft prompt in vLLM, through its prompt embeddings (`vllm serve MODEL --enable-prompt-embeds`).

`POST /v1/completions` takes, in place of a text, `prompt_embeds`: base64 of what torch.save wrote for one tensor
`[tokens, d]`, the vectors of a whole sequence. vLLM reads it with `torch.load(weights_only=True)`, checks that it is a
matrix of floating-point numbers of the model's hidden size, and casts it to the model's dtype. So an embedding prompt
is served by one request that has its vectors and those of the question behind it:

    prompt_embeds = [σ ; embed(question)]    [k + M, d]

No server option, plugin or change of the model is needed. `/v1/chat/completions` takes vectors as parts of a message
(`{"type": "prompt_embeds", "data": …}`), and puts the chat template around them. A soft prompt comes before the
template, at position 0, so only `/v1/completions` can serve it, with a question that has its template already.

A KV prompt has keys and values for each layer and no vectors that would give them, so it cannot be served this way.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import Content, dtype_name, embedding_prompt
from softprompt_kernels.formats.torch_file import dense, saved_bytes
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt
from softprompt_kernels.prompts.offload import input_device, loaded
from softprompt_kernels.prompts.weights import FLOATS, to_float_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vectors_of(prompt: EmbeddingPrompt | KVPrompt, dtype: str) -> Tensor:
    """The vectors of a prompt for vLLM, `[k, d]` on the CPU.

    Args:
        prompt: an embedding prompt.
        dtype: "float32", "bfloat16" or "float16"; vLLM casts them to the dtype that it runs the model in.

    Raises:
        SoftPromptError: it is a KV prompt, or the dtype is another.
    """
    if not isinstance(prompt, EmbeddingPrompt):
        raise SoftPromptError(
            "vllm-embeds: got a KV prompt, which has keys and values and no vectors; vLLM takes vectors alone. "
            "Accepted is an embedding prompt (softprompt compress --kind embedding); `softprompt serve` serves "
            "both kinds"
        )
    if dtype not in FLOATS:
        raise SoftPromptError(f"--dtype: got {dtype} for vllm-embeds, accepted are {', '.join(FLOATS)}")
    return to_float_dtype(prompt.vectors(torch.float32).detach().cpu(), dtype)


def read(path: Path, tensor: Tensor) -> Content:
    """The vectors in a file of torch.save, `[k, d]` (or `[1, k, d]`, which vLLM takes too) in any floating dtype.

    Raises:
        SoftPromptError: they are no matrix of finite numbers.
    """
    vectors = dense(str(path), tensor)
    vectors = vectors.squeeze(0) if vectors.dim() == 3 else vectors
    return Content("vllm-embeds", embedding_prompt(str(path), vectors), "k", dtype_name(tensor))


@torch.no_grad()
def completion_request(
    model: PreTrainedModel,
    prompt: EmbeddingPrompt | KVPrompt,
    input_ids: Sequence[int],
    *,
    served_name: str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    stop_token_ids: Sequence[int] = (),
    dtype: str = "float32",
) -> dict[str, Any]:
    """The body of a request to vLLM's `/v1/completions` that answers a question behind a prompt.

    Args:
        model: the prompt's model; its embedding is read.
        prompt: an embedding prompt.
        input_ids: the tokens of the question, with its chat template, up to where the answer starts.
        served_name: the name that the server has for the model (`--served-model-name`, or the path it was given).
        max_tokens: at most so many tokens of an answer.
        temperature: of sampling, dividing the logits; 0 is greedy.
        stop_token_ids: tokens that end an answer, besides those that the server knows.
        dtype: as in `vectors_of`.

    Returns:
        A JSON object: `model`, `prompt_embeds` (base64), `max_tokens`, `temperature`, and `stop_token_ids` if there are
        any. Send it as it is, or by the openai client: `prompt_embeds` and `stop_token_ids` in `extra_body`.

    Raises:
        SoftPromptError: as in `vectors_of`; the vectors have another size than the model's; or there are no tokens.
    """
    vectors = vectors_of(prompt, dtype)
    if not input_ids:
        raise SoftPromptError("input_ids: got none, accepted are the tokens of a question")
    embedding: Any = model.get_input_embeddings()
    with loaded(embedding):
        own = embedding(torch.tensor(list(input_ids), device=input_device(model))).detach().cpu()
    if own.shape[1] != vectors.shape[1]:
        raise SoftPromptError(
            f"prompt: got vectors of {vectors.shape[1]} numbers, accepted are those of the model: {own.shape[1]}"
        )
    sequence = torch.cat((vectors, own.to(vectors.dtype)))
    body: dict[str, Any] = {
        "model": served_name,
        "prompt_embeds": base64.b64encode(saved_bytes(sequence)).decode(),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    if stop_token_ids:
        body["stop_token_ids"] = list(stop_token_ids)
    return body


def is_request(path: Path) -> bool:
    """Whether a file is the body of such a request."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and "prompt_embeds" in body
