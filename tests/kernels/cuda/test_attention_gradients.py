"""The CUDA attention's backward, run on the host by csrc/simt: what is wanted, in which order sums are made, its costs.

That gradients are those of float64, for every kind of problem, stands in test_cuda_attention.py and
test_cuda_attention_backward.py.
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

pytestmark = pytest.mark.skipif(HOST.missing() is not None, reason=f"the simt backend: {HOST.missing()}")

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


def exactly(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, **{name: getattr(problem, name).double() for name in TENSORS})


def incoming(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Gradients of out and of lse."""
    draw = torch.Generator().manual_seed(1)
    grad_out = torch.randn(problem.query.shape, generator=draw).to(problem.query.dtype)
    return token_major(grad_out), torch.randn(problem.query.shape[:3], generator=draw)


def gradients(problem: AttentionProblem, needs: Needs = ALL, grad_lse: bool = True) -> Gradients:
    out, lse = KERNELS.forward(problem)
    by_out, by_lse = incoming(problem)
    return KERNELS.backward(problem, out, lse, by_out, by_lse if grad_lse else None, needs)


def exact_gradients(problem: AttentionProblem) -> Gradients:
    """In float64, without a gradient of lse."""
    exact = exactly(problem)
    return reference.backward(exact, *reference.forward(exact), incoming(problem)[0].double(), None, ALL)


def error(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted).square().mean().sqrt().item()


def same(left: Gradients, right: Gradients) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:5], right[:5], strict=True))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_three_times_those_of_pytorch(dtype, size):
    """Root mean squares against float64, of the same attention by PyTorch in the same dtype."""
    problem = make(dtype, queries=80, prompt=60, size=size)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in TENSORS]
    query, key, value, prompt_key, prompt_value = leaves
    keys, values = (
        torch.cat([p.expand(2, -1, -1, -1), t], 2).repeat_interleave(2, 1)
        for p, t in ((prompt_key, key), (prompt_value, value))
    )
    out = scaled_dot_product_attention(query, keys, values, torch.ones(80, 140, dtype=torch.bool).tril(60))
    theirs = torch.autograd.grad(out, leaves, incoming(problem)[0])
    ours, wanted = gradients(problem, grad_lse=False), exact_gradients(problem)
    for name, mine, their, exact in zip(TENSORS, ours[:5], theirs, wanted[:5], strict=True):
        assert error(mine, exact) <= 3 * error(their, exact), name


def rounded_weights(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """dK and dV of prompt 0 with nothing rounded but out, P and dS, as products of 16 bits need it, and the results."""
    dtype, exact = problem.query.dtype, exactly(problem)
    prompt = problem.prompt_key.shape[2]
    keys, values = (
        torch.cat([p.expand(t.shape[0], -1, -1, -1), t], 2).repeat_interleave(problem.group, 1)
        for p, t in ((exact.prompt_key, exact.key), (exact.prompt_value, exact.value))
    )
    scores = exact.query @ keys.mT * problem.scale
    weights = scores.masked_fill(~visibility(problem).visible.unsqueeze(1), -torch.inf).softmax(-1)
    grad_out, out = incoming(problem)[0].double(), (weights @ values).to(dtype).double()
    by_scores = weights * (grad_out @ values.mT - (grad_out * out).sum(-1, keepdim=True))
    pairs = ((by_scores, exact.query * problem.scale), (weights, grad_out))
    return tuple((left.to(dtype).double().mT @ right)[:, :, :prompt].sum((0, 1)).to(dtype) for left, right in pairs)


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_gradients_of_a_batch_are_summed_in_fp32(dtype, multiprocessors, monkeypatch):
    """32 sequences, by one block and by several: at most 1.2 times the error of exact sums of weights in 16 bits.

    That error is about sqrt(2) of rounding the result alone: terms of random signs that are each rounded have together
    as large an error as their sum has when it is rounded. Sums in 16 bits have more, and so have PyTorch's gradients.
    """
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: multiprocessors)
    problem = make(dtype, batch=32, kv_heads=1, queries=64, prompt=5)
    found, wanted = gradients(problem, grad_lse=False)[3:5], exact_gradients(problem)[3:5]
    for mine, exact, rounded in zip(found, wanted, rounded_weights(problem), strict=True):
        assert error(mine, exact) <= 1.2 * error(rounded, exact[0, 0])


# --- what is wanted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("wanted", range(1, 32))
def test_what_is_not_needed_is_not_computed_and_changes_nothing_else(wanted, multiprocessors, monkeypatch):
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: multiprocessors)
    problem = make(queries=40, prompt=70, kv_heads=1)
    needs = Needs(*(bool(wanted >> i & 1) for i in range(5)), False)
    for need, found, one in zip(needs, gradients(problem, needs), gradients(problem), strict=True):
        assert (found is not None) == need
        assert found is None or torch.equal(found, one)


def test_every_number_is_written(monkeypatch):
    """Into memory full of NaN; padding keys, and prompts that no sequence has, have gradients of 0."""
    lengths = {"prompt_lengths": torch.tensor([20, 70, 0]), "key_lengths": torch.tensor([11, 70])}
    problem = make(rows=3, prompt_index=torch.tensor([1, 1]), **lengths)
    plain, new_empty, empty_like = gradients(problem), Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    found = gradients(problem)
    assert same(found, plain) and not any(g.isnan().any() for g in found[:5])
    for prompt in (found.prompt_key, found.prompt_value):
        assert not prompt[[0, 2]].any() and not prompt[1, :, 70:].any() and prompt[1, :, :70].any()
    for own in (found.key, found.value):
        assert not own[0, :, 11:].any() and own[1].any()


