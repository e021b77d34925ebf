"""The CUDA attention kernels, run on the host by csrc/simt: compared with float64 and PyTorch, and their traffic."""

import random
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
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
ALL = Needs(True, True, True, True, True, False)
TILE = 64  # rows of a block, and keys of a tile of the forward
MASKS = {
    "full": {"causal": False},
    "causal": {},
    "window": {"window": 41},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"window": 41, "softcap": 2.0},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    HOST.module().seed(0)


def make(dtype=torch.float16, batch=2, group=2, kv_heads=2, queries=5, own=None, rows=1, prompt=3, size=64, **options):
    """A problem of random numbers. Causal unless `options` say otherwise."""
    own = queries if own is None else own
    shapes = [
        (batch, kv_heads * group, queries, size),
        *[(batch, kv_heads, own, size)] * 2,
        *[(rows, kv_heads, prompt, size)] * 2,
    ]
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in zip(TENSORS, shapes, strict=True)}
    names = ("prompt_index", "prompt_lengths", "key_lengths", "cu_seqlens", "sinks", "window", "softcap")
    defaults = {**dict.fromkeys(names), "causal": True, "scale": size**-0.5}
    return AttentionProblem(**tensors, **{**defaults, **options})


def in_float64(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, **{name: getattr(problem, name).double() for name in TENSORS})


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, name: str) -> None:
    """The error is at most 6 roundings of the largest number."""
    assert torch.equal(found == -torch.inf, wanted == -torch.inf), name
    found, wanted = (torch.where(t == -torch.inf, 0, t.double()) for t in (found, wanted))
    largest = wanted.abs().max().clamp_min(1) if wanted.numel() else 1
    error = (found - wanted).abs()
    assert not error.isnan().any() and (error <= 6 * ROUNDING[dtype] * largest).all(), (name, error.max())


def check(problem: AttentionProblem, poison: bool = False) -> None:
    """Compares forward and backward with float64.

    With `poison`, everything that no result may depend on is NaN: padding keys, and the inputs of rows without a key.
    """
    dtype, exact = problem.query.dtype, in_float64(problem)
    assert KERNELS.unsupported(problem) is None
    wanted_out, wanted_lse = reference.forward(exact)
    draw = torch.Generator().manual_seed(1)
    grad_out = torch.randn(wanted_out.shape, generator=draw).to(dtype)
    grad_lse = torch.where(wanted_lse == -torch.inf, 0, torch.randn(wanted_lse.shape, generator=draw))
    wanted = reference.backward(exact, wanted_out, wanted_lse, grad_out.double(), grad_lse.double(), ALL)
    if poison:
        unseen = wanted_lse == -torch.inf  # [B, Hq, M]
        absent = ~visibility(problem).key_exists[:, problem.prompt_key.shape[2] :]  # [B, N]
        tokens = torch.arange(problem.prompt_key.shape[2])
        lengths = problem.prompt_lengths
        beyond = torch.zeros(1, 1, dtype=torch.bool) if lengths is None else tokens >= lengths[:, None]  # [R, P]
        nan = torch.nan
        problem = replace(
            problem,
            query=problem.query.masked_fill(unseen[..., None], nan),
            **{n: getattr(problem, n).masked_fill(absent[:, None, :, None], nan) for n in TENSORS[1:3]},
            **{n: getattr(problem, n).masked_fill(beyond[:, None, :, None], nan) for n in TENSORS[3:]},
        )
        grad_out = grad_out.masked_fill(unseen[..., None], nan)
        grad_lse = grad_lse.masked_fill(unseen, nan)
    out, lse = KERNELS.forward(problem)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    assert_close(out, wanted_out, dtype, "out")
    assert_close(lse, wanted_lse, dtype, "lse")
    assert not out[wanted_lse == -torch.inf].any()
    found = KERNELS.backward(problem, out, lse, token_major(grad_out), grad_lse, ALL)
    for name, actual, expected in zip(Gradients._fields, found[:5], wanted[:5], strict=False):
        assert_close(actual, expected, dtype, f"d{name}")


