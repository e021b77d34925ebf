"""The Triton losses without running them: memory, products and launches at full size."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt_kernels.kernels.device import gemm, memory
from softprompt_kernels.kernels.device.rows import STATISTICS
from softprompt_kernels.kernels.problems.loss import (
    Divergence,
    ExpectationProblem,
    Head,
    HeadNeeds,
    HeadProblem,
    LogitsProblem,
)
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses import expectation, kl_div, linear_kl_div, rows
from softprompt_kernels.kernels.triton.targets import TARGETS

pytestmark = [
    pytest.mark.skipif(runtime.interpreting(), reason="tested without TRITON_INTERPRET"),
    pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing())),
]
TOKENS, SIZE, VOCAB = 8192, 4096, 128256


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def live(dtype=torch.bfloat16, **options):
    head = Head(empty(VOCAB, SIZE, dtype=dtype), options.pop("bias", None), options.pop("softcap", None), 1.0)
    hidden = [empty(TOKENS, SIZE, dtype=dtype) for _ in range(2)]
    return HeadProblem(*hidden, head, head, None, Divergence("forward", 0.5, 1.0), options.pop("chunk_tokens", None))


def from_moments(dtype=torch.bfloat16, need_mean=True):
    head = Head(empty(VOCAB, SIZE, dtype=dtype), None, None, 1.0)
    return ExpectationProblem(empty(TOKENS, SIZE, dtype=dtype), head, None, None, 1.0, None, need_mean)


class Watch(TorchDispatchMode):
    """Bytes that are alive at most, of storages made while it watches, and products in units of the head's size."""

    def __init__(self):
        super().__init__()
        self.holders, self.bytes = Counter(), {}
        self.peak = 0
        self.products = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1] / (TOKENS * SIZE * VOCAB)
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in known and storage._cdata not in self.bytes:
                    continue  # a view of an input
                self.bytes[storage._cdata] = storage.nbytes()
                self.holders[storage._cdata] += 1
                weakref.finalize(tensor, self._drop, storage._cdata)
        self.peak = max(self.peak, sum(self.bytes.values()))
        return out

    def _drop(self, storage):
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.bytes.pop(storage, None)


@pytest.fixture
def watched(monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch.kernel))

    def watched(kernel, problem, *arguments):
        launched.clear()
        with Watch() as watch:
            kernel(problem, *arguments)
        return watch, len(launched)

    return watched


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_live_teacher_takes_three_products_and_a_gigabyte_and_a_half(watched):
    """At 8192 tokens, d = 4096, V = 128256, with all that is returned and 8 launches."""
    watch, launches = watched(linear_kl_div.forward, live(), True)
    assert watch.products == pytest.approx(3)
    assert watch.peak < 1.5e9 and launches == 8
    watch, _ = watched(linear_kl_div.forward, live(), False)
    assert watch.products == pytest.approx(2) and watch.peak < 1.1e9


@pytest.mark.parametrize("sums", ["write", "accumulate"])
def test_a_trained_head_pays_for_its_gradient_alone(sums, watched, monkeypatch):
    """Whether or not torch adds 16-bit products to fp32."""
    monkeypatch.setattr(gemm, "_fp32_results", lambda device: sums)
    watch, _ = watched(linear_kl_div.backward, live(), empty(TOKENS), HeadNeeds(True, True, False))
    assert watch.products == pytest.approx(4)
    gradients = VOCAB * SIZE * (4 + 2) + TOKENS * SIZE * 2
    assert watch.peak < 1.5e9 + gradients


@pytest.mark.parametrize(
    ("dtype", "need_mean", "count"),
    [(torch.bfloat16, True, 3), (torch.float32, True, 2), (torch.bfloat16, False, 1)],
    ids=["16 bits", "fp32", "no gradient"],
)
def test_an_expectation_takes_its_products_and_a_tile(dtype, need_mean, count, watched):
    watch, _ = watched(expectation.forward, from_moments(dtype, need_mean))
    assert watch.products == pytest.approx(count)
    returned = TOKENS * (SIZE * 4 * need_mean + 40)
    assert watch.peak - returned < 260 * 2**20


