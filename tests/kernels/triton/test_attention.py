"""The Triton attention kernels in Triton's interpreter: against float64, at the ends of tiles, with every split."""

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs, empty_output
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.attention import prompt_attention as attention
from softprompt_kernels.kernels.triton.compile import shipped_configurations
from softprompt_kernels.kernels.triton.targets import TARGETS
from softprompt_kernels.ops import prompt_attention

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(runtime.missing() is not None, reason=f"the triton backend: {runtime.missing()}"),
]
TENSORS = ("query", "key", "value", "prompt_key", "prompt_value")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def target(monkeypatch):
    """`target(name)` makes the kernels plan for that GPU."""
    return lambda name: monkeypatch.setattr(attention, "target_of", lambda device: TARGETS[name])


def tensors(batch=2, heads=4, kv_heads=2, queries=5, own=None, rows=1, prompt=3, size=16, value_size=None):
    own, value_size = queries if own is None else own, value_size or size
    return {
        "query": torch.randn(batch, heads, queries, size),
        "key": torch.randn(batch, kv_heads, own, size),
        "value": torch.randn(batch, kv_heads, own, value_size),
        "prompt_key": torch.randn(rows, kv_heads, prompt, size),
        "prompt_value": torch.randn(rows, kv_heads, prompt, value_size),
    }


def run(given: dict[str, Tensor], dtype, backend, **options) -> dict[str, Tensor]:
    """out, lse and the gradients of a loss with random gradients by out and lse, from a fixed seed."""
    leaves = {name: given[name].to(dtype).requires_grad_() for name in TENSORS}
    arguments = dict(leaves)
    if options.get("sinks") is not None:
        leaves["sinks"] = options["sinks"] = options["sinks"].to(dtype).requires_grad_()
    out, lse = prompt_attention(**arguments, **options, return_lse=True, backend=backend)
    draw = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(out.shape, generator=draw), torch.randn(lse.shape, generator=draw)
    loss = (out * grad_out.to(out.dtype)).sum() + torch.where(lse == -torch.inf, 0, lse * grad_lse).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def check(given: dict[str, Tensor], tolerance=2e-5, **options) -> None:
    exact, found = run(given, torch.float64, "reference", **options), run(given, torch.float32, "triton", **options)
    for name, wanted in exact.items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=tolerance, atol=tolerance, msg=name)


# --- against float64 --------------------------------------------------------------------------------------------------


