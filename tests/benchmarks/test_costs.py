"""The cost model: its terms against counts of real models, its bounds, and the page that shows its tables."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.costs.__main__ import GPUS, job, tables
from benchmarks.costs.bounds import estimate, fits, sharded
from benchmarks.costs.stages import LLAMA_8B, LLAMA_70B, Job, Model, capture, stages

TINY = Model("tiny", 3, 32, 4, 2, 8, 48, 100)


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    """A model of these shapes, with eager attention: its masked scores are counted too."""
    config = LlamaConfig(
        num_hidden_layers=TINY.layers,
        hidden_size=TINY.hidden,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        head_dim=TINY.size,
        intermediate_size=TINY.intermediate,
        vocab_size=TINY.vocabulary,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def test_weights_and_flop_of_a_context_are_those_of_a_model(tiny: LlamaForCausalLM) -> None:
    linear = [module for module in tiny.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(module.weight.numel() for module in linear) == TINY.layer_weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny.model(input_ids=torch.arange(64)[None])
    assert counter.get_total_flops() == capture(TINY, 64).flop + TINY.pair * 64**2  # the masked half


def test_a_training_step_takes_four_times_the_weights_and_three_gemms_with_the_head(tiny: LlamaForCausalLM) -> None:
    job = Job(64, 1, question=10, answer=6, steps=1, batch=2)
    for parameter in tiny.parameters():
        parameter.requires_grad_(False)
    embedded = torch.randn(2, 16, TINY.hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        tiny.model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    attention = 3 * 2 * TINY.pair * 2 * 16 * 16  # forward, and twice as much backward, over the own tokens
    [piece] = stages(TINY, job)["training"]
    prompt = 7 * TINY.pair * job.tokens * 2 * 16
    head = 3 * 2 * TINY.vocabulary * TINY.hidden * 2 * 6
    assert counter.get_total_flops() - attention == piece.flop - prompt - head


@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_70B])
def test_more_gpus_never_do_more_on_one_of_them(model: Model) -> None:
    for one, many in zip(stages(model, job(10**5)).values(), stages(model, job(10**5), 64).values(), strict=True):
        for alone, shared in zip(one, many, strict=True):
            assert shared.flop <= alone.flop and shared.bytes_moved <= alone.bytes_moved


def test_what_does_not_fit_is_said_and_what_is_sharded_exchanges() -> None:
    assert fits(LLAMA_8B, 10**5, 1) and not fits(LLAMA_8B, 10**6, max(GPUS))
    assert not fits(LLAMA_70B, 10**4, 1) and fits(LLAMA_70B, 10**4, 8)
    assert sharded(LLAMA_70B, 10**4, 8) and not sharded(LLAMA_8B, 10**5, 8)
    assert estimate(LLAMA_70B, job(10**4), 8)["training"].by == "exchange"
    assert estimate(LLAMA_8B, job(10**5), 1)["matching"].by == "GEMM"


def test_the_page_shows_these_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8")
    for name, lines in tables().items():
        assert "\n".join(lines) in page, f"table {name}: `python -m benchmarks.costs` prints another one"
