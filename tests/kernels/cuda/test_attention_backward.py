"""The CUDA attention kernels through prompt_attention, forward and backward, on the host: errors and traffic."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompt_kernels.kernels.cuda import attention
from softprompt_kernels.kernels.cuda.native import HOST
from softprompt_kernels.ops import prompt_attention

pytestmark = pytest.mark.simt
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
    """out, lse and the gradients of the inputs, for seeded random gradients of out and lse."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in TENSORS}
    out, lse = prompt_attention(**leaves, **options, return_lse=True, backend=backend)
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(out.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (out * grad_out.to(out.dtype)).sum() + torch.where(lse == -torch.inf, 0, lse * grad_lse).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def check(given: dict[str, Tensor], dtype=torch.float16, **options) -> None:
    """The error of each result is at most 6 roundings of its largest number."""
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    exact, found = run(given, torch.float64, "reference", **options), run(given, dtype, "simt", **options)
    for name, wanted in exact.items():
        assert torch.equal(found[name] == -torch.inf, wanted == -torch.inf), name
        seen = torch.where(wanted == -torch.inf, 0, wanted)
        error = (torch.where(wanted == -torch.inf, 0, found[name].double()) - seen).abs()
        scale = seen.abs().max().clamp_min(1) if seen.numel() else 1
        assert not error.isnan().any() and (error <= 6 * ROUNDING[dtype] * scale).all(), (name, error.max(), scale)


# --- compared with float64 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", attention.HEAD_SIZES)
@pytest.mark.parametrize("schedule", range(3))
def test_four_tiles_of_rows_own_keys_and_prompt_keys(size, dtype, schedule):
    """Both buffers are refilled, and several blocks share the rows of the prompt's keys."""
    HOST.module().seed(schedule)
    check(tensors(2, 3, 1, queries=90, own=210, prompt=220, size=size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_a_few_times_those_of_pytorch(dtype):
    """Root mean square errors: at most 2 times PyTorch's for the forward, 3 times for the gradients."""
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
    pytorch = torch.autograd.grad(out, leaves, grad_out)
    exact_without_lse = run_without_lse(given, torch.float64, "reference")
    ours = run_without_lse(given, dtype, "simt")

    def error(actual, wanted):
        return (actual.double() - wanted).square().mean().sqrt().item()

    assert error(found["out"], exact["out"]) <= 2 * error(out, exact["out"])
    for our_gradient, pytorch_gradient, wanted in zip(ours, pytorch, exact_without_lse, strict=True):
        assert error(our_gradient, wanted) <= 3 * error(pytorch_gradient, wanted)


def run_without_lse(given, dtype, backend):
    leaves = [given[name].detach().to(dtype).requires_grad_() for name in TENSORS]
    out = prompt_attention(*leaves, backend=backend)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(given["query"].dtype)
    return torch.autograd.grad(out, leaves, grad_out.to(dtype))


@pytest.mark.parametrize("needed", [("query",), ("key",), ("prompt_value",), ("prompt_key", "value"), TENSORS[:3]])
def test_a_subset_of_gradients_has_the_same_bits_as_all_of_them(needed):
    given = {name: t.half() for name, t in tensors(2, 4, 2, queries=70, prompt=80).items()}
    all_gradients = run(given, torch.float16, "simt")
    leaves = {name: given[name].detach().clone().requires_grad_(name in needed) for name in TENSORS}
    HOST.module().seed(7)
    out, lse = prompt_attention(**leaves, return_lse=True, backend="simt")
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(out.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (out * grad_out.half()).sum() + (lse * grad_lse).sum()
    for name, gradient in zip(needed, torch.autograd.grad(loss, [leaves[n] for n in needed]), strict=True):
        assert torch.equal(gradient, all_gradients[f"d{name}"])


def test_prompt_gradients_are_summed_over_the_batch_in_fp32():
    """32 sequences. The error is near that of rounding the result alone. Sums in bf16 would have 8 times that.

    The rest of the error comes from weights that are rounded to 16 bits for the GEMMs, as always on tensor cores.
    """
    given = {name: t.bfloat16() for name, t in tensors(32, 2, 1, queries=4, prompt=5).items()}
    exact, found = run_without_lse(given, torch.float64, "reference"), run_without_lse(given, torch.bfloat16, "simt")
    for wanted, actual in zip(exact[3:], found[3:], strict=True):
        rounding = (wanted.bfloat16().double() - wanted).square().mean().sqrt()
        assert (actual.double() - wanted).square().mean().sqrt() <= 1.7 * rounding


# --- counters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counters():
    module = HOST.module()
    module.reset_counters()
    module.count(True)
    yield module.counters
    module.count(False)


@pytest.mark.parametrize("size", attention.HEAD_SIZES)
def test_bytes_conflicts_and_mma_of_a_forward_and_a_backward(size, counters):
    """Minimum bytes: each tensor once, except keys and values, once for each tile of 64 rows that sees them.

    For dK and dV, queries and dO count once for each tile of 64 keys. All sizes are multiples of a tile: no padding.
    """
    batch, heads, kv_heads, tokens, prompt = 2, 4, 2, 128, 64
    given = {name: t.half() for name, t in tensors(batch, heads, kv_heads, tokens, None, 1, prompt, size).items()}
    leaves = [given[name].requires_grad_() for name in TENSORS]
    out = prompt_attention(*leaves, backend="simt")
    found, row = counters(), 2 * size
    row_count = batch * heads * tokens
    # 4 row tiles of 32 tokens (g = 2 heads a token). Each sees the prompt tile and 1, 1, 2 and 2 own tiles.
    key_tiles = batch * kv_heads * (4 * 1 + 1 + 1 + 2 + 2)
    floor = row_count * row + key_tiles * 64 * 2 * row
    assert found["launches"] == 1
    assert found["loaded_bytes"] <= 1.15 * floor and found["stored_bytes"] == row_count * (row + 4)
    conflicts = ("shared_conflicts", "matrix_conflicts", "copy_conflicts")
    assert [found[kind] for kind in conflicts] == [0, 0, 0]
    assert 2 * (found["max_shared_bytes"] + 1024) <= 164 * 1024  # shared memory of a multiprocessor of sm_80
    assert found["mma"] == key_tiles * 2 * (64 * 64 * size) // (16 * 8 * 16)

    HOST.module().reset_counters()
    out.sum().backward()
    found = counters()
    row_tiles = batch * kv_heads * (4 + 2 + 4)  # that see the prompt tile, and each of the two own tiles
    keys = batch * kv_heads * tokens + kv_heads * prompt
    floor = row_count * 3 * row + key_tiles * 64 * 2 * row + row_tiles * 64 * 2 * row + keys * 2 * row
    assert found["launches"] <= 3
    assert found["max_shared_bytes"] <= 99 * 1024 and 2 * (found["max_shared_bytes"] + 1024) <= 164 * 1024
    assert found["loaded_bytes"] <= 1.3 * floor
    assert [found[kind] for kind in conflicts] == [0, 0, 0]
