"""What profilers learn of the Triton kernels: names, FLOP and bytes, from planned launches. Nothing runs."""

from collections import namedtuple

import pytest
import torch

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs, empty_output
from softprompt_kernels.kernels.triton import runtime

if runtime.missing():
    pytest.skip(f"the triton backend: {runtime.missing()}", allow_module_level=True)

from softprompt_kernels.kernels.problems.loss import Divergence, LogitsProblem
from softprompt_kernels.kernels.ranges import call_range, kernel_range
from softprompt_kernels.kernels.triton.attention import plan, work
from softprompt_kernels.kernels.triton.attention.arguments import Layout, Scoring
from softprompt_kernels.kernels.triton.losses import kl_div
from softprompt_kernels.kernels.triton.profiled import metadata_of
from softprompt_kernels.kernels.triton.targets import TARGETS
from softprompt_kernels.testing.cases import PromptAttentionCase

TARGET = TARGETS["sm_90"]
WORK = {
    "forward_kernel": work.forward_flop,
    "backward_dq_kernel": work.backward_dq_flop,
    "backward_dkdv_kernel": work.backward_dkdv_flop,
}


def problem(queries=24, own=24, prompt=10, causal=True, window=None, cu_seqlens=None, batch=3) -> AttentionProblem:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    tensors = [empty(batch, 4, queries, 64), empty(batch, 2, own, 64), empty(batch, 2, own, 64)]
    tensors += [empty(1, 2, prompt, 64), empty(1, 2, prompt, 64)]
    return AttentionProblem(*tensors, None, None, None, cu_seqlens, None, causal, window, None, 0.125)


def launches(problem: AttentionProblem, needs: tuple[bool, ...] = (True,) * 5 + (False,)) -> dict:
    out, lse, forward = plan.plan_forward(problem, TARGET)
    _, backward = plan.plan_backward(problem, out, lse, empty_output(problem), None, Needs(*needs), TARGET)
    return {launch.kernel.__name__: launch for launch in (*forward, *backward)}


def metadata(launch) -> dict:
    name = launch.kernel.__name__
    return metadata_of(name, {**launch.arguments, **launch.constants}, WORK.get(name))


def pairs(problem: AttentionProblem) -> int:
    """Pairs of a query and a key that it sees, counted one by one."""
    batch, heads, queries, _ = problem.query.shape
    own, prompt = problem.key.shape[2], problem.prompt_key.shape[2]
    query = torch.arange(queries)[:, None] + prompt + own - queries
    distance = query - torch.arange(prompt + own)
    seen = distance > -(10**6)
    if problem.causal or problem.window is not None:
        seen = seen & (distance >= 0)
    if problem.window is not None:
        seen = seen & (distance < problem.window)
    return batch * heads * int(seen.sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"queries": 7, "own": 30},
        {"queries": 30, "own": 7},
        {"queries": 1, "own": 1},
        {"own": 24, "prompt": 0},
        {"window": 1},
        {"window": 9},
        {"window": 17},
        {"window": 500},
        {"window": 9, "queries": 30, "own": 7},
        {"window": 9, "queries": 7, "own": 30},
    ],
)
def test_flop_are_those_of_the_pairs_that_are_seen(options):
    given = problem(**options)
    found = {name: metadata(launch) for name, launch in launches(given).items()}
    count = pairs(given)
    assert found["forward_kernel"]["flops16"] == 4 * 64 * count
    assert found["backward_dq_kernel"]["flops16"] == 6 * 64 * count
    assert found["backward_dkdv_kernel"]["flops16"] == 8 * 64 * count


def test_flop_and_bytes_of_a_forward_are_those_of_the_case():
    case = PromptAttentionCase(batch=3, heads=4, kv_heads=2, queries=24, prompt=10, size=64)
    found = metadata(launches(problem())["forward_kernel"])
    assert found["flops16"] == case.flop("forward") and found["bytes"] == case.bytes("forward", torch.bfloat16)


def test_gradients_that_are_not_needed_count_nothing():
    given = problem()
    own = sum(range(1, 25)) * 12  # pairs with own keys
    for needs, expected in {
        (False, True, True, False, False, False): (0, 8 * 64 * own),
        (True, False, True, False, False, False): (6 * 64 * pairs(given), 4 * 64 * own),
        (True, True, False, False, False, False): (6 * 64 * pairs(given), 6 * 64 * own),
    }.items():
        found = launches(given, needs)
        assert metadata(found["backward_dq_kernel"])["flops16"] == expected[0]
        assert metadata(found["backward_dkdv_kernel"])["flops16"] == expected[1]


def test_packed_sequences_count_as_of_one_length():
    packed = problem(queries=24, own=24, batch=1, cu_seqlens=torch.empty(4, dtype=torch.int64, device="meta"))
    assert metadata(launches(packed)["forward_kernel"])["flops16"] == 4 * 64 * pairs(problem(queries=8, own=8))


def test_no_sequences_have_no_pairs():
    layout = Layout(None, None, None, None, 0, 1, 5, 5, 3, 4)
    variant = launches(problem())["forward_kernel"].constants["VARIANT"]
    assert sum(work.visible_pairs(layout, Scoring(1.0, 0.0, 0), variant)) == 0


def test_losses_have_bytes_alone():
    logits = torch.empty(6, 40, device="meta")
    _, (launch,) = kl_div.plan_forward(LogitsProblem(logits, logits, None, Divergence("forward", 0.5, 1.0), 40), TARGET)
    found = metadata(launch)
    assert found == {"name": f"softprompt::divergence_kernel[{tile(launch)}]", "bytes": 4 * (2 * 6 * 40 + 6 + 6 * 5)}


def tile(launch) -> str:
    variant = launch.constants.get("VARIANT")
    if variant is not None:
        return f"{variant.block_m}x{variant.block_n}"
    return f"{launch.constants['BLOCK_M']}x{launch.constants['BLOCK_N']}"


@pytest.mark.no_interpreter
def test_kernels_carry_their_tile_in_the_machine_code_and_their_work_for_proton():
    specialisation = namedtuple("SpecializationProxy", ["constants", "signature"])  # as Triton's own
    for name, launch in launches(problem()).items():
        kernel, arguments = launch.kernel, {**launch.arguments, **launch.constants}
        assert kernel.repr(specialisation(launch.constants, {})) == f"{name}_{tile(launch)}"
        assert kernel.launch_metadata(launch.grid, None, arguments) == metadata(launch)


def test_the_name_for_proton_is_that_of_the_range(monkeypatch):
    launch = launches(problem())["forward_kernel"]
    named = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", named.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setattr("softprompt_kernels.kernels.ranges._nvtx", True)
    variant = launch.constants["VARIANT"]
    with (
        call_range("prompt_attention.forward", "triton"),
        kernel_range("forward_kernel", variant.block_m, variant.block_n),
    ):
        assert metadata(launch)["name"] == named[-1]
