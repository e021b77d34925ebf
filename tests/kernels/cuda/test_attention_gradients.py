"""The backward of the CUDA attention kernels on csrc/simt: subsets of gradients, order of sums, memory traffic.

test_attention.py and test_attention_backward.py compare the gradients of all kinds of problems with float64.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompt_kernels.kernels.cuda.attention import HEAD_SIZES, Attention
from softprompt_kernels.kernels.cuda.native import HOST
from softprompt_kernels.kernels.problems.attention import AttentionProblem, Gradients, Needs, token_major
from softprompt_kernels.kernels.reference import attention as reference
from softprompt_kernels.kernels.reference.visibility import visibility

pytestmark = pytest.mark.simt

KERNELS = Attention(HOST)
TENSORS = ("query", "key", "value", "prompt_key", "prompt_value")
DTYPES = (torch.bfloat16, torch.float16)
ALL = Needs(True, True, True, True, True, False)
TILE = 64  # rows of a block of dQ, keys of a block of dK and dV


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    HOST.module().seed(0)


def make(dtype=torch.float16, batch=2, group=2, kv_heads=2, queries=70, rows=1, prompt=80, size=64, **options):
    """A causal problem of random numbers, with as many own keys as queries."""
    own, bank = (batch, kv_heads, queries, size), (rows, kv_heads, prompt, size)
    shapes = [(batch, kv_heads * group, queries, size), own, own, bank, bank]
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in zip(TENSORS, shapes, strict=True)}
    names = ("prompt_index", "prompt_lengths", "key_lengths", "cu_seqlens", "sinks", "window", "softcap")
    return AttentionProblem(**tensors, **{**dict.fromkeys(names), "causal": True, "scale": size**-0.5, **options})


def in_float64(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, **{name: getattr(problem, name).double() for name in TENSORS})


def output_gradients(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Gradients of out and of lse."""
    draw = torch.Generator().manual_seed(1)
    grad_out = torch.randn(problem.query.shape, generator=draw).to(problem.query.dtype)
    return token_major(grad_out), torch.randn(problem.query.shape[:3], generator=draw)


def gradients(problem: AttentionProblem, needs: Needs = ALL, with_grad_lse: bool = True) -> Gradients:
    out, lse = KERNELS.forward(problem)
    grad_out, grad_lse = output_gradients(problem)
    return KERNELS.backward(problem, out, lse, grad_out, grad_lse if with_grad_lse else None, needs)


def exact_gradients(problem: AttentionProblem) -> Gradients:
    """In float64, with a gradient of lse of 0."""
    exact = in_float64(problem)
    return reference.backward(exact, *reference.forward(exact), output_gradients(problem)[0].double(), None, ALL)


def error(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted).square().mean().sqrt().item()


def have_same_bits(left: Gradients, right: Gradients) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:5], right[:5], strict=True))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_three_times_those_of_pytorch(dtype, size):
    """Root mean square errors, compared with those of PyTorch's attention in the same dtype."""
    problem = make(dtype, queries=80, prompt=60, size=size)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in TENSORS]
    query, key, value, prompt_key, prompt_value = leaves
    keys, values = (
        torch.cat([p.expand(2, -1, -1, -1), t], 2).repeat_interleave(2, 1)
        for p, t in ((prompt_key, key), (prompt_value, value))
    )
    out = scaled_dot_product_attention(query, keys, values, torch.ones(80, 140, dtype=torch.bool).tril(60))
    pytorch = torch.autograd.grad(out, leaves, output_gradients(problem)[0])
    ours, wanted = gradients(problem, with_grad_lse=False), exact_gradients(problem)
    for name, our_gradient, pytorch_gradient, exact in zip(TENSORS, ours[:5], pytorch, wanted[:5], strict=True):
        assert error(our_gradient, exact) <= 3 * error(pytorch_gradient, exact), name


