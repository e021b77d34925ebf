"""Matched prompts of every family: nearer to the context than a part of it, and the same in PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.matching.match import Matching, match
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import watch
from softprompt_kernels.compress.teacher.context import select_tokens
from softprompt_kernels.compress.teacher.recording import Recording
from softprompt_kernels.compress.teacher.rows import RowRecorder, read_rows, row_bytes
from softprompt_kernels.models import capture, prepare, prompted_logits, shift_keys
from softprompt_kernels.prompts import KVPrompt, Prefix, save

CONTEXT, K = 20, 6


@torch.no_grad()
def matched(
    model: PreTrainedModel, context: Prefix, sequences: Tensor, folder: Path, tokens: int, steps: int
) -> Prefix:
    """Rows of all tokens of `sequences`, then a prompt at the positions where a sequence continues at k."""
    examples = [Example(tuple(row[:2].tolist()), tuple(row[2:].tolist())) for row in sequences]
    heads = model.config.get_text_config().num_attention_heads
    recorder = RowRecorder(folder, 10_000, row_bytes(context, heads, context.dtype), 0)
    recording = Recording(len(examples), rows=recorder)
    watch(model, context, examples, range(len(examples)), recording, SilentReporter(), "")
    recorder.close("this")
    rows = read_rows(folder, "this")
    assert rows is not None and rows.query_heads == heads
    found = match(context, rows, Matching(tokens, steps, 1), reporter=SilentReporter())
    learned_positions = model.config.model_type == "gpt2"
    return found if learned_positions else shift_keys(model, found, tokens - context.length)


def distance(model: PreTrainedModel, ids: Tensor, one: Prefix, other: Prefix) -> float:
    """Mean KL of the predictions behind two prefixes."""
    with torch.no_grad():
        p, q = (prompted_logits(model, ids, prefix).log_softmax(-1) for prefix in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_matched_prompt_has_the_same_logits_in_peft(
    build: Callable[..., PreTrainedModel], family: str, tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = build(family)
    prepare(model)
    context = capture(model, tokens(1, CONTEXT, seed=7))
    found = matched(model, context, tokens(30, 7, seed=8), tmp_path, K, steps=5)
    prompt = KVPrompt.from_prefix(found)
    assert all(tensor.isfinite().all() for pair in found.layers for tensor in pair)
    ids = tokens(2, 7, seed=9)
    with torch.no_grad():
        ours = prompted_logits(model, ids, prompt.prefix())
    plain = build(family)
    save(tmp_path / "prompt", prompt, model=plain)
    with torch.no_grad():
        peft = PeftModel.from_pretrained(plain, str(tmp_path / "prompt")).eval()(input_ids=ids).logits
    assert (peft - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("one", ["llama", "qwen3", "gpt_neox", "phi3", "gemma2", "mistral", "gpt_oss"])
def test_a_matched_prompt_is_nearer_to_the_context_than_strided_tokens(
    build: Callable[..., PreTrainedModel], one: str, tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, sequences = build(one), tokens(40, 7, seed=8)
    prepare(model)
    context = capture(model, tokens(1, CONTEXT, seed=7))
    found = matched(model, context, sequences, tmp_path, K, steps=20)
    strided = select_tokens(model, context, K, "strided")
    assert distance(model, sequences, context, found) < 0.7 * distance(model, sequences, context, strided)


def test_a_prompt_as_long_as_the_context_gives_the_contexts_logits(
    build: Callable[..., PreTrainedModel], family: str, tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, sequences = build(family), tokens(12, 7, seed=8)
    prepare(model)
    context = capture(model, tokens(1, CONTEXT, seed=7))
    found = matched(model, context, sequences, tmp_path, CONTEXT, steps=5)
    with torch.no_grad():
        torch.testing.assert_close(
            prompted_logits(model, sequences, found), prompted_logits(model, sequences, context), rtol=1e-4, atol=1e-4
        )
