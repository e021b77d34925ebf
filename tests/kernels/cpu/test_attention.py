"""The C++ attention at sizes that fill its tiles and leave tails, against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt_kernels.ops import prompt_attention

pytestmark = pytest.mark.usefixtures("module")


def random_tensors(shapes, dtype=torch.float32, grad=True):
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
    """out, lse and the gradients of all inputs and options that require one."""
    out, lse = prompt_attention(*inputs, **options, return_lse=True, backend=backend)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        loss = loss + (torch.where(lse == -torch.inf, 0, lse) * grad_lse.to(lse.dtype)).sum()
    differentiated = [*inputs, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, differentiated)]


def in_float64(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


def assert_close(actual, expected, tolerance=3e-5):
    """Each tensor within `tolerance` times its largest number or 1, and with infinities in the same places."""
    for a, e in zip(actual, expected, strict=True):
        finite = e[e.isfinite()]
        size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * size)


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1)]),
    batch=st.integers(1, 4),
    queries=st.sampled_from([1, 2, 17, 63, 64, 65, 130]),
    cached=st.sampled_from([0, 0, 1, 7, 64]),
    prompt=st.sampled_from([0, 1, 31, 64, 65, 200]),
    sizes=st.sampled_from([(8, 8), (20, 7), (64, 64), (80, 64), (96, 96)]),
    window=st.sampled_from([None, None, 1, 5, 70]),
    softcap=st.sampled_from([None, 3.0]),
    causal=st.booleans(),
    ragged=st.booleans(),
    with_sinks=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_reference_at_any_size(
    heads, batch, queries, cached, prompt, sizes, window, softcap, causal, ragged, with_sinks, threads, seed
):
    torch.manual_seed(seed)
    own = queries + cached
    inputs = random_tensors(shapes(batch, *heads, queries, own, 2, prompt, *sizes))
    options = {"window": window, "softcap": softcap, "causal": causal, "prompt_index": torch.randint(2, (batch,))}
    if ragged:
        options["prompt_lengths"] = torch.randint(prompt + 1, (2,))
        options["key_lengths"] = torch.randint(own + 1, (batch,))
    sinks = torch.randn(heads[0]) if with_sinks else None
    grad_out, grad_lse = torch.randn(batch, heads[0], queries, sizes[1]), torch.randn(batch, heads[0], queries)
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(inputs, "cpu", grad_out, grad_lse, **options, sinks=leaf(sinks, torch.float32))
    finally:
        torch.set_num_threads(count)
    wanted = run(in_float64(inputs), "reference", grad_out, grad_lse, **options, sinks=leaf(sinks, torch.float64))
    assert_close(found, wanted)


def leaf(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).requires_grad_()


def test_packed_sequences_at_sizes_with_tails():
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 6, 2, 300, 300, 3, 70, 64))
    options = {
        "cu_seqlens": torch.tensor([0, 1, 130, 130, 260]),
        "prompt_index": torch.tensor([2, 0, 1, 0]),
        "prompt_lengths": torch.tensor([70, 0, 33]),
    }
    grad_out, grad_lse = torch.randn(1, 6, 300, 64), torch.randn(1, 6, 300)
    assert_close(
        run(inputs, "cpu", grad_out, grad_lse, **options),
        run(in_float64(inputs), "reference", grad_out, grad_lse, **options),
    )


@pytest.mark.parametrize("window", [None, 3000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_after_a_long_prompt(threads, window, count):
    """One sequence, one key head, two rows: threads split the prompt, and the sink is counted once."""
    threads(count)
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 2, 1, 1, 3, 1, 4000, 64))
    grad_out, sinks = torch.randn(1, 2, 1, 64), torch.randn(2)
    options = {"window": window, "prompt_lengths": torch.tensor([3900])}
    grad_lse = torch.ones(1, 2, 1)
    assert_close(
        run(inputs, "cpu", grad_out, grad_lse, **options, sinks=leaf(sinks, torch.float32)),
        run(in_float64(inputs), "reference", grad_out, grad_lse, **options, sinks=leaf(sinks, torch.float64)),
    )


def test_growing_scores_raise_the_row_max():
    """Scores grow along the keys, so that earlier sums are scaled down, in the end to 0."""
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 2, 1, 200, 200, 1, 200, 16))
    with torch.no_grad():
        inputs[0].fill_(1.0)
        for tensor, base in ((inputs[3], 0.0), (inputs[1], 200.0)):
            tensor.copy_((base + torch.arange(200.0)[:, None].expand(200, 16)) * 0.05)
    grad_out = torch.randn(1, 2, 200, 16)
    assert_close(run(inputs, "cpu", grad_out), run(in_float64(inputs), "reference", grad_out), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4, 6, 2, 96, 96, 1, 80, 64), (2, 3, 3, 130, 130, 1, 40, 80)])
def test_error_is_at_most_twice_that_of_pytorch(dtype, sizes):
    """Both against float64, and PyTorch in that dtype over concatenated keys. Three times its error for gradients."""
    torch.manual_seed(0)
    inputs = random_tensors(shapes(*sizes), dtype)
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
    wanted = run(in_float64(inputs), "reference", grad_out)
    del ours[1], wanted[1]  # PyTorch returns no lse
    for position, (o, t, w) in enumerate(zip(ours, theirs, wanted, strict=True)):
        assert o.dtype == dtype
        assert (o.double() - w).norm() <= (3 if position else 2) * (t.double() - w).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompt_gradients_of_32_sequences_have_the_error_of_one_rounding(dtype):
    torch.manual_seed(0)
    inputs = random_tensors(shapes(32, 9, 3, 40, 40, 1, 48, 64), dtype)
    grad_out = torch.randn(32, 9, 40, 64).to(dtype)
    found, wanted = run(inputs, "cpu", grad_out)[5:], run(in_float64(inputs), "reference", grad_out)[5:]
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() - w).norm() <= 1.2 * (w.to(dtype).double() - w).norm()


def test_same_bits_in_every_run_with_the_same_number_of_threads(threads):
    torch.manual_seed(0)
    inputs = random_tensors(shapes(5, 6, 2, 70, 70, 2, 90, 64))
    options = {"prompt_index": torch.tensor([1, 0, 1, 1, 0]), "sinks": torch.randn(6, requires_grad=True)}
    grad_out = torch.randn(5, 6, 70, 64)
    for count in (1, 2, 3, 7):
        threads(count)
        first = run(inputs, "cpu", grad_out, **options)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, "cpu", grad_out, **options), strict=True))


def test_any_strides_equal_contiguous_copies():
    """Memory as [B, M, H, D], every second token, a prompt without a last stride of 1, a gradient of stride 0."""
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


def test_gradients_of_some_inputs_equal_those_of_a_full_backward():
    """Each choice of inputs skips other work."""
    torch.manual_seed(0)
    sizes = shapes(3, 4, 2, 70, 70, 1, 40, 16)
    full = random_tensors(sizes)
    grad_out = torch.randn(3, 4, 70, 16)
    wanted = run(full, "cpu", grad_out)[2:]
    for chosen in ([0], [1], [2, 3], [3, 4], [4], [0, 4], [1, 2]):
        inputs = [t.detach().clone().requires_grad_(i in chosen) for i, t in enumerate(full)]
        out = prompt_attention(*inputs, backend="cpu")
        found = torch.autograd.grad(out, [inputs[i] for i in chosen], grad_out)
        for i, gradient in zip(chosen, found, strict=True):
            torch.testing.assert_close(gradient, wanted[i], rtol=1e-5, atol=1e-5)


def test_heads_larger_than_a_block_of_scores():
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 2, 1, 3, 3, 1, 4, 300, 6400))
    grad_out = torch.randn(1, 2, 3, 6400)
    assert_close(run(inputs, "cpu", grad_out), run(in_float64(inputs), "reference", grad_out), 1e-4)


@pytest.mark.parametrize("bits", [0x7FC00000, -1, -4194303])
def test_nan_in_a_query_is_nan_in_lse_and_gradients(bits):
    """A row of NaN is not taken for a row that sees no key, whatever the bits of the NaN are."""
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 2, 1, 8, 8, 1, 4, 16))
    with torch.no_grad():
        inputs[0][0, 1, 5, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, lse, *gradients = run(inputs, "cpu", torch.ones(1, 2, 8, 16))
    assert out[0, 1, 5].isnan().all() and lse[0, 1, 5].isnan()
    assert out.isnan().sum() == 16 and lse.isnan().sum() == 1
    dq, dk, _, dprompt_key, _ = gradients
    assert dq[0, 1, 5].isnan().all() and dk.isnan().any() and dprompt_key.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(dtype, scale):
    torch.manual_seed(0)
    inputs = random_tensors(shapes(2, 4, 2, 40, 40, 1, 30, 32), dtype)
    grad_out = torch.randn(2, 4, 40, 32).to(dtype)
    wanted = run(in_float64(inputs), "reference", grad_out, scale=scale)
    assert_close(run(inputs, "cpu", grad_out, scale=scale), wanted, 3e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_in_one_sequence_does_not_change_the_others(dtype, position):
    """Sequences of 40 rows do not fill a tile, so neighbours share tiles. Of their data they share only the prompt."""
    torch.manual_seed(0)
    inputs = random_tensors(shapes(5, 4, 2, 20, 20, 1, 30, 48), dtype)
    grad_out = torch.randn(5, 4, 20, 48).to(dtype)
    clean = run(inputs, "cpu", grad_out)
    with torch.no_grad():
        inputs[position][2, :, 7] = torch.nan
    found = run(inputs, "cpu", grad_out)
    others = torch.arange(5) != 2
    for a, b in zip(found[:5], clean[:5], strict=True):  # out, lse, and the gradients of query, key and value
        assert torch.equal(a[others], b[others])
    assert found[0][2].isnan().any()


def test_an_infinite_sink():
    torch.manual_seed(0)
    inputs = random_tensors(shapes(1, 2, 1, 3, 3, 1, 4, 8), grad=False)
    sinks = torch.tensor([torch.inf, 0.0])
    found = prompt_attention(*inputs, sinks=sinks, return_lse=True, backend="cpu")
    wanted = prompt_attention(*in_float64(inputs), sinks=sinks, return_lse=True, backend="reference")
    assert_close([t.detach() for t in found], [t.detach() for t in wanted])


def test_without_query_heads_gradients_are_zero():
    inputs = random_tensors(shapes(1, 0, 2, 3, 3, 1, 4, 8))
    out = prompt_attention(*inputs, backend="cpu")
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))
