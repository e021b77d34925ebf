"""The Triton losses without running them: memory, GEMMs and launches at full size."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt_kernels.kernels.device import gemm, memory
from softprompt_kernels.kernels.device.rows import STATISTICS
from softprompt_kernels.kernels.problems.loss import (
    DIVERGENCES,
    Divergence,
    ExpectationProblem,
    Head,
    HeadNeeds,
    HeadProblem,
    LogitsProblem,
)
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses import expectation, kl_div, linear_kl_div, plan
from softprompt_kernels.kernels.triton.targets import TARGETS

pytestmark = [
    pytest.mark.no_interpreter,
    pytest.mark.skipif(runtime.missing() is not None, reason=f"the triton backend: {runtime.missing()}"),
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


class CostCounter(TorchDispatchMode):
    """Counts the peak bytes of storages allocated under it, and GEMMs in units of one GEMM of the head."""

    def __init__(self):
        super().__init__()
        self.holders, self.bytes = Counter(), {}
        self.peak = 0
        self.gemms = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [tensor for tensor in args if isinstance(tensor, torch.Tensor)][-2:]
            self.gemms += a.shape[0] * a.shape[1] * b.shape[1] / (TOKENS * SIZE * VOCAB)
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
def measure(monkeypatch):
    """`measure(kernel, problem, ...)` returns the costs and the number of launches of a call."""
    launched = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch.kernel))

    def measure(kernel, problem, *arguments):
        launched.clear()
        with CostCounter() as costs:
            kernel(problem, *arguments)
        return costs, len(launched)

    return measure


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_live_teacher_takes_three_gemms_and_1_5_gigabytes(measure):
    """8192 tokens, d = 4096, V = 128256, in 8 launches; results included."""
    costs, launches = measure(linear_kl_div.forward, live(), True)
    assert costs.gemms == pytest.approx(3)
    assert costs.peak < 1.5e9 and launches == 8
    costs, _ = measure(linear_kl_div.forward, live(), False)
    assert costs.gemms == pytest.approx(2) and costs.peak < 1.1e9


@pytest.mark.parametrize("fp32_results", ["write", "accumulate"])
def test_a_trained_head_adds_only_the_gemm_of_its_gradient(fp32_results, measure, monkeypatch):
    """Whether or not torch can add a 16-bit GEMM to an fp32 result."""
    monkeypatch.setattr(gemm, "_fp32_results", lambda device: fp32_results)
    costs, _ = measure(linear_kl_div.backward, live(), empty(TOKENS), HeadNeeds(True, True, False))
    assert costs.gemms == pytest.approx(4)
    gradients = VOCAB * SIZE * (4 + 2) + TOKENS * SIZE * 2
    assert costs.peak < 1.5e9 + gradients


@pytest.mark.parametrize(
    ("dtype", "need_mean", "count"),
    [(torch.bfloat16, True, 3), (torch.float32, True, 2), (torch.bfloat16, False, 1)],
    ids=["16 bits", "fp32", "no gradient"],
)
def test_an_expectation_takes_its_gemms_and_the_memory_of_a_tile(dtype, need_mean, count, measure):
    costs, _ = measure(expectation.forward, from_moments(dtype, need_mean))
    assert costs.gemms == pytest.approx(count)
    returned = TOKENS * (SIZE * 4 * need_mean + 40)
    assert costs.peak - returned < 260 * 2**20


@pytest.mark.parametrize(
    ("token_bytes", "tokens", "size"),
    [
        (10 * 128256, 8192, 1024),  # at least 1024
        (10 * 128256, 1500, 768),  # equal chunks
        (10 * 128256, 100, 100),
        (10 * 262144, 8192, 512),  # 1024 would take too much
        (10 * 8192, 8192, 2816),  # what fits the budget, in equal chunks
        (10 * 2**40, 8192, 1),
    ],
)
def test_chunks_are_as_large_as_memory_allows(token_bytes, tokens, size):
    assert memory.chunk_size(tokens, None, token_bytes) == size
    assert memory.chunk_size(tokens, 7, token_bytes) == 7


# --- GEMMs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["none", "write", "accumulate"])
def fp32_results(request, monkeypatch):
    """How a build of torch gives fp32 results of 16-bit operands, imitated in fp32."""
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(gemm, "_fp32_results", lambda device: request.param)

    def imitated_mm(a, b, *, out_dtype=None, out=None):
        assert out_dtype is None or request.param != "none"
        return mm(a.float(), b.float(), out=out)

    def imitated_addmm(accumulator, a, b, *, out_dtype=None, out=None):
        assert out_dtype is None or request.param == "accumulate"
        return addmm(accumulator, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", imitated_mm)
    monkeypatch.setattr(torch, "addmm", imitated_addmm)


@pytest.mark.parametrize("copy_size", [64, 2**26], ids=["in pieces", "at once"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)])
def test_gemms_give_fp32_results_with_every_build_of_torch(dtypes, copy_size, fp32_results, monkeypatch):
    monkeypatch.setattr(gemm, "_COPY", copy_size)
    hidden, weight, gradient = torch.randn(5, 8).to(dtypes[0]), torch.randn(20, 8).to(dtypes[1]), torch.randn(5, 20)
    out = torch.full((5, 32), torch.nan)[:, :20]
    gemm.head_logits(out, hidden, weight)
    torch.testing.assert_close(out, hidden.float() @ weight.float().mT)
    gradient = gradient.to(dtypes[1])
    hidden_gradient = gemm.pull_back(gradient, weight)
    torch.testing.assert_close(hidden_gradient, gradient.float() @ weight.float())
    accumulated = gemm.pull_back(gradient, weight, out=hidden_gradient.clone())
    torch.testing.assert_close(accumulated, 2 * hidden_gradient)
    weight_gradient = torch.ones(20, 8)
    gemm.add_outer(weight_gradient, gradient, hidden)
    torch.testing.assert_close(weight_gradient, 1 + gradient.float().mT @ hidden.float())


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_every_op_plans_its_launches_for_every_target_without_a_gpu(target):
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


def test_the_divergence_kernel_has_code_for_every_kind_of_the_table():
    from softprompt_kernels.kernels.triton.losses import kl_rows

    assert [kind.value for kind in (kl_rows.FORWARD, kl_rows.REVERSE, kl_rows.JSD)] == list(DIVERGENCES)


def test_few_rows_get_more_threads_and_short_rows_share_a_program():
    target = TARGETS["sm_90"]

    def tile(count, vocab):
        return plan.divergence_tile(count, vocab, target)

    assert tile(64, 128256).options.num_warps == 2 * tile(8192, 128256).options.num_warps
    assert tile(8192, 128256).block_m == 1 and tile(8192, 500).block_m == 2
    assert tile(140, 16).block_m == 1  # so that every multiprocessor has a program
    for vocab in (16, 100, 500, 4096):  # never more threads than elements
        small = tile(8, vocab)
        assert 32 * small.options.num_warps <= max(32, small.block_m * small.block_n)
