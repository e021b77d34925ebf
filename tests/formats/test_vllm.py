"""Requests for vLLM: what its server reads from them, and the logits of what it would then run.

`Request` and `decoded` are what vLLM 0.33 does with a body: the fields of `CompletionRequest` that are used here, with
their types (vllm/entrypoints/openai/completion/protocol.py), and `safe_load_prompt_embeds`, which decodes the tensor.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import LlamaForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.vllm import completion_request
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")  # vLLM ignores unknown fields; here they would be a mistake

    model: str | None = None
    prompt: list[Annotated[int, Field(ge=0)]] | str | list[str] | None = None
    max_tokens: int | None = 16
    temperature: float | None = None
    stop_token_ids: list[int] | None = []
    prompt_embeds: bytes | list[bytes] | None = None


def decoded(body: bytes, hidden_size: int, dtype: torch.dtype) -> Tensor:
    tensor = torch.load(io.BytesIO(base64.b64decode(body, validate=True)), weights_only=True, map_location="cpu")
    assert isinstance(tensor, Tensor)
    tensor = tensor.to_dense()
    if tensor.dim() > 2:
        tensor = tensor.squeeze(0)
    assert tensor.dim() == 2 and tensor.shape[1] == hidden_size and tensor.is_floating_point()
    return tensor.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.2)])
def test_a_request_is_what_vllm_takes_and_gives_the_same_logits(
    dtype: str,
    tolerance: float,
    embedding: EmbeddingPrompt,
    model: LlamaForCausalLM,
    plain_model: LlamaForCausalLM,
    ids: Tensor,
    logits: Callable[..., Tensor],
) -> None:
    body = completion_request(
        model, embedding, ids[0].tolist(), served_name="tiny", max_tokens=5, stop_token_ids=[2], dtype=dtype
    )
    request = Request.model_validate_json(json.dumps(body))
    assert (request.model, request.max_tokens, request.temperature, request.stop_token_ids) == ("tiny", 5, 0.0, [2])
    assert isinstance(request.prompt_embeds, bytes) and request.prompt is None
    vectors = decoded(request.prompt_embeds, 32, torch.float32)
    assert vectors.shape == (6 + 7, 32)
    with torch.no_grad():
        theirs = plain_model(inputs_embeds=vectors[None]).logits[:, 6:]
    assert (theirs - logits(embedding)).abs().max() <= tolerance


def test_the_schema_notices_a_wrong_type(embedding: EmbeddingPrompt, model: LlamaForCausalLM) -> None:
    body = completion_request(model, embedding, [1], served_name="tiny")
    for change in ({"prompt_embeds": [[0.0]]}, {"max_tokens": "many"}, {"prompt_embed": ""}):
        with pytest.raises(ValidationError):
            Request.model_validate(body | change)


def test_the_file_of_vectors_is_what_goes_into_a_request(
    embedding: EmbeddingPrompt, saved: Callable[..., Path], tmp_path: Path
) -> None:
    export(read(saved(embedding)), "vllm-embeds", tmp_path / "v.pt", dtype="float16")
    vectors = decoded(base64.b64encode((tmp_path / "v.pt").read_bytes()), 32, torch.float16)
    assert torch.equal(vectors, embedding.vectors(torch.float16))
    again = read(tmp_path / "v.pt")
    assert again.format == "vllm-embeds" and isinstance(again.prompt, EmbeddingPrompt)
    assert torch.equal(again.prompt.vectors(), vectors.float())


def test_what_vllm_cannot_serve_is_refused(
    kv: KVPrompt, embedding: EmbeddingPrompt, saved: Callable[..., Path], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(SoftPromptError, match=r"keys and values and no vectors.*Accepted is an embedding prompt"):
        export(read(saved(kv)), "vllm-embeds", tmp_path / "v.pt")
    assert not (tmp_path / "v.pt").exists()
    with pytest.raises(SoftPromptError, match="got none, accepted are the tokens of a question"):
        completion_request(model, embedding, [], served_name="tiny")
    with pytest.raises(SoftPromptError, match="got vectors of 7 numbers, accepted are those of the model: 32"):
        completion_request(model, EmbeddingPrompt(torch.zeros(2, 7)), [1], served_name="tiny")
    with pytest.raises(SoftPromptError, match="got int8 for vllm-embeds"):
        completion_request(model, embedding, [1], served_name="tiny", dtype="int8")