def random_problem(seed: int):
    """A random problem with any of the optional arguments, small enough for the interpreter."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads, group, batch = draw.choice((1, 2)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    own, prompt = draw.choice((0, 1, 5, 17, 40)), draw.choice((0, 1, 7, 40, 70))
    queries = draw.choice((1, max(1, own), max(1, own // 2), own + 3))
    rows, options = draw.choice((1, 1, 2, 3)), {}
    sequences = batch
    if draw.random() < 0.3:
        starts = [0]
        for _ in range(draw.choice((1, 2, 4))):
            starts.append(starts[-1] + draw.choice((0, 1, 5, 30)))
        batch, sequences, own = 1, len(starts) - 1, starts[-1] + draw.choice((0, 4))
        queries, options["cu_seqlens"] = own, torch.tensor(starts)
    elif draw.random() < 0.4:
        options["key_lengths"] = torch.randint(0, own + 1, (batch,))
    if rows not in (1, sequences) or draw.random() < 0.4:
        options["prompt_index"] = torch.randint(0, rows, (sequences,))
    if draw.random() < 0.4:
        options["prompt_lengths"] = torch.randint(0, prompt + 1, (rows,))
    if draw.random() < 0.4:
        options["window"] = draw.choice((1, 3, 20))
    if draw.random() < 0.4:
        options["softcap"] = 5.0
    if draw.random() < 0.4:
        options["sinks"] = torch.randn(kv_heads * group)
    size = draw.choice((8, 16, 24))
    given = tensors(batch, kv_heads * group, kv_heads, queries, own, rows, prompt, size, draw.choice((size, 16)))
    return given, {"causal": draw.random() < 0.7, **options}


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_agree_with_float64(seed):
    given, options = random_problem(seed)
    check(given, **options)


@pytest.mark.parametrize("seed", range(40, 48))
def test_loads_by_tensor_descriptors_agree_with_float64(seed, target):
    """TF32 is allowed, because fp32 without tensor cores uses no descriptors. The interpreter computes it as fp32."""
    target("sm_90")
    given, options = random_problem(seed)
    with shipped_configurations.allow_tf32(True):
        assert plan(given, "sm_90", **options)[0][0].descriptors
        check(given, **options)
    assert not plan(given, "sm_80", **options)[0][0].descriptors


def test_keys_that_are_copied_get_descriptors_if_the_copies_are_aligned():
    """A copy of every other column of 40 has rows 40 bytes apart, which no descriptor accepts."""
    given = {n: torch.empty(*t.shape[:3], 40, dtype=torch.float16)[..., ::2] for n, t in tensors(size=20).items()}
    assert not plan(given, "sm_90")[0][0].descriptors
    assert plan({n: t.half() for n, t in tensors(size=16).items()}, "sm_90")[0][0].descriptors


@pytest.mark.parametrize("keys", [15, 31, 32, 33, 64, 65])
def test_prompts_keys_and_rows_that_end_near_the_end_of_a_tile(keys):
    """They end at, before and after it."""
    check(tensors(2, 3, 1, queries=keys, prompt=97 - keys))
    check(tensors(1, 2, 2, queries=keys, own=keys + 1, prompt=keys), window=33)


@pytest.mark.parametrize("size", [80, 96, 128, 256])
def test_large_heads(size):
    """Sizes above 128 need TF32, which the interpreter computes as fp32."""
    with shipped_configurations.allow_tf32(size > 128):
        check(tensors(1, 2, 1, queries=9, prompt=20, size=size, value_size=64 if size == 96 else size))


def test_sinks_of_any_stride_and_windows_of_any_width():
    given = tensors(2, 4, 2, queries=70, prompt=40)
    check(given, sinks=torch.randn(4, 3)[:, 1])
    check(given, sinks=torch.randn(1).expand(4))
    for window in (2**31 - 1, 2**31, 2**63 - 1):
        check(given, window=window)


def test_a_nan_in_one_sequence_does_not_reach_others_stacked_in_its_tile():
    for name in ("key", "value"):
        given = tensors(10, 4, 2, queries=2, own=3, prompt=40)
        given[name][3] = torch.nan
        leaves = {n: t.requires_grad_() for n, t in given.items()}
        out = prompt_attention(**leaves, backend="triton")
        others = [b for b in range(10) if b != 3]
        assert out[3].isnan().any() and not out[others].isnan().any()
        (grad_query,) = torch.autograd.grad(out[others].sum(), leaves["query"])
        assert not grad_query[others].isnan().any()


def test_attention_never_waits_for_the_device(forbid_waiting):
    given = {name: t.requires_grad_() for name, t in tensors(3, 4, 2, queries=9, rows=2, prompt=20).items()}
    vectors = {"prompt_index": torch.tensor([1, 0, 1]), "prompt_lengths": torch.tensor([20, 7])}
    sinks = torch.randn(4, requires_grad=True)
    for options in ({}, {"window": 5, "softcap": 3.0}, {"key_lengths": torch.tensor([9, 4, 0])}):
        out = prompt_attention(**given, **vectors, sinks=sinks, **options, backend="triton")
        torch.autograd.grad(out.sum(), [*given.values(), sinks])


# --- against PyTorch in the same dtype --------------------------------------------------------------------------------


def by_pytorch(given: dict[str, Tensor], grad_out: Tensor) -> list[Tensor]:
    """out and gradients of plain PyTorch: the prompt is copied for every sequence and concatenated, with a mask."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    batch, heads, queries, _ = leaves["query"].shape
    joined = []
    for name in ("key", "value"):
        prompt = leaves[f"prompt_{name}"].expand(batch, -1, -1, -1)
        joined.append(torch.cat([prompt, leaves[name]], 2).repeat_interleave(heads // prompt.shape[1], 1))
    mask = torch.ones(queries, joined[0].shape[2], dtype=torch.bool).tril(joined[0].shape[2] - queries)
    out = scaled_dot_product_attention(leaves["query"], *joined, attn_mask=mask)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out)]


def errors(given: dict[str, Tensor], dtype) -> dict[str, tuple[float, float]]:
    """For out and each gradient (our error, PyTorch's error) against float64, from the same rounded tensors."""
    given = {name: t.to(dtype) for name, t in given.items()}
    doubles = {name: t.double() for name, t in given.items()}
    grad_out = torch.randn(given["query"].shape[:3] + given["value"].shape[3:]).to(dtype)

    def ours(given, backend):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        out = prompt_attention(**leaves, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))]

    exact = ours(doubles, "reference")
    found, theirs = ours(given, "triton"), by_pytorch(given, grad_out)
    pairs = zip(("out", *TENSORS), found, theirs, exact, strict=True)
    return {n: tuple(float((t.double() - wanted).norm()) for t in (f, o)) for n, f, o, wanted in pairs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [64, 80])
def test_errors_are_at_most_twice_those_of_pytorch(dtype, size):
    for name, (ours, theirs) in errors(tensors(2, 6, 2, 40, prompt=32, size=size), dtype).items():
        assert ours <= (2 if name == "out" else 3) * theirs, (name, ours / theirs)


