"""The C++ attention at sizes that fill its tiles and leave tails, against the float64 definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt_kernels.ops import prompt_attention

pytestmark = pytest.mark.usefixtures("module")


def made(shapes, dtype=torch.float32, grad=True):
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


def shapes(batch, heads, kv_heads, queries, own, prompts, prompt, size, value_size=None):
    value_size = value_size or size
    return [
        (batch, heads, queries, size),
        (batch, kv_heads, own, size),
        (batch, kv_heads, own, value_size),
        (prompts, kv_heads, prompt, size),
        (prompts, kv_heads, prompt, value_size),
    ]


def run(inputs, backend, grad_out, grad_lse=None, **options):
    """out, lse and all gradients."""
    out, lse = prompt_attention(*inputs, **options, return_lse=True, backend=backend)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        loss = loss + (torch.where(lse == -torch.inf, 0, lse) * grad_lse.to(lse.dtype)).sum()
    differentiated = [*inputs, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, differentiated)]


def exact(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


def agree(actual, expected, tolerance=3e-5):
    """Within `tolerance` of the largest number of each tensor, but at least of 1; infinities in the same places."""
    for a, e in zip(actual, expected, strict=True):
        finite = e[e.isfinite()]
        size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * size)


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1)]),
    batch=st.integers(1, 4),
    queries=st.sampled_from([1, 2, 17, 63, 64, 65, 130]),
    before=st.sampled_from([0, 0, 1, 7, 64]),
    prompt=st.sampled_from([0, 1, 31, 64, 65, 200]),
    sizes=st.sampled_from([(8, 8), (20, 7), (64, 64), (80, 64), (96, 96)]),
    window=st.sampled_from([None, None, 1, 5, 70]),
    softcap=st.sampled_from([None, 3.0]),
    causal=st.booleans(),
    ragged=st.booleans(),
    sunk=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_definition_at_any_size(
    heads, batch, queries, before, prompt, sizes, window, softcap, causal, ragged, sunk, threads, seed
):
    torch.manual_seed(seed)
    own = queries + before
    inputs = made(shapes(batch, *heads, queries, own, 2, prompt, *sizes))
    options = {"window": window, "softcap": softcap, "causal": causal, "prompt_index": torch.randint(2, (batch,))}
    if ragged:
        options["prompt_lengths"] = torch.randint(prompt + 1, (2,))
        options["key_lengths"] = torch.randint(own + 1, (batch,))
    sinks = torch.randn(heads[0]) if sunk else None
    grad_out, grad_lse = torch.randn(batch, heads[0], queries, sizes[1]), torch.randn(batch, heads[0], queries)
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(inputs, "cpu", grad_out, grad_lse, **options, sinks=_leaf(sinks, torch.float32))
    finally:
        torch.set_num_threads(count)
    wanted = run(exact(inputs), "reference", grad_out, grad_lse, **options, sinks=_leaf(sinks, torch.float64))
    agree(found, wanted)


def _leaf(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).requires_grad_()


def test_packed_sequences_at_sizes_with_tails():
    torch.manual_seed(0)
    inputs = made(shapes(1, 6, 2, 300, 300, 3, 70, 64))
    options = {
        "cu_seqlens": torch.tensor([0, 1, 130, 130, 260]),
        "prompt_index": torch.tensor([2, 0, 1, 0]),
        "prompt_lengths": torch.tensor([70, 0, 33]),
    }
    grad_out, grad_lse = torch.randn(1, 6, 300, 64), torch.randn(1, 6, 300)
    agree(
        run(inputs, "cpu", grad_out, grad_lse, **options),
        run(exact(inputs), "reference", grad_out, grad_lse, **options),
    )


@pytest.mark.parametrize("window", [None, 3000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_behind_a_long_prompt(threads, window, count):
    """One sequence, one key head, two rows: several threads take parts of the prompt, and a sink counts once."""
    threads(count)
    torch.manual_seed(0)
    inputs = made(shapes(1, 2, 1, 1, 3, 1, 4000, 64))
    grad_out, sinks = torch.randn(1, 2, 1, 64), torch.randn(2)
    options = {"window": window, "prompt_lengths": torch.tensor([3900])}
    agree(
        run(inputs, "cpu", grad_out, torch.ones(1, 2, 1), **options, sinks=_leaf(sinks, torch.float32)),
        run(exact(inputs), "reference", grad_out, torch.ones(1, 2, 1), **options, sinks=_leaf(sinks, torch.float64)),
    )


def test_scores_that_grow_along_the_keys_move_the_base():
    """Later keys dwarf earlier ones: what was summed before has to be scaled down, in the end to nothing."""
    torch.manual_seed(0)
    inputs = made(shapes(1, 2, 1, 200, 200, 1, 200, 16))
    with torch.no_grad():
        inputs[0].fill_(1.0)
        for tensor, base in ((inputs[3], 0.0), (inputs[1], 200.0)):
            tensor.copy_((base + torch.arange(200.0)[:, None].expand(200, 16)) * 0.05)
    grad_out = torch.randn(1, 2, 200, 16)
    agree(run(inputs, "cpu", grad_out), run(exact(inputs), "reference", grad_out), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4, 6, 2, 96, 96, 1, 80, 64), (2, 3, 3, 130, 130, 1, 40, 80)])
def test_errors_are_no_worse_than_twice_pytorch_s(dtype, sizes):
    """Against float64, and three times for gradients: PyTorch's attention in that dtype over concatenated keys."""
    torch.manual_seed(0)
    inputs = made(shapes(*sizes), dtype)
    batch, heads, kv_heads, queries, own, _, prompt, size = sizes
    grad_out = torch.randn(batch, heads, queries, size).to(dtype)
    mask = torch.ones(queries, prompt + own, dtype=torch.bool).tril(prompt)

    def concatenated(query, key, value, prompt_key, prompt_value):
        pairs = ((prompt_key, key), (prompt_value, value))
        keys, values = (torch.cat([p.expand(batch, -1, -1, -1), t], 2) for p, t in pairs)
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    theirs = concatenated(*inputs)
    theirs = [theirs, *torch.autograd.grad(theirs, inputs, grad_out)]
    ours = run(inputs, "cpu", grad_out)
    wanted = run(exact(inputs), "reference", grad_out)
    del ours[1], wanted[1]  # PyTorch gives no lse
    for position, (o, t, w) in enumerate(zip(ours, theirs, wanted, strict=True)):
        assert o.dtype == dtype
        assert (o.double() - w).norm() <= (3 if position else 2) * (t.double() - w).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompt_gradients_of_32_sequences_are_as_good_as_rounded_once(dtype):
    torch.manual_seed(0)
    inputs = made(shapes(32, 9, 3, 40, 40, 1, 48, 64), dtype)
    grad_out = torch.randn(32, 9, 40, 64).to(dtype)
    found, wanted = run(inputs, "cpu", grad_out)[5:], run(exact(inputs), "reference", grad_out)[5:]
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w).norm() <= 1.2 * (w.to(dtype).double() - w).norm()


