"""What the tap of a forward hands out: each layer's queries, and what attention over prefix and own tokens gives."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.models import capture, forward, prepare, prompted_hidden
from softprompt_kernels.models.capture import embed_prefix
from softprompt_kernels.models.tap import QueryTap, ScoreFunction
from softprompt_kernels.prompts import Prefix

Maker = Callable[..., PreTrainedModel]
LENGTHS = (4, 9, 6)
CONTEXT = 12


class Sink:
    """Keeps what each layer hands out."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor, ScoreFunction]] = {}

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        self.layers[layer] = (query, out, lse, scores)


@pytest.fixture
def rows(tokens: Callable[..., Tensor]) -> list[Tensor]:
    return [tokens(length, seed=length) for length in LENGTHS]


@pytest.fixture
def prepared(build: Maker, family: str, tokens: Callable[..., Tensor]) -> tuple[PreTrainedModel, Prefix, Tensor]:
    model, ids = build(family), tokens(1, CONTEXT, seed=7)
    prepare(model)
    return model, capture(model, ids), ids


def tapped(model: PreTrainedModel, ids: Tensor, prefix: Prefix | None, chosen: Tensor, mask: Tensor | None) -> Sink:
    sink = Sink()
    with torch.no_grad():
        plain = prompted_hidden(model, ids, prefix, attention_mask=mask)
        hidden = prompted_hidden(model, ids, prefix, attention_mask=mask, tap=QueryTap(chosen, sink))
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(hidden[real], plain[real], rtol=1e-5, atol=1e-5)
    return sink


def test_results_are_textbook_attention_of_the_queries(
    prepared: tuple[PreTrainedModel, Prefix, Tensor], rows: list[Tensor], family: str
) -> None:
    """Keys and values of context and own tokens come from a capture of both together."""
    model, context, ids = prepared
    own = rows[1]
    everything = capture(model, torch.cat([ids, own[None]], 1))
    sink = tapped(model, own[None], context, torch.arange(len(own)), None)
    assert sorted(sink.layers) == [0, 1]
    for index, (query, out, lse, scores) in sink.layers.items():
        key, value = (tensor[0].double() for tensor in everything.layers[index])
        group = query.shape[1] // key.shape[0]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        table = scores.scale * query.transpose(0, 1).double() @ key.mT
        if scores.softcap is not None:
            table = scores.softcap * torch.tanh(table / scores.softcap)
        distance = CONTEXT + torch.arange(len(own))[:, None] - torch.arange(CONTEXT + len(own))
        reach = math.inf if scores.window is None else scores.window
        table = table.masked_fill((distance < 0) | (distance >= reach), -math.inf)
        total = table.logsumexp(-1)
        sinks = dict(model.named_parameters()).get(f"model.layers.{index}.self_attn.sinks")
        if family == "gpt_oss":
            total = torch.logaddexp(total, sinks.double()[:, None])
        expected = (table - total[..., None]).exp() @ value
        torch.testing.assert_close(lse.T.double(), total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.transpose(0, 1).double(), expected, rtol=1e-3, atol=1e-4)
        assert lse.dtype == torch.float32


def test_score_functions_are_the_layers_own(build: Maker, tokens: Callable[..., Tensor]) -> None:
    found = {}
    for family in ("gemma2", "mistral", "llama", "qwen2"):
        model = build(family)
        prepare(model)
        sink = tapped(model, tokens(1, 3), None, torch.arange(3), None)
        found[family] = [layer[3] for layer in sink.layers.values()]
    assert found["llama"] == [ScoreFunction(8**-0.5)] * 2
    assert found["mistral"] == [ScoreFunction(8**-0.5, None, 5)] * 2, "a window that covers all keys is named too"
    assert found["gemma2"] == [ScoreFunction(6**-0.5, 2.0, 5), ScoreFunction(6**-0.5, 2.0, None)]
    assert [one.window for one in found["qwen2"]] == [5, None]


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("one", ["llama", "gemma2", "gpt2"])
def test_padding_moves_nothing(
    build: Maker,
    tokens: Callable[..., Tensor],
    padded: Callable[..., tuple[Tensor, Tensor]],
    rows: list[Tensor],
    side: str,
    packed: bool,
    one: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "packs_sequences", lambda *_: packed)
    monkeypatch.setenv("SOFTPROMPT_BACKEND", "reference")  # takes every form
    model = build(one)
    prepare(model)
    context = capture(model, tokens(1, CONTEXT, seed=7))
    alone = [tapped(model, row[None], context, torch.arange(len(row)), None) for row in rows]
    ids, mask = padded(rows, side)
    real = mask.flatten().nonzero().squeeze(1)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(2))[:11]
    sink = tapped(model, ids, context, real[order], mask)
    for layer in (0, 1):
        for part in range(3):
            expected = torch.cat([one_row.layers[layer][part] for one_row in alone])[order]
            torch.testing.assert_close(sink.layers[layer][part], expected, rtol=1e-4, atol=1e-5)


def test_no_tokens_are_handed_out_as_none(build: Maker, tokens: Callable[..., Tensor]) -> None:
    model = build("llama")
    prepare(model)
    sink = tapped(model, tokens(2, 5), None, torch.empty(0, dtype=torch.int64), None)
    assert [tuple(t.shape) for t in sink.layers[0][:3]] == [(0, 4, 8), (0, 4, 8), (0, 4)]


def test_prompts_of_different_lengths(build: Maker, tokens: Callable[..., Tensor]) -> None:
    """Each sequence behind its own prompt of a bank gives what it gives behind that prompt alone."""
    model = build("llama")
    prepare(model)
    bank = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    ids = tokens(2, 6)
    with torch.no_grad():
        together = embed_prefix(model, bank, torch.tensor([5, 3]))
        apart = [embed_prefix(model, bank[:1]), embed_prefix(model, bank[1:, :3])]
    sink = tapped(model, ids, together, torch.arange(12), None)
    for index, prefix in enumerate(apart):
        single = tapped(model, ids[index : index + 1], prefix, torch.arange(6), None)
        for part in range(3):
            got = sink.layers[1][part][6 * index : 6 * index + 6]
            torch.testing.assert_close(got, single.layers[1][part], rtol=1e-4, atol=1e-5)