# --- compared with float64 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_head_sizes_groups_and_masks(dtype, size, group, mask):
    """Sizes that are not multiples of a tile, at least 3 tiles of keys, and a bank of ragged prompts."""
    ragged = {
        "prompt_index": torch.tensor([1, 0]),
        "prompt_lengths": torch.tensor([75, 33]),
        "key_lengths": torch.tensor([67, 90]),
    }
    check(make(dtype, 2, group, 1, 29, 90, 2, 75, size, **ragged, **MASKS[mask]))


def random_problem(seed: int) -> AttentionProblem:
    """Random arguments, among them empty prompts, empty sequences and rows without a key."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, own, prompt = draw.choice((1, 2, 3)), draw.choice((0, 1, 17, 70, 150)), draw.choice((0, 1, 40, 64, 130))
    queries, rows = draw.choice((1, max(1, own), max(1, own // 2), own + 3)), draw.choice((1, 1, 2, 3))
    options = {"causal": draw.random() < 0.7}
    if draw.random() < 0.5:
        options["key_lengths"] = torch.randint(0, own + 1, (batch,))
    if rows not in (1, batch) or draw.random() < 0.4:
        options["prompt_index"] = torch.randint(0, rows, (batch,))
    if draw.random() < 0.5:
        options["prompt_lengths"] = torch.randint(0, prompt + 1, (rows,))
    if draw.random() < 0.4:
        options |= {"window": draw.choice((1, 20, 90)), "causal": True}
    if draw.random() < 0.4:
        options["softcap"] = 5.0
    group, kv_heads, size = draw.choice((1, 3, 7)), draw.choice((1, 2)), draw.choice(HEAD_SIZES)
    return make(DTYPES[seed % 2], batch, group, kv_heads, queries, own, rows, prompt, size, **options)


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_with_nan_in_everything_that_must_be_ignored(seed):
    HOST.module().seed(seed)
    check(random_problem(seed), poison=True)


@pytest.mark.parametrize("keys", [63, 64, 65])
def test_ends_of_tiles(keys):
    check(make(queries=keys, prompt=129 - keys, group=3, kv_heads=1))
    check(make(batch=1, queries=keys, own=keys + 1, prompt=keys, window=33))


@pytest.mark.parametrize("ahead", [61, 62, 63, 64])
def test_tile_is_masked_if_its_last_key_is_after_the_first_query(ahead):
    """The first query is at the position of own key `ahead`. The first tile of own keys ends with key 63."""
    check(make(queries=70, own=70 + ahead, prompt=10, group=1))
    check(make(queries=70, own=70 + ahead, prompt=10, group=1, window=63))


@pytest.mark.parametrize("window", [126, 127, 128])
def test_tile_is_masked_if_its_first_key_is_outside_the_window_of_the_last_query(window):
    """The last of the first 64 rows is 127 positions after the first own key. All queries are after that key's tile."""
    check(make(queries=70, own=134, prompt=10, group=1, window=window))


@pytest.mark.parametrize(
    ("queries", "own", "prompt", "without_key"),
    [(5, 5, 0, 0), (3, 0, 4, 0), (1, 90, 70, 0), (9, 4, 0, 5), (2, 0, 0, 2)],
)
def test_empty_segments_single_queries_and_rows_without_a_key(queries, own, prompt, without_key):
    problem = make(queries=queries, own=own, prompt=prompt)
    check(problem, poison=True)
    out, lse = KERNELS.forward(problem)
    assert not out[:, :, :without_key].any() and (lse[:, :, :without_key] == -torch.inf).all()
    assert (lse[:, :, without_key:] != -torch.inf).all()


