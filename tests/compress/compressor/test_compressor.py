"""What a compressor reads: the keys and values of a plain run of transformers, with exact gradients."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from softprompt_kernels.compress import read_once
from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.form import Form
from softprompt_kernels.compress.compressor.lora import Lora
from softprompt_kernels.compress.compressor.segments import even_lengths, random_lengths
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prepare, prompted_hidden, shift_keys
from softprompt_kernels.prompts import Prefix
from tests.compress.compressor.conftest import TOKENS

Make = Callable[..., Compressor]
CONTEXTS = [torch.arange(7) + 60, torch.arange(5) + 90]
LENGTHS = [[4, 3], [2, 3]]


@pytest.fixture(scope="module")
def plain_model() -> PreTrainedModel:
    """A GPT-NeoX in float64, whose norms are computed in it too, with the attention of transformers."""
    config = GPTNeoXConfig(
        vocab_size=250, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).double().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def exact_model(plain_model: PreTrainedModel) -> PreTrainedModel:
    """The same, prepared."""
    model = copy.deepcopy(plain_model)
    prepare(model)
    return model


def plain_read(
    model: PreTrainedModel, summary: Tensor, context: Tensor, lengths: list[int], accumulated: bool, truncated: bool
) -> Prefix:
    """As `Compressor.read` for one context, by transformers alone: a cache that holds the state, then one forward."""
    state: list[tuple[Tensor, Tensor]] = []
    for ids in context.split(lengths):
        before = state[0][0].shape[2] if state else 0
        cache = DynamicCache()
        for layer, (key, value) in enumerate(state):
            cache.update(key.detach() if truncated else key, value.detach() if truncated else value, layer)
        rows = torch.cat((model.get_input_embeddings()(ids), summary))[None]
        positions = torch.arange(before, before + rows.shape[1])[None]
        model.base_model(inputs_embeds=rows, position_ids=positions, past_key_values=cache, use_cache=True)
        new = Prefix.of((layer.keys[:, :, -TOKENS:], layer.values[:, :, -TOKENS:]) for layer in cache.layers)
        place = before if accumulated else 0
        new = shift_keys(model, new, place - before - ids.shape[0])
        if accumulated and state:
            kept = [(k.detach(), v.detach()) if truncated else (k, v) for k, v in state]
            state = [
                (torch.cat((a, c), 2), torch.cat((b, d), 2)) for (a, b), (c, d) in zip(kept, new.layers, strict=True)
            ]
        else:
            state = list(new.layers)
    return Prefix.of(state)


@pytest.mark.parametrize(
    ("rank", "state", "graph_segments"),
    [(0, "replaced", 2), (0, "accumulated", 2), (2, "replaced", 2), (2, "replaced", 1), (2, "accumulated", 1)],
)
def test_prompts_and_gradients_are_those_of_a_plain_run(
    make_compressor: Make,
    exact_model: PreTrainedModel,
    plain_model: PreTrainedModel,
    rank: int,
    state: str,
    graph_segments: int,
) -> None:
    compressor = make_compressor(rank, state, model=exact_model)
    with compressor.reading():
        read = compressor.read(CONTEXTS, LENGTHS, graph_segments)
        got = [tensor for pair in read.layers for tensor in pair]
        direction = [torch.randn_like(tensor) for tensor in got]
        torch.autograd.backward(got, direction)
    plain = make_compressor(rank, state, model=plain_model)
    with plain.reading():
        parts = [
            plain_read(plain_model, plain.summary, context, lengths, state == "accumulated", graph_segments == 1)
            for context, lengths in zip(CONTEXTS, LENGTHS, strict=True)
        ]
        expected = [torch.cat([one.layers[i // 2][i % 2] for one in parts]) for i in range(len(got))]
        for tensor, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-9, atol=1e-9)
        torch.autograd.backward(expected, direction)
    for (name, parameter), other in zip(
        compressor.named_parameters().items(), plain.named_parameters().values(), strict=True
    ):
        if other.grad is None or not other.grad.any():  # what the last layer makes of the keys and values is not used
            assert "layers.1" in name and (parameter.grad is None or not parameter.grad.any()), name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_the_frozen_part_has_no_graph_without_lora(make_compressor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt_kernels.compress.compressor import compressor as module

    asked: list[bool] = []
    run = module.run_base
    monkeypatch.setattr(
        module, "run_base", lambda *args, **kw: (asked.append(torch.is_grad_enabled()), run(*args, **kw))[1]
    )
    compressor = make_compressor()
    with compressor.reading():
        compressor.read(CONTEXTS[:1], [[7]], 1)
        assert asked == [False, True], "segment, summary tokens"
        asked.clear()
        compressor.read(CONTEXTS[:1], [[3, 4]], 1)
    assert asked == [False, False, False, True]


def test_lora_is_off_outside_of_reading_and_leaves_no_trace(make_compressor: Make, model: PreTrainedModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    ids = torch.arange(6)[None]
    before = prompted_hidden(model, ids, None)
    compressor = make_compressor(rank=2)
    assert torch.equal(prompted_hidden(model, ids, None), before)
    with compressor.reading():
        assert not torch.equal(prompted_hidden(model, ids, None), before)
    assert torch.equal(prompted_hidden(model, ids, None), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(SoftPromptError, match="with an adapter of PEFT"):
        Lora(model, 2)
    assert compressor.lora is not None
    compressor.lora.detach()
    assert [name for name, _ in model.named_parameters()] == names
    assert not hasattr(model, "peft_config")


def test_lora_is_trained_in_fp32_behind_a_model_in_16_bits(model: PreTrainedModel) -> None:
    half = copy.deepcopy(model).bfloat16()
    lora = Lora(half, 2)
    assert {parameter.dtype for parameter in lora.named_parameters().values()} == {torch.float32}
    with lora.on():
        assert prompted_hidden(half, torch.arange(6)[None], None).dtype == torch.bfloat16
    lora.detach()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_context_alone_has_the_prompt_that_it_has_in_a_batch(make_compressor: Make) -> None:
    compressor = make_compressor(state="accumulated", segment_tokens=4)
    with torch.no_grad(), compressor.reading():
        together = compressor.read(CONTEXTS, [even_lengths(7, 4), even_lengths(5, 4)])
    for row, context in enumerate(CONTEXTS):
        alone = read_once(compressor, context)
        assert alone.length == compressor.form.prompt_tokens(len(context)) == 6
        for pair, pair_alone in zip(together.layers, alone.layers, strict=True):
            for tensor, tensor_alone in zip(pair, pair_alone, strict=True):
                torch.testing.assert_close(tensor[row : row + 1], tensor_alone, rtol=1e-4, atol=1e-5)


def test_too_many_segments_for_the_window_are_refused(make_compressor: Make) -> None:
    with pytest.raises(SoftPromptError, match=r"segment_tokens: got 2 .* window of 512, of which the state takes 897"):
        read_once(make_compressor(state="accumulated", segment_tokens=2), torch.zeros(600, dtype=torch.int64))
    with pytest.raises(ValueError, match="summary: got shape"):
        Compressor(make_compressor().model, Form(2, "replaced", 8), torch.zeros(3, 32))


def test_segments_cover_the_context() -> None:
    assert even_lengths(10, 4) == [3, 3, 4]
    assert even_lengths(4, 4) == [4]
    draw, seen = random.Random(0), set()
    for _ in range(200):
        lengths = random_lengths(10, 4, 4, draw)
        assert sum(lengths) == 10 and len(lengths) == 4 and min(lengths) >= 1 and max(lengths) <= 4
        seen.add(tuple(lengths))
    assert len(seen) > 20
    assert random_lengths(8, 4, 2, draw) == [4, 4]
