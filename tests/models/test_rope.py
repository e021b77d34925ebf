"""Shifted keys equal those that the model computes at the other positions, in every layer."""

import pytest
import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, prepare, prompted_logits, shift_keys
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.families import family_of, text_config
from softprompt_kernels.models.forward import run_base
from softprompt_kernels.prompts.prefix import Prefix

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


class RecordingSink:
    """Keeps the keys and values of each layer's attention."""

    def __init__(self) -> None:
        self.layers = {}

    def put(self, layer, key, value) -> None:
        self.layers[layer] = (key, value)


def capture_at(model, ids, first: int) -> Prefix:
    """Keys and values of `ids` without a prefix, with the first token at position `first`."""
    sink = RecordingSink()
    run_base(model, Call(None, sink=sink), torch.arange(first, first + ids.shape[1])[None], input_ids=ids)
    return Prefix.of(sink.layers[index] for index in range(len(sink.layers)))


@pytest.mark.parametrize("delta", [-6, 17])
def test_shift_equals_running_the_model_at_the_other_positions(rotary_family, delta, build, tokens):
    model = build(rotary_family)
    if rotary_family == "ministral3":  # exact up to this position, see `rope`
        model.config.rope_parameters["original_max_position_embeddings"] = 64
    prepare(model)
    ids = tokens(1, 9)
    got = shift_keys(model, capture_at(model, ids, 20), delta)
    expected = capture_at(model, ids, 20 + delta)
    unmoved = capture_at(model, ids, 20)
    for layer, (pair, want, before) in enumerate(zip(got.layers, expected.layers, unmoved.layers, strict=True)):
        torch.testing.assert_close(pair, want, atol=1e-5, rtol=0, msg=lambda m, layer=layer: f"layer {layer}: {m}")
        has_rotary = family_of(model).has_rotary
        moved = has_rotary is None or has_rotary(text_config(model), layer)
        assert ((pair[0] - before[0]).abs().max() > 0.1) == moved


def test_rows_can_be_shifted_by_different_numbers(build, tokens):
    model = build("llama")
    prepare(model)
    both = capture_at(model, tokens(1, 9).expand(2, -1), 20)
    got = shift_keys(model, both, torch.tensor([-6, 17]))
    for row, delta in enumerate((-6, 17)):
        alone = shift_keys(model, both, delta)
        for (key, value), (wanted, same) in zip(got.layers, alone.layers, strict=True):
            torch.testing.assert_close(key[row], wanted[row], atol=1e-6, rtol=0)
            assert value is same


def test_llama3_keys_can_be_shifted(build, tokens):
    model = build("llama", rope_parameters=LLAMA3)
    prepare(model)
    got = shift_keys(model, capture_at(model, tokens(1, 9), 0), 30)
    torch.testing.assert_close(got.layers, capture_at(model, tokens(1, 9), 30).layers, atol=1e-5, rtol=0)


def test_shifted_strided_keys_keep_their_distances_to_the_queries(build, tokens):
    # Every third key of a context of C = 30 tokens, so k = 10. Compares keys moved by k − C, with queries from position
    # k, and keys that were not moved, with queries from position C.
    model = build("llama", max_position_embeddings=128)
    prepare(model)
    context, ids = capture(model, tokens(1, 30)), tokens(2, 7)
    strided = Prefix.of((key[:, :, ::3], value[:, :, ::3]) for key, value in context.layers)
    positions = torch.arange(30, 37)[None]
    expected = run_base(model, Call(strided), positions, input_ids=ids) @ model.lm_head.weight.T
    got = prompted_logits(model, ids, shift_keys(model, strided, 10 - 30))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_opposite_shifts_cancel(build, tokens):
    model = build("gemma3").double()
    prepare(model)
    prefix = capture(model, tokens(1, 9))
    back = shift_keys(model, shift_keys(model, prefix, 1000), -1000)
    torch.testing.assert_close(back.layers, prefix.layers, atol=1e-10, rtol=0)


def test_shift_keeps_dtype_lengths_and_values_and_is_differentiable(build, tokens):
    model = build("phi3").to(torch.bfloat16)
    prepare(model)
    context = capture(model, tokens(1, 5))
    prefix = Prefix(tuple((key.requires_grad_(), value) for key, value in context.layers), torch.tensor([4]))
    moved = shift_keys(model, prefix, 3)
    assert moved.dtype == torch.bfloat16 and moved.lengths is prefix.lengths
    assert all(a[1] is b[1] for a, b in zip(moved.layers, prefix.layers, strict=True))
    moved.layers[0][0].sum().backward()
    assert bool(prefix.layers[0][0].grad.any())


def test_no_shift_is_the_same_prefix_even_with_learned_positions(build, tokens):
    model = build("gpt2")
    prepare(model)
    prefix = capture(model, tokens(1, 5))
    assert shift_keys(model, prefix, 0) is prefix


def test_shifting_learned_positions_is_refused(build, tokens):
    model = build("gpt2")
    prepare(model)
    with pytest.raises(SoftPromptError, match=r"delta: got -3 for a 'gpt2', whose positions are learned"):
        shift_keys(model, capture(model, tokens(1, 5)), -3)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_depend_on_the_length_are_refused(family, rope, build, tokens):
    model = build(family, rope_parameters=rope)
    prepare(model)
    with pytest.raises(SoftPromptError, match=rope["rope_type"]):
        shift_keys(model, capture(model, tokens(1, 5)), 3)