def test_views_of_packed_projections_are_read_in_place():
    packed = torch.randn(2, 20, 3 * 4, 64).half()
    query, key, value = (t.transpose(1, 2) for t in packed.split(4, 2))
    problem = replace(make(group=1, kv_heads=4, queries=20, prompt=7), query=query, key=key, value=value)
    assert not query.is_contiguous() and KERNELS.unsupported(problem) is None
    copies = replace(problem, query=query.contiguous(), key=key.contiguous(), value=value.contiguous())
    for actual, expected in zip(KERNELS.forward(problem), KERNELS.forward(copies), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_results_do_not_depend_on_the_schedule(size):
    problem = make(torch.bfloat16, 2, 3, 1, 50, 150, 1, 140, size)
    results = []
    for seed in range(5):
        HOST.module().seed(seed)
        out, lse = KERNELS.forward(problem)
        results.append((out, lse, *KERNELS.backward(problem, out, lse, token_major(out), lse, ALL)[:5]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_at_most_twice_those_of_pytorch(dtype, size):
    """Root mean square error of out, compared with that of PyTorch's attention in the same dtype."""
    problem = make(dtype, 2, 2, 2, 80, 80, 1, 60, size)
    keys, values = (
        torch.cat([p.expand(2, -1, -1, -1), t], 2).repeat_interleave(2, 1)
        for p, t in ((problem.prompt_key, problem.key), (problem.prompt_value, problem.value))
    )
    expected = scaled_dot_product_attention(problem.query, keys, values, torch.ones(80, 140, dtype=torch.bool).tril(60))
    exact = reference.forward(in_float64(problem))[0]

    def error(out: Tensor) -> float:
        return (out.double() - exact).square().mean().sqrt().item()

    assert error(KERNELS.forward(problem)[0]) <= 2 * error(expected)


# --- unsupported arguments --------------------------------------------------------------------------------------------


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, at an address 2 bytes after a multiple of 16."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (make(torch.float32), "query is torch.float32"),
        (make(size=80), "head sizes of query and value are 80 and 80"),
        (replace(make(), value=torch.zeros(2, 2, 5, 96).half()), "head sizes of query and value are 64 and 96"),
        (make(sinks=torch.zeros(4).half()), "sinks is given"),
        (make(batch=1, cu_seqlens=torch.tensor([0, 5])), "cu_seqlens is given"),
        *[(replace(make(), **{n: misaligned(getattr(make(), n))}), f"rows of {n} do not begin") for n in TENSORS],
        (replace(make(), key=torch.zeros(2, 2, 5, 65).half()[..., :64]), "rows of key do not begin"),
    ],
)
def test_unsupported_arguments_are_named(problem, reason):
    assert (KERNELS.unsupported(problem) or "").startswith(("the " if "head" in reason else "") + reason)


# --- counters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counters():
    module = HOST.module()
    module.reset_counters()
    module.count(True)
    yield module.counters
    module.count(False)


def minimum_bytes(problem: AttentionProblem) -> int:
    """Minimum bytes that the blocks load: every query once, and for each block of 64 rows all keys and values it sees.

    Row r of a sequence and key head is query r // g. Loads of the same key by several blocks count once for each block.
    """
    batch, heads, queries, size = problem.query.shape
    visible = visibility(problem).visible.expand(batch, queries, -1).repeat_interleave(problem.group, 1)
    keys = sum(int(tile.any(1).sum()) for tile in visible.split(TILE, 1))
    return 2 * size * (batch * heads * queries + 2 * keys * problem.key.shape[1])


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
def test_bytes_conflicts_and_launches_of_a_forward(sizes, size, counters):
    problem = make(size=size, **sizes)
    KERNELS.forward(problem)
    found, rows = counters(), problem.query.shape[:3].numel()
    assert found["launches"] == 1
    assert found["loaded_bytes"] <= 1.15 * minimum_bytes(problem)
    assert found["stored_bytes"] == rows * (2 * size + 4)
    assert [found[kind] for kind in ("shared_conflicts", "matrix_conflicts", "copy_conflicts")] == [0, 0, 0]


def test_only_visible_tiles_are_multiplied(counters):
    """Causal, 4 tiles of 64 queries, 1 prompt tile: the row tiles see 1 prompt tile and 1, 2, 3 and 4 own tiles."""
    KERNELS.forward(make(batch=1, group=1, kv_heads=1, queries=256, prompt=64, size=64))
    tiles = 4 * 1 + 1 + 2 + 3 + 4
    assert counters()["mma"] == tiles * 2 * (64 * 64 * 64) // (16 * 8 * 16)