def gradients_of_rounded_weights(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """dK and dV of prompt 0 in float64, with out, P, dS and the results rounded to 16 bits, as the GEMMs need it."""
    dtype, exact = problem.query.dtype, in_float64(problem)
    prompt = problem.prompt_key.shape[2]
    keys, values = (
        torch.cat([p.expand(t.shape[0], -1, -1, -1), t], 2).repeat_interleave(problem.group, 1)
        for p, t in ((exact.prompt_key, exact.key), (exact.prompt_value, exact.value))
    )
    scores = exact.query @ keys.mT * problem.scale
    weights = scores.masked_fill(~visibility(problem).visible.unsqueeze(1), -torch.inf).softmax(-1)
    grad_out, out = output_gradients(problem)[0].double(), (weights @ values).to(dtype).double()
    grad_scores = weights * (grad_out @ values.mT - (grad_out * out).sum(-1, keepdim=True))
    pairs = ((grad_scores, exact.query * problem.scale), (weights, grad_out))
    return tuple((left.to(dtype).double().mT @ right)[:, :, :prompt].sum((0, 1)).to(dtype) for left, right in pairs)


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_gradients_of_a_batch_are_summed_in_fp32(dtype, multiprocessors, monkeypatch):
    """32 sequences, by one block and by several: at most 1.2 times the error of exact sums of weights in 16 bits.

    That error is about sqrt(2) times that of rounding the result alone: the rounding errors of terms with random signs
    add up to about the rounding error of their sum. Sums in 16 bits have a larger error, as have PyTorch's gradients.
    """
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: multiprocessors)
    problem = make(dtype, batch=32, kv_heads=1, queries=64, prompt=5)
    found, wanted = gradients(problem, with_grad_lse=False)[3:5], exact_gradients(problem)[3:5]
    for our_gradient, exact, rounded in zip(found, wanted, gradients_of_rounded_weights(problem), strict=True):
        assert error(our_gradient, exact) <= 1.2 * error(rounded, exact[0, 0])


# --- subsets of gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("wanted", range(1, 32))
def test_any_subset_of_gradients_has_the_same_bits_as_all_of_them(wanted, multiprocessors, monkeypatch):
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: multiprocessors)
    problem = make(queries=40, prompt=70, kv_heads=1)
    needs = Needs(*(bool(wanted >> i & 1) for i in range(5)), False)
    for need, found, one in zip(needs, gradients(problem, needs), gradients(problem), strict=True):
        assert (found is not None) == need
        assert found is None or torch.equal(found, one)


def test_every_gradient_is_written_completely(monkeypatch):
    """Outputs are filled with NaN first. Padding keys, and prompts that no sequence uses, have gradients of 0."""
    lengths = {"prompt_lengths": torch.tensor([20, 70, 0]), "key_lengths": torch.tensor([11, 70])}
    problem = make(rows=3, prompt_index=torch.tensor([1, 1]), **lengths)
    plain, new_empty, empty_like = gradients(problem), Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    found = gradients(problem)
    assert have_same_bits(found, plain) and not any(g.isnan().any() for g in found[:5])
    for prompt in (found.prompt_key, found.prompt_value):
        assert not prompt[[0, 2]].any() and not prompt[1, :, 70:].any() and prompt[1, :, :70].any()
    for own in (found.key, found.value):
        assert not own[0, :, 11:].any() and own[1].any()


def test_rows_without_a_key_have_gradient_zero_even_if_their_inputs_are_nan():
    """7 queries are before all keys."""
    problem = make(queries=70, prompt=0)
    problem = replace(problem, key=problem.key[:, :, 7:], value=problem.value[:, :, 7:])
    out, lse = KERNELS.forward(problem)
    assert (lse[:, :, :7] == -torch.inf).all() and (lse[:, :, 7:] != -torch.inf).all()
    grad_out, grad_lse = output_gradients(problem)
    plain = KERNELS.backward(problem, out, lse, grad_out, grad_lse, ALL)
    grad_out[:, :, :7], grad_lse[:, :, :7] = torch.nan, torch.nan
    found = KERNELS.backward(problem, out, lse, grad_out, grad_lse, ALL)
    assert have_same_bits(found, plain) and not found.query[:, :, :7].any() and found.query[:, :, 7:].any()


@pytest.mark.parametrize("view", ["expanded", "head major", "off by an element"])
def test_grad_out_may_have_any_strides(view):
    problem = make(queries=20, prompt=30)
    out, lse = KERNELS.forward(problem)
    plain = torch.ones(()).half().expand(out.shape) if view == "expanded" else output_gradients(problem)[0].contiguous()
    given = torch.empty(plain.numel() + 1).half()[1:].view(plain.shape).copy_(plain) if "off" in view else plain
    both = (given, token_major(plain.contiguous()))
    found, wanted = (KERNELS.backward(problem, out, lse, grad_out, None, ALL) for grad_out in both)
    assert have_same_bits(found, wanted)


# --- the order of sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_schedule(dtype, size):
    """A bank, three tiles of keys and of rows a sequence, shared by several blocks."""
    index = torch.tensor([1, 0, 1])
    problem = make(dtype, batch=3, group=3, kv_heads=1, queries=50, rows=2, prompt=140, size=size, prompt_index=index)
    results = []
    for seed in range(4):
        HOST.module().seed(seed)
        results.append(gradients(problem))
    assert all(have_same_bits(results[0], other) for other in results[1:])


