"""prompt_attention against an oracle that computes one query and one key at a time."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt_kernels.ops import prompt_attention


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


CASES = {
    "plain": {},
    "one query, many keys": {"sizes": {"queries": 1, "own": 6}},
    "queries at the end of longer keys": {"sizes": {"queries": 3, "own": 7}},
    "no prompt": {"sizes": {"prompt": 0}},
    "no own keys": {"sizes": {"own": 0, "queries": 2}, "options": {"causal": False}},
    "values smaller than keys": {"sizes": {"value_size": 5}},
    "values larger than keys": {"sizes": {"value_size": 11}},
    "one prompt each": {"sizes": {"rows": 2}},
    "bank with index": {"sizes": {"rows": 3}, "options": {"prompt_index": torch.tensor([2, 0])}},
    "bank where sequences share": {
        "sizes": {"rows": 3, "batch": 3},
        "options": {"prompt_index": torch.tensor([1, 0, 1])},
    },
    "ragged bank": {"sizes": {"rows": 2}, "options": {"prompt_lengths": torch.tensor([0, 2])}},
    "ragged shared prompt": {"options": {"prompt_lengths": torch.tensor([2], dtype=torch.int32)}},
    "padded keys": {"options": {"key_lengths": torch.tensor([0, 3])}},
    "padded keys before the queries": {
        "sizes": {"queries": 2, "own": 6},
        "options": {"key_lengths": torch.tensor([3, 5])},
    },
    "not causal": {"options": {"causal": False}},
    "sinks": {"options": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 0.5], dtype=torch.float64)}},
    "sinks over rows without keys": {
        "sizes": {"prompt": 0},
        "options": {"sinks": torch.ones(4, dtype=torch.float64), "key_lengths": torch.tensor([0, 2])},
    },
    "scale": {"options": {"scale": 0.7}},
    "nine heads on three": {"sizes": {"heads": 9, "kv_heads": 3}},
    "window wider than everything": {"options": {"window": 8}},
}

NOT_IN_COMPOSED = {
    "window": {"options": {"window": 3}},
    "window of one": {"options": {"window": 1, "causal": False}},
    "window over a ragged bank": {
        "sizes": {"rows": 2},
        "options": {"window": 4, "prompt_lengths": torch.tensor([1, 3])},
    },
    "softcap": {"options": {"softcap": 0.8}},
    "more queries than keys": {"sizes": {"queries": 6, "own": 2}},
    "no own keys, causal": {"sizes": {"own": 0, "queries": 2}},
    "everything": {
        "sizes": {"rows": 2, "queries": 4, "own": 6, "value_size": 3},
        "options": {
            "window": 5,
            "softcap": 1.5,
            "prompt_lengths": torch.tensor([1, 3]),
            "key_lengths": torch.tensor([6, 4]),
            "sinks": torch.tensor([-1.0, 0.0, 2.0, 0.5], dtype=torch.float64),
        },
    },
}


def check(case, backend, attention, precision, attention_tensors, attention_oracle):
    tensors = attention_tensors(**case.get("sizes", {}), dtype=precision.dtype, grad=True)
    options = dict(case.get("options", {}))
    inputs, exact = tensors, [t.detach().double().requires_grad_() for t in tensors]
    exact_options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(precision.dtype).requires_grad_()
        exact_options["sinks"] = options["sinks"].detach().double().requires_grad_()
        inputs, exact = [*tensors, options["sinks"]], [*exact, exact_options["sinks"]]
    out, lse = attention(*tensors, **options, return_lse=True, backend=backend)
    expected_out, expected_lse = attention_oracle(*exact[:5], **exact_options)
    close(out, expected_out, precision.tolerance)
    close(lse, expected_lse, precision.tolerance)
    grad_out, grad_lse = torch.randn_like(expected_out), torch.randn_like(expected_lse)

    def gradients(out, lse, inputs):
        seen = torch.where(lse == -torch.inf, 0, lse)
        loss = (out * grad_out.to(out.dtype)).sum() + (seen * grad_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    for actual, expected in zip(gradients(out, lse, inputs), gradients(expected_out, expected_lse, exact), strict=True):
        close(actual, expected, precision.tolerance)


def params(cases):
    """Names of cases. The CUDA C++ kernels refuse those with sinks."""
    sinks = pytest.mark.refused("simt", "cuda", match="sinks is given")
    return [
        pytest.param(name, marks=sinks if "sinks" in case.get("options", {}) else ()) for name, case in cases.items()
    ]


@pytest.mark.parametrize("name", params(CASES))
def test_equals_the_oracle_with_all_gradients(
    name, backend, attention, attention_precision, attention_tensors, attention_oracle
):
    check(CASES[name], backend, attention, attention_precision, attention_tensors, attention_oracle)


@pytest.mark.parametrize("backend", ["reference", "cpu", "simt"], indirect=True)
@pytest.mark.parametrize("name", params(NOT_IN_COMPOSED))
def test_cases_that_composed_refuses_equal_the_oracle(
    name, backend, attention, attention_precision, attention_tensors, attention_oracle
):
    check(NOT_IN_COMPOSED[name], backend, attention, attention_precision, attention_tensors, attention_oracle)


@pytest.mark.refused("simt", "cuda", match="float32")
def test_packed_sequences_equal_the_same_sequences_one_by_one(backend, precision, attention_tensors):
    query, key, value, prompt_key, prompt_value = attention_tensors(
        batch=1, queries=9, own=9, rows=2, dtype=precision.dtype, grad=True
    )
    inputs = [query, key, value, prompt_key, prompt_value]
    starts, index, lengths = (
        torch.tensor([0, 4, 4, 7], dtype=torch.int32),
        torch.tensor([1, 0, 1]),
        torch.tensor([3, 2]),
    )
    out, lse = prompt_attention(
        *inputs, prompt_index=index, prompt_lengths=lengths, cu_seqlens=starts, return_lse=True, backend=backend
    )
    assert (out[:, :, 7:] == 0).all() and (lse[:, :, 7:] == -torch.inf).all()
    separate = []
    for (start, stop), row in zip(((0, 4), (4, 7)), (1, 1), strict=True):
        tokens = slice(start, stop)
        prompt = [t[row : row + 1, :, : lengths[row]] for t in (prompt_key, prompt_value)]
        separate.append(
            prompt_attention(query[:, :, tokens], key[:, :, tokens], value[:, :, tokens], *prompt, backend="reference")
        )
    expected = torch.cat(separate, 2)
    close(out[:, :, :7], expected, precision.tolerance)
    weight = torch.randn_like(out)
    actual = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight[:, :, :7]).sum(), inputs)
    for a, e in zip(actual, wanted, strict=True):
        close(a, e, precision.tolerance)


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 4), st.integers(0, 3),
    st.integers(0, 3), st.booleans(), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_composed_equals_reference_for_any_sizes(
    attention_tensors, batch, heads, queries, before, prompt, causal, padded, random
):
    own = queries + before
    tensors = attention_tensors(batch, *heads, queries, own, rows=2, prompt=prompt, size=4)
    options = {
        "causal": causal,
        "prompt_index": torch.tensor([random.randrange(2) for _ in range(batch)]),
        "prompt_lengths": torch.tensor([random.randint(0, prompt) for _ in range(2)]),
    }
    if padded:
        options["key_lengths"] = torch.tensor([random.randint(0, own) for _ in range(batch)])
    expected = prompt_attention(*tensors, **options, return_lse=True, backend="reference")
    actual = prompt_attention(*tensors, **options, return_lse=True, backend="composed")
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


def test_gradcheck_of_the_definition(attention_tensors):
    tensors = attention_tensors(rows=2, queries=2, own=3, prompt=2, size=3, value_size=2, grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attention(*inputs):
        return prompt_attention(
            *inputs[:5],
            sinks=inputs[5],
            prompt_lengths=torch.tensor([2, 1]),
            window=4,
            softcap=1.2,
            return_lse=True,
            backend="reference",
        )

    assert torch.autograd.gradcheck(attention, (*tensors, sinks))


BF16_REFUSED = (
    pytest.mark.refused("simt", "cuda", match="head sizes of query and value are 16"),
    pytest.mark.refused("triton", match="bfloat16"),
)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=BF16_REFUSED), torch.float16])
def test_16_bits_are_no_worse_than_pytorch(dtype, backend, attention, attention_tensors, attention_oracle):
    """out has at most 2 times the error of PyTorch's attention on concatenated keys, the gradients 3 times."""
    tensors = attention_tensors(batch=4, queries=12, own=12, prompt=8, size=16, dtype=dtype, grad=True)
    grad_out = torch.randn(4, 4, 12, 16, dtype=torch.float64).to(dtype)

    def concatenated(query, key, value, prompt_key, prompt_value):
        keys = torch.cat([prompt_key.expand(4, -1, -1, -1), key], 2).repeat_interleave(2, 1)
        values = torch.cat([prompt_value.expand(4, -1, -1, -1), value], 2).repeat_interleave(2, 1)
        mask = torch.ones(12, 20, dtype=torch.bool).tril(8)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    def run(function, inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]

    exact = run(lambda *t: attention_oracle(*t)[0], [t.detach().double().requires_grad_() for t in tensors])
    ours = run(lambda *t: attention(*t, backend=backend), tensors)
    theirs = run(concatenated, tensors)
    for position, (e, o, t) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert o.dtype == dtype
        allowed = (3 if position else 2) * (t.double() - e).norm()
        assert (o.double() - e).norm() <= allowed


def test_out_has_the_memory_layout_that_the_output_projection_reads(backend, attention_precision, attention_tensors):
    out = prompt_attention(*attention_tensors(size=64, dtype=attention_precision.dtype), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


def test_frozen_inputs_get_no_gradient(backend, attention, attention_precision, attention_tensors):
    tensors = attention_tensors(dtype=attention_precision.dtype)
    tensors[1].requires_grad_()
    attention(*tensors, backend=backend).sum().backward()
    assert tensors[1].grad is not None
    assert all(t.grad is None for i, t in enumerate(tensors) if i != 1)
