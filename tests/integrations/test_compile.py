"""torch.compile of patched models: one graph, the results of eager, and refusals at run time."""

import copy
import warnings

import pytest
import torch

from softprompt_kernels import patch


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def small(build, with_prompt):
    """`small(kind)`: an unpatched PEFT model of one layer."""
    return lambda kind: with_prompt(build("llama", num_hidden_layers=1), kind)


class _Traced(torch.nn.Module):
    """A compiled model that `assert_same_step` can use."""

    def __init__(self, model, **options):
        super().__init__()
        self.inner, self.compiled = model, torch.compile(model, fullgraph=True, **options)

    def forward(self, **inputs):
        return self.compiled(**inputs)

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)


def inputs(tokens, side=None):
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    return (
        {"input_ids": ids, "labels": ids} if side is None else {"input_ids": ids, "attention_mask": mask, "labels": ids}
    )


CASES = [("PREFIX_TUNING", "left"), ("CARTRIDGE", "right"), ("PROMPT_TUNING", None), ("PROMPT_TUNING", "left")]


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_a_patched_prompt_compiles_to_one_graph(kind, side, small, tokens, assert_same_step):
    model = patch(small(kind))
    assert_same_step(model, _Traced(model, backend="eager"), **inputs(tokens, side))


@pytest.mark.parametrize("side", [None, "left"])
def test_a_patched_transformers_model_compiles_to_one_graph(side, build, tokens, assert_same_step):
    model = patch(build("gemma3").requires_grad_(True))
    assert_same_step(model, _Traced(model, backend="eager"), **inputs(tokens, side), use_cache=False)


def test_a_second_shape(small, tokens, assert_same_step):
    model = patch(small("PREFIX_TUNING"))
    traced = _Traced(model, backend="eager")
    for length in (7, 9):
        ids = tokens(2, length)
        assert_same_step(model, traced, input_ids=ids, labels=ids)


def test_gradient_checkpointing(small, tokens, assert_same_step):
    """Its layers hand out keys and values, which ends the graph. The model runs as several graphs."""
    model = small("PROMPT_TUNING")
    patched = patch(copy.deepcopy(model)).train()
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    traced = _Traced(patched)
    traced.compiled = torch.compile(patched, backend="eager")
    assert_same_step(model, traced, **inputs(tokens, "right"))


def test_packed_sequences_are_an_error_when_the_graph_runs(build, tokens):
    compiled = torch.compile(patch(build("llama", num_hidden_layers=1)), fullgraph=True, backend="eager")
    one, two = torch.arange(6)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    compiled(tokens(1, 6), position_ids=one, use_cache=False)
    with pytest.raises(RuntimeError, match="attention mask: got packed sequences or a custom mask function, accepted"):
        compiled(tokens(1, 6), position_ids=two, use_cache=False)