def test_the_same_bits_in_every_run_with_as_many_threads(threads):
    torch.manual_seed(0)
    inputs = made(shapes(5, 6, 2, 70, 70, 2, 90, 64))
    options = {"prompt_index": torch.tensor([1, 0, 1, 1, 0]), "sinks": torch.randn(6, requires_grad=True)}
    grad_out = torch.randn(5, 6, 70, 64)
    for count in (1, 2, 3, 7):
        threads(count)
        first = run(inputs, "cpu", grad_out, **options)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, "cpu", grad_out, **options), strict=True))


def test_strides_of_projections_and_of_expanded_tensors():
    """[B, M, H, D] memory, every second key, a prompt without a unit last stride, a gradient of stride 0."""
    torch.manual_seed(0)
    packed = torch.randn(2, 70, 8 * (4 + 2 + 2))
    query, key, value = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in packed.split([32, 16, 16], 2))
    prompt = torch.randn(1, 2, 8, 33).transpose(2, 3)
    views = [query[:, :, ::2], key[:, :, ::2], value[:, :, ::2], prompt, prompt]
    dense = [t.contiguous().requires_grad_() for t in views]
    views = [t.detach().requires_grad_() for t in views]
    outs = [prompt_attention(*inputs, backend="cpu") for inputs in (views, dense)]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(out.sum(), inputs) for out, inputs in zip(outs, (views, dense), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_of_some_inputs_are_those_of_all():
    """What is not needed is left out in other ways for each choice of inputs."""
    torch.manual_seed(0)
    sizes = shapes(3, 4, 2, 70, 70, 1, 40, 16)
    full = made(sizes)
    grad_out = torch.randn(3, 4, 70, 16)
    wanted = run(full, "cpu", grad_out)[2:]
    for chosen in ([0], [1], [2, 3], [3, 4], [4], [0, 4], [1, 2]):
        inputs = [t.detach().clone().requires_grad_(i in chosen) for i, t in enumerate(full)]
        out = prompt_attention(*inputs, backend="cpu")
        found = torch.autograd.grad(out, [inputs[i] for i in chosen], grad_out)
        for i, gradient in zip(chosen, found, strict=True):
            torch.testing.assert_close(gradient, wanted[i], rtol=1e-5, atol=1e-5)


def test_heads_larger_than_any_block_of_scores():
    torch.manual_seed(0)
    inputs = made(shapes(1, 2, 1, 3, 3, 1, 4, 300, 6400))
    grad_out = torch.randn(1, 2, 3, 6400)
    agree(run(inputs, "cpu", grad_out), run(exact(inputs), "reference", grad_out), 1e-4)


@pytest.mark.parametrize("bits", [0x7FC00000, -1, -4194303])
def test_nan_in_a_query_shows_in_lse_and_gradients(bits):
    """A row of NaN is not one that sees no key; whatever the bits of the NaN are."""
    torch.manual_seed(0)
    inputs = made(shapes(1, 2, 1, 8, 8, 1, 4, 16))
    with torch.no_grad():
        inputs[0][0, 1, 5, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, lse, *gradients = run(inputs, "cpu", torch.ones(1, 2, 8, 16))
    assert out[0, 1, 5].isnan().all() and lse[0, 1, 5].isnan()
    assert out.isnan().sum() == 16 and lse.isnan().sum() == 1
    by_query, by_key, _, by_prompt, _ = gradients
    assert by_query[0, 1, 5].isnan().all() and by_key.isnan().any() and by_prompt.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(dtype, scale):
    torch.manual_seed(0)
    inputs = made(shapes(2, 4, 2, 40, 40, 1, 30, 32), dtype)
    grad_out = torch.randn(2, 4, 40, 32).to(dtype)
    wanted = run(exact(inputs), "reference", grad_out, scale=scale)
    agree(run(inputs, "cpu", grad_out, scale=scale), wanted, 3e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_of_a_sequence_stays_with_it(dtype, position):
    """Of 40 rows each, which fill no tiles: they share some with their neighbours, but nothing except the prompt."""
    torch.manual_seed(0)
    inputs = made(shapes(5, 4, 2, 20, 20, 1, 30, 48), dtype)
    grad_out = torch.randn(5, 4, 20, 48).to(dtype)
    clean = run(inputs, "cpu", grad_out)
    with torch.no_grad():
        inputs[position][2, :, 7] = torch.nan
    found = run(inputs, "cpu", grad_out)
    others = torch.arange(5) != 2
    for a, b in zip(found[:5], clean[:5], strict=True):  # out, lse, and the gradients of what is not shared
        assert torch.equal(a[others], b[others])
    assert found[0][2].isnan().any()


def test_a_sink_that_takes_everything():
    torch.manual_seed(0)
    inputs = made(shapes(1, 2, 1, 3, 3, 1, 4, 8), grad=False)
    sinks = torch.tensor([torch.inf, 0.0])
    found = prompt_attention(*inputs, sinks=sinks, return_lse=True, backend="cpu")
    wanted = prompt_attention(*exact(inputs), sinks=sinks, return_lse=True, backend="reference")
    agree([t.detach() for t in found], [t.detach() for t in wanted])


def test_no_query_heads_leave_gradients_of_zero():
    inputs = made(shapes(1, 0, 2, 3, 3, 1, 4, 8))
    out = prompt_attention(*inputs, backend="cpu")
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))