def test_rows_without_a_key_have_no_gradient_whatever_comes_in():
    """7 queries stand before all keys."""
    problem = make(queries=70, prompt=0)
    problem = replace(problem, key=problem.key[:, :, 7:], value=problem.value[:, :, 7:])
    out, lse = KERNELS.forward(problem)
    assert (lse[:, :, :7] == -torch.inf).all() and (lse[:, :, 7:] != -torch.inf).all()
    by_out, by_lse = incoming(problem)
    plain = KERNELS.backward(problem, out, lse, by_out, by_lse, ALL)
    by_out[:, :, :7], by_lse[:, :, :7] = torch.nan, torch.nan
    found = KERNELS.backward(problem, out, lse, by_out, by_lse, ALL)
    assert same(found, plain) and not found.query[:, :, :7].any() and found.query[:, :, 7:].any()


@pytest.mark.parametrize("view", ["expanded", "head major", "off by an element"])
def test_gradients_of_out_of_any_strides(view):
    problem = make(queries=20, prompt=30)
    out, lse = KERNELS.forward(problem)
    plain = torch.ones(()).half().expand(out.shape) if view == "expanded" else incoming(problem)[0].contiguous()
    given = torch.empty(plain.numel() + 1).half()[1:].view(plain.shape).copy_(plain) if "off" in view else plain
    both = (given, token_major(plain.contiguous()))
    found, wanted = (KERNELS.backward(problem, out, lse, by_out, None, ALL) for by_out in both)
    assert same(found, wanted)


# --- the order of sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_change_no_bit(dtype, size):
    """Three tiles of keys and of rows a sequence, shared by several blocks, with a bank."""
    index = torch.tensor([1, 0, 1])
    problem = make(dtype, batch=3, group=3, kv_heads=1, queries=50, rows=2, prompt=140, size=size, prompt_index=index)
    results = []
    for seed in range(4):
        HOST.module().seed(seed)
        results.append(gradients(problem))
    assert all(same(results[0], other) for other in results[1:])


def test_the_order_of_the_batch_changes_only_the_rounding():
    """Prompt gradients are summed in the order of the batch, as the other backends do; own gradients are not summed."""
    index, order = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 3, 1])
    problem = make(torch.float16, batch=4, queries=30, rows=2, prompt_index=index)
    moved = replace(problem, prompt_index=index[order], **{name: getattr(problem, name)[order] for name in TENSORS[:3]})
    out, lse = KERNELS.forward(problem)
    by_out, by_lse = incoming(problem)
    plain = KERNELS.backward(problem, out, lse, by_out, by_lse, ALL)
    found = KERNELS.backward(moved, out[order], lse[order], by_out[order], by_lse[order], ALL)
    for mine, one in zip(found[:3], plain[:3], strict=True):
        assert torch.equal(mine, one[order])
    for mine, one in zip(found[3:5], plain[3:5], strict=True):
        assert (mine.float() - one.float()).abs().max() <= 2**-10 * one.abs().max()


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.fixture
def counted():
    module = HOST.module()
    module.count(True)
    yield module.counters
    module.count(False)


def costs(problem: AttentionProblem, counted, needs: Needs = ALL) -> dict:
    """Of a backward alone."""
    out, lse = KERNELS.forward(problem)
    by_out, by_lse = incoming(problem)
    HOST.module().reset_counters()
    KERNELS.backward(problem, out, lse, by_out, by_lse, needs)
    return counted()


def floor_bytes(problem: AttentionProblem) -> int:
    """Least bytes loaded by blocks of 64 rows (dQ) and of 64 keys (dK, dV) that share no load; L2 may serve the rest.

    dQ: Q, O and dO once, and K and V of what one of a block's rows sees. dK and dV: K and V once, and Q and dO of the
    rows that see one of a block's keys. Row r of a sequence and key head is query r // g.
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
def test_bytes_and_conflicts(sizes, size, counted, monkeypatch):
    monkeypatch.setattr(HOST, "multiprocessors", lambda device: 1)  # so that there are no parts
    problem = make(size=size, **sizes)
    found, (batch, heads, queries, _) = costs(problem, counted), problem.query.shape
    written = 2 * sum(getattr(problem, name).numel() for name in TENSORS) + 4 * batch * heads * queries
    assert found["loaded_bytes"] <= 1.3 * floor_bytes(problem)
    assert found["stored_bytes"] == written  # the gradients and delta, each once
    assert [found[kind] for kind in ("shared_conflicts", "matrix_conflicts", "copy_conflicts")] == [0, 0, 0]
    assert found.get("atomics", 0) == 0


@pytest.mark.parametrize("batch", [1, 5])
def test_launches_do_not_depend_on_the_batch(batch, counted):
    """dQ, dK and dV, and the sum of parts."""
    assert costs(make(batch=batch, prompt=20), counted)["launches"] == 3


def test_products_are_those_of_tiles_that_are_seen(counted):
    """Causal, 4 tiles of queries, prompt of 1 tile: 1 + (1, 2, 3, 4) pairs; 3 products for dQ, 4 for dK and dV."""
    problem = make(batch=1, group=1, kv_heads=1, queries=256, prompt=64)
    each = 64 * 64 * 64 // (16 * 8 * 16)
    pairs = 4 * 1 + 1 + 2 + 3 + 4
    assert costs(problem, counted)["products"] == pairs * 7 * each
    assert costs(problem, counted, Needs(True, False, False, False, False, False))["products"] == pairs * 3 * each
    assert costs(problem, counted, Needs(False, True, True, False, False, False))["products"] == 10 * 4 * each
    assert costs(problem, counted, Needs(False, False, False, True, True, False))["products"] == 4 * 4 * each
    assert costs(problem, counted, Needs(False, False, False, False, True, False))["products"] == 4 * 2 * each