def test_prompt_gradients_of_a_batch_are_summed_in_fp32():
    """The only key has weight 1. So the gradient of its value is the sum over all rows of dO, rounded once."""
    given = tensors(64, 4, 2, queries=8, own=0, prompt=1)
    leaves = {name: t.half().requires_grad_() for name, t in given.items()}
    out = prompt_attention(**leaves, causal=False, backend="triton")
    grad_out = torch.randn(out.shape).half()
    (found,) = torch.autograd.grad(out, [leaves["prompt_value"]], grad_out)
    exact = grad_out.double().unflatten(1, (2, 2)).sum((0, 2, 3))[None, :, None]
    assert (found.double() - exact).norm() <= 1.05 * (exact.half().double() - exact).norm()


# --- tiles and splits -------------------------------------------------------------------------------------------------


def plan(given: dict[str, Tensor], target="sm_80", needs=(True,) * 5, **options):
    """The launches of forward and backward."""
    from softprompt_kernels.kernels.triton.attention.plan import plan_backward, plan_forward

    arguments = dict.fromkeys(("prompt_index", "prompt_lengths", "key_lengths", "cu_seqlens", "sinks"))
    problem = AttentionProblem(
        **given, **{**arguments, "causal": True, "window": None, "softcap": None, "scale": 0.25, **options}
    )
    out, lse, forward = plan_forward(problem, TARGETS[target])
    grad_out = empty_output(problem)
    sinks = problem.sinks is not None
    _, backward = plan_backward(problem, out, lse, grad_out, None, Needs(*needs, sinks), TARGETS[target])
    return forward, backward


def on_meta(**sizes) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: t.to(torch.bfloat16) for name, t in tensors(**sizes).items()}


def test_few_rows_with_a_long_prompt_split_its_keys():
    given = tensors(2, 4, 2, queries=1, prompt=300)
    forward, _ = plan(given)
    assert forward[0].constants["VARIANT"].splits > 1 and len(forward) == 2
    check(given)
    check(given, sinks=torch.randn(4), window=200)
    check(tensors(1, 2, 1, queries=3, own=140, rows=2, prompt=140), prompt_index=torch.tensor([1]), softcap=3.0)


def test_sequences_with_few_queries_are_stacked_in_one_tile():
    given = tensors(10, 4, 2, queries=2, own=3, prompt=40)
    (launch, *_), _ = plan(given)
    assert launch.constants["VARIANT"].stacked and launch.grid[0] < 10
    check(given)
    check(given, window=20, key_lengths=torch.randint(0, 4, (10,)))
    assert not plan(given, prompt_index=torch.zeros(10, dtype=torch.int64))[0][0].constants["VARIANT"].stacked


def test_rows_that_see_a_short_prompt_are_split():
    given = tensors(6, 4, 2, queries=40, prompt=20)
    _, backward = plan(given)
    variant = backward[1].constants["VARIANT"]
    assert variant.splits > 1 and variant.stacked and len(backward) == 3
    check(given)


def test_a_forward_and_backward_is_at_most_five_launches_whatever_the_batch():
    counts = []
    for batch in (1, 4, 64):
        given = on_meta(batch=batch, heads=14, kv_heads=2, queries=256, prompt=128, size=64)
        forward, backward = plan(given, "sm_90", sinks=torch.empty(14, device="meta"))
        counts.append(len(forward) + len(backward))
    assert max(counts) <= 5 and counts[1] == counts[2]


def test_no_buffer_holds_one_prompt_per_sequence():
    def largest(batch):
        given = on_meta(batch=batch, heads=14, kv_heads=2, queries=64, prompt=512, size=64)
        forward, backward = plan(given, "sm_90")
        arguments = [a for launch in forward + backward for a in launch.arguments.values()]
        fields = [f for a in arguments if isinstance(a, tuple) for f in a]
        nested = [n for f in fields if isinstance(f, tuple) for n in f]
        of_prompts = [t for t in arguments + fields + nested if isinstance(t, Tensor) and t.shape[-2:-1] == (512,)]
        return max(t.numel() for t in of_prompts)

    assert largest(256) <= 64 * 2 * 512 * 64 < 256 * 2 * 512 * 64


def test_inputs_without_a_gradient_cost_no_launch():
    given = on_meta(batch=2, heads=4, kv_heads=2, queries=64, prompt=32, size=64)
    _, backward = plan(given, needs=(True, False, False, False, False))
    assert [launch.kernel.__name__ for launch in backward] == ["backward_dq_kernel"]
    _, backward = plan(given, needs=(False, False, False, True, True))
    assert backward[0].constants["NEED_QUERY"] is False and backward[1].arguments["own_tiles"] == 0


def test_two_runs_give_the_same_bits():
    given = tensors(4, 4, 2, queries=20, prompt=40)
    first, second = (run(given, torch.float32, "triton", sinks=torch.ones(4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_heads_beyond_the_largest_are_refused():
    with pytest.raises(ValueError, match="the head size is 264, and it serves up to 256"):
        prompt_attention(**tensors(size=264), backend="triton")
    with pytest.raises(ValueError, match="the head size is 129 in float32, and it serves up to 128 there"):
        prompt_attention(**tensors(size=129), backend="triton")