def test_the_order_of_the_batch_changes_only_the_rounding():
    """Prompt gradients are summed in the order of the batch, as in the other backends. Own gradients are not summed."""
    index, order = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 3, 1])
    problem = make(torch.float16, batch=4, queries=30, rows=2, prompt_index=index)
    moved = replace(problem, prompt_index=index[order], **{name: getattr(problem, name)[order] for name in TENSORS[:3]})
    out, lse = KERNELS.forward(problem)
    grad_out, grad_lse = output_gradients(problem)
    plain = KERNELS.backward(problem, out, lse, grad_out, grad_lse, ALL)
    found = KERNELS.backward(moved, out[order], lse[order], grad_out[order], grad_lse[order], ALL)
    for our_gradient, one in zip(found[:3], plain[:3], strict=True):
        assert torch.equal(our_gradient, one[order])
    for our_gradient, one in zip(found[3:5], plain[3:5], strict=True):
        assert (our_gradient.float() - one.float()).abs().max() <= 2**-10 * one.abs().max()


# --- counters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counters():
    module = HOST.module()
    module.count(True)
    yield module.counters
    module.count(False)


def backward_counters(problem: AttentionProblem, counters, needs: Needs = ALL) -> dict:
    """The counters of a backward alone."""
    out, lse = KERNELS.forward(problem)
    grad_out, grad_lse = output_gradients(problem)
    HOST.module().reset_counters()
    KERNELS.backward(problem, out, lse, grad_out, grad_lse, needs)
    return counters()


def minimum_bytes(problem: AttentionProblem) -> int:
    """Minimum bytes loaded by blocks of 64 rows (dQ) and of 64 keys (dK, dV). Loads of several blocks are all counted.

    dQ: Q, O and dO once, and K and V of the keys that a row of the block sees. dK and dV: K and V once, and Q and dO of
    the rows that see a key of the block. Row r of a sequence and key head is query r // g.
    """
    batch, heads, queries, size = problem.query.shape
    kv_heads, prompt = problem.key.shape[1], problem.prompt_key.shape[2]
    visible = visibility(problem).visible.expand(batch, queries, -1).repeat_interleave(problem.group, 1)
    keys = sum(int(tile.any(1).sum()) for tile in visible.split(TILE, 1))
    segments = (visible[..., :prompt], visible[..., prompt:])
    rows = sum(int(tile.any(2).sum()) for segment in segments for tile in segment.split(TILE, 2))
    tokens = problem.prompt_key.shape[0] * prompt + batch * problem.key.shape[2]
    return 2 * size * (3 * batch * heads * queries + 2 * kv_heads * (keys + rows + tokens))


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 128, "prompt": 64},
        {"queries": 150, "prompt": 75, "group": 3},
        {"queries": 130, "prompt": 200, "group": 7, "kv_heads": 1, "causal": False},
        {"batch": 1, "queries": 520, "prompt": 70, "window": 512},
    ],
)
def test_bytes_and_conflicts(sizes, size, counters, monkeypatch):
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: 1)  # so that there are no splits
    problem = make(size=size, **sizes)
    found, (batch, heads, queries, _) = backward_counters(problem, counters), problem.query.shape
    written = 2 * sum(getattr(problem, name).numel() for name in TENSORS) + 4 * batch * heads * queries
    assert found["loaded_bytes"] <= 1.3 * minimum_bytes(problem)
    assert found["stored_bytes"] == written  # the gradients and delta, each once
    assert [found[kind] for kind in ("shared_conflicts", "matrix_conflicts", "copy_conflicts")] == [0, 0, 0]
    assert found.get("atomics", 0) == 0


@pytest.mark.parametrize("batch", [1, 5])
def test_launches_do_not_depend_on_the_batch(batch, counters):
    """dQ, then dK and dV, then the reduction of splits."""
    assert backward_counters(make(batch=batch, prompt=20), counters)["launches"] == 3


def test_only_visible_tiles_are_multiplied(counters):
    """Causal, 4 query tiles that see 1 prompt tile and 1, 2, 3 and 4 own tiles. 3 GEMMs for dQ, 4 for dK and dV."""
    problem = make(batch=1, group=1, kv_heads=1, queries=256, prompt=64)
    each = 64 * 64 * 64 // (16 * 8 * 16)
    pairs = 4 * 1 + 1 + 2 + 3 + 4
    assert backward_counters(problem, counters)["mma"] == pairs * 7 * each
    assert (
        backward_counters(problem, counters, Needs(True, False, False, False, False, False))["mma"] == pairs * 3 * each
    )
    assert backward_counters(problem, counters, Needs(False, True, True, False, False, False))["mma"] == 10 * 4 * each
    assert backward_counters(problem, counters, Needs(False, False, False, True, True, False))["mma"] == 4 * 4 * each
    assert backward_counters(problem, counters, Needs(False, False, False, False, True, False))["mma"] == 4 * 2 * each