@pytest.mark.parametrize(
    ("each", "tokens", "size"),
    [
        (10 * 128256, 8192, 1024),  # not fewer than 1024
        (10 * 128256, 1500, 768),  # evenly
        (10 * 128256, 100, 100),
        (10 * 262144, 8192, 512),  # 1024 would take too much
        (10 * 8192, 8192, 2816),  # what fits the budget, evenly
        (10 * 2**40, 8192, 1),
    ],
)
def test_chunks_are_as_large_as_memory_allows(each, tokens, size):
    assert memory.chunk_size(tokens, None, each) == size
    assert memory.chunk_size(tokens, 7, each) == 7


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["none", "write", "accumulate"])
def sums(request, monkeypatch):
    """What builds of torch do with fp32 results of 16-bit operands, here in terms of fp32."""
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(gemm, "_fp32_results", lambda device: request.param)

    def given(left, right, *, out_dtype=None, out=None):
        assert out_dtype is None or request.param != "none"
        return mm(left.float(), right.float(), out=out)

    def added(total, left, right, *, out_dtype=None, out=None):
        assert out_dtype is None or request.param == "accumulate"
        return addmm(total, left.float(), right.float(), out=out)

    monkeypatch.setattr(torch, "mm", given)
    monkeypatch.setattr(torch, "addmm", added)


@pytest.mark.parametrize("part", [64, 2**26], ids=["in parts", "at once"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_products_are_made_in_fp32_by_every_build_of_torch(dtypes, part, sums, monkeypatch):
    monkeypatch.setattr(gemm, "_COPY", part)
    hidden, weight, gradient = torch.randn(5, 8).to(dtypes[0]), torch.randn(20, 8).to(dtypes[1]), torch.randn(5, 20)
    out = torch.full((5, 32), torch.nan)[:, :20]
    gemm.head_logits(out, hidden, weight)
    torch.testing.assert_close(out, hidden.float() @ weight.float().mT)
    gradient = gradient.to(dtypes[1])
    pulled = gemm.pull_back(gradient, weight)
    torch.testing.assert_close(pulled, gradient.float() @ weight.float())
    once_more = gemm.pull_back(gradient, weight, out=pulled.clone())
    torch.testing.assert_close(once_more, 2 * pulled)
    of_weight = torch.ones(20, 8)
    gemm.add_outer(of_weight, gradient, hidden)
    torch.testing.assert_close(of_weight, 1 + gradient.float().mT @ hidden.float())


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_every_operation_plans_its_launches_for_a_target_that_is_not_here(target):
    logits = empty(TOKENS, VOCAB)
    problem = LogitsProblem(logits, logits, None, Divergence("jsd", 0.5, 1.0), VOCAB)
    from softprompt_kernels.kernels.triton.losses import kl_rows

    assert kl_rows.STATISTICS.value == STATISTICS
    (loss, statistics), forward = kl_div.plan_forward(problem, target)
    gradient, backward = kl_div.plan_backward(problem, loss, statistics, target)
    assert statistics.shape == (TOKENS, 5) and gradient.shape == logits.shape
    launches = [*forward, *backward, *linear_kl_div.plan(live(), True, target)]
    launches += expectation.plan(from_moments(), target)
    for launch in launches:
        assert set(launch.kernel.arg_names) == {*launch.arguments, *launch.constants}
        assert launch.options.num_warps * target.warp_size <= 1024


def test_few_rows_have_more_threads_and_short_rows_share_a_program():
    target = TARGETS["sm_90"]

    def tile(count, vocab):
        return rows._divergence_tile(count, vocab, target)

    assert tile(64, 128256).options.num_warps == 2 * tile(8192, 128256).options.num_warps
    assert tile(8192, 128256).block_m == 1 and tile(8192, 500).block_m == 2
    assert tile(140, 16).block_m == 1  # so that all multiprocessors have some
    for vocab in (16, 100, 500, 4096):  # no number is held by two threads, one of which might overwrite it too early
        small = tile(8, vocab)
        assert 32 * small.options.num_warps <= max(32, small.block_m * small.block_n)
