"""The CUDA attention kernels through the op, forward and backward, on the host: gradients, their errors and costs."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompt_kernels.kernels.cuda import attention
from softprompt_kernels.kernels.cuda.native import HOST
from softprompt_kernels.ops import prompt_attention

pytestmark = pytest.mark.skipif(HOST.missing() is not None, reason=f"the simt backend: {HOST.missing()}")
TENSORS = ("query", "key", "value", "prompt_key", "prompt_value")
DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    HOST.module().seed(0)


def tensors(batch=2, heads=4, kv_heads=2, queries=5, own=None, rows=1, prompt=3, size=64):
    own = queries if own is None else own
    shapes = [(batch, heads, queries, size), *[(batch, kv_heads, own, size)] * 2, *[(rows, kv_heads, prompt, size)] * 2]
    return {name: torch.randn(shape) for name, shape in zip(TENSORS, shapes, strict=True)}


def run(given: dict[str, Tensor], dtype, backend, **options) -> dict[str, Tensor]:
    """out, lse and the gradients, by those of both, which are drawn from a seed."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in TENSORS}
    out, lse = prompt_attention(**leaves, **options, return_lse=True, backend=backend)
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(out.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (out * grad_out.to(out.dtype)).sum() + torch.where(lse == -torch.inf, 0, lse * grad_lse).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def check(given: dict[str, Tensor], dtype=torch.float16, **options) -> None:
    """Within a few roundings of the largest number of each result."""
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    exact, found = run(given, torch.float64, "reference", **options), run(given, dtype, "simt", **options)
    for name, wanted in exact.items():
        assert torch.equal(found[name] == -torch.inf, wanted == -torch.inf), name
        seen = torch.where(wanted == -torch.inf, 0, wanted)
        error = (torch.where(wanted == -torch.inf, 0, found[name].double()) - seen).abs()
        scale = seen.abs().max().clamp_min(1) if seen.numel() else 1
        assert not error.isnan().any() and (error <= 6 * ROUNDING[dtype] * scale).all(), (name, error.max(), scale)


# --- against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", attention.HEAD_SIZES)
@pytest.mark.parametrize("schedule", range(3))
def test_four_tiles_of_each_kind(size, dtype, schedule):
    """Each of the two buffers is filled anew, and the rows of the prompt's keys are shared by several blocks."""
    HOST.module().seed(schedule)
    check(tensors(2, 3, 1, queries=90, own=210, prompt=220, size=size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_no_larger_than_those_of_pytorch(dtype):
    """Root mean squares: forward at most 2 times, gradients 3 times that of the same attention by PyTorch."""
    given = {name: t.to(dtype) for name, t in tensors(2, 4, 2, queries=80, prompt=60).items()}
    exact, found = run(given, torch.float64, "reference"), run(given, dtype, "simt")
    query, key, value, prompt_key, prompt_value = leaves = [given[name].clone().requires_grad_() for name in TENSORS]
    keys, values = (
        torch.cat([p.expand(2, -1, -1, -1), t], 2).repeat_interleave(2, 1)
        for p, t in ((prompt_key, key), (prompt_value, value))
    )
    mask = torch.ones(80, 140, dtype=torch.bool).tril(60)
    out = scaled_dot_product_attention(query, keys, values, mask)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = torch.autograd.grad(out, leaves, grad_out)
    exact_without_lse = run_without_lse(given, torch.float64, "reference")
    ours = run_without_lse(given, dtype, "simt")

    def error(actual, wanted):
        return (actual.double() - wanted).square().mean().sqrt().item()

    assert error(found["out"], exact["out"]) <= 2 * error(out, exact["out"])
    for mine, their, wanted in zip(ours, theirs, exact_without_lse, strict=True):
        assert error(mine, wanted) <= 3 * error(their, wanted)


def run_without_lse(given, dtype, backend):
    leaves = [given[name].detach().to(dtype).requires_grad_() for name in TENSORS]
    out = prompt_attention(*leaves, backend=backend)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(given["query"].dtype)
    return torch.autograd.grad(out, leaves, grad_out.to(dtype))


@pytest.mark.parametrize("needed", [("query",), ("key",), ("prompt_value",), ("prompt_key", "value"), TENSORS[:3]])
def test_gradients_that_are_wanted_are_those_of_all_and_runs_repeat_bit_for_bit(needed):
    given = {name: t.half() for name, t in tensors(2, 4, 2, queries=70, prompt=80).items()}
    every = run(given, torch.float16, "simt")
    leaves = {name: given[name].detach().clone().requires_grad_(name in needed) for name in TENSORS}
    HOST.module().seed(7)
    out, lse = prompt_attention(**leaves, return_lse=True, backend="simt")
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(out.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (out * grad_out.half()).sum() + (lse * grad_lse).sum()
    for name, gradient in zip(needed, torch.autograd.grad(loss, [leaves[n] for n in needed]), strict=True):
        assert torch.equal(gradient, every[f"d{name}"])


def test_a_prompt_gradient_is_summed_over_the_batch_in_fp32():
    """32 sequences, and an error near that of rounding the result alone; sums in bf16 would have 8 times that.

    What is beyond it comes of weights that are rounded to 16 bits for the products, as everywhere on tensor cores.
    """
    given = {name: t.bfloat16() for name, t in tensors(32, 2, 1, queries=4, prompt=5).items()}
    exact, found = run_without_lse(given, torch.float64, "reference"), run_without_lse(given, torch.bfloat16, "simt")
    for wanted, actual in zip(exact[3:], found[3:], strict=True):
        rounding = (wanted.bfloat16().double() - wanted).square().mean().sqrt()
        assert (actual.double() - wanted).square().mean().sqrt() <= 1.7 * rounding


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.fixture
def counted():
    module = HOST.module()
    module.reset_counters()
    module.count(True)
    yield module.counters
    module.count(False)


@pytest.mark.parametrize("size", attention.HEAD_SIZES)
def test_bytes_conflicts_and_products_of_a_forward_and_a_backward(size, counted):
    """Floor: each tensor once, but keys and values once for each tile of 64 rows that sees them, and for the gradients
    by keys queries and dO once for each tile of 64 keys. Tiles are whole here, so the floor is that of the mask."""
    batch, heads, kv_heads, tokens, prompt = 2, 4, 2, 128, 64
    given = {name: t.half() for name, t in tensors(batch, heads, kv_heads, tokens, None, 1, prompt, size).items()}
    leaves = [given[name].requires_grad_() for name in TENSORS]
    out = prompt_attention(*leaves, backend="simt")
    found, row = counted(), 2 * size
    rows_of = batch * heads * tokens
    # Tiles of rows (of g = 2 heads a token) and their own tiles of keys: 4 of 32 tokens each, seeing 1, 1, 2 and 2.
    key_tiles = batch * kv_heads * (4 * 1 + 1 + 1 + 2 + 2)
    floor = rows_of * row + key_tiles * 64 * 2 * row
    assert found["launches"] == 1
    assert found["loaded_bytes"] <= 1.15 * floor and found["stored_bytes"] == rows_of * (row + 4)
    conflicts = ("shared_conflicts", "matrix_conflicts", "copy_conflicts")
    assert [found[kind] for kind in conflicts] == [0, 0, 0]
    assert 2 * (found["most_shared_bytes"] + 1024) <= 164 * 1024  # of a multiprocessor of sm_80
    assert found["products"] == key_tiles * 2 * (64 * 64 * size) // (16 * 8 * 16)

    HOST.module().reset_counters()
    out.sum().backward()
    found = counted()
    row_tiles = batch * kv_heads * (4 + 2 + 4)  # that see the tile of the prompt, and the two tiles of own keys
    keys = batch * kv_heads * tokens + kv_heads * prompt
    floor = rows_of * 3 * row + key_tiles * 64 * 2 * row + row_tiles * 64 * 2 * row + keys * 2 * row
    assert found["launches"] <= 3
    assert found["most_shared_bytes"] <= 99 * 1024 and 2 * (found["most_shared_bytes"] + 1024) <= 164 * 1024
    assert found["loaded_bytes"] <= 1.3 * floor
    assert [found[kind] for kind in conflicts] == [0, 0, 0]
