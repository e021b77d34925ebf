"""Cases that other suites import: shapes, inputs, results against float64, and costs."""

import doctest
import subprocess
import sys

import pytest
import torch

from softprompt_kernels.testing import cases
from softprompt_kernels.testing.cases import BACKWARD, BOTH, FORWARD, OPS, SUITES, Case, case, distance, suite
from softprompt_kernels.testing.suites import MODELS

ALL = [one for name in SUITES for one in suite(name)]
TINY = list({one.op: one.tiny() for one in suite("quick")}.values())


def by_name(one: Case) -> str:
    return one.name


def test_the_example_of_the_page_runs() -> None:
    ran = doctest.testmod(cases)
    assert ran.attempted > 0
    assert ran.failed == 0


def test_nothing_here_imports_pytest() -> None:
    program = "import sys, softprompt_kernels.testing.cases; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_shape_is_read_back() -> None:
    assert all(case(one.op, one.shape) == one for one in ALL)
    assert case("prompt_attention", "D64, P128 M256 H14/2 B8").shape == "B8 H14/2 M256 P128 D64"
    assert case("prompt_attention", "B1 H4 M2 P0 D8").shape == "B1 H4/4 M2 P0 D8"


@pytest.mark.parametrize(
    ("op", "shape", "said"),
    [
        ("linear_kl_div", "N5 V40", "d is missing; accepted is a number for each of N, d, V, as in 'N64 d64 V64'"),
        ("linear_kl_div", "N5 d8 V40 V41", "V is given twice"),
        ("linear_kl_div", "N5 d8 V40 Q3", "'Q3' is no size of this op"),
        ("linear_kl_div", "N5/2 d8 V40", "'N5/2' is no size of this op"),
        ("linear_kl_div", "N0 d8 V40", "'N0' is out of range; sizes go from 1"),
        ("linear_kl_div", "N99999999999 d8 V40", "out of range"),
        ("prompt_attention", "B1 H3/2 M4 P4 D8", "a multiple of that of key heads"),
        ("softmax", "N5", "op must be one of prompt_attention, kl_div, linear_kl_div,"),
    ],
)
def test_a_shape_that_cannot_be_used_is_refused(op: str, shape: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        case(op, shape)
    assert said in str(refused.value)


def test_an_unknown_suite_or_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="suite must be one of quick, smollm2,"):
        suite("gpt5")
    with pytest.raises(ValueError, match="pass of teacher_moments must be one of forward; got 'backward'"):
        case("teacher_moments", "N5 d8 V40").flop(BACKWARD)


@pytest.mark.parametrize("one", TINY, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_of_every_pass_agree_with_the_reference(one: Case, dtype: torch.dtype) -> None:
    inputs = one.inputs(dtype)
    expected = dict(zip(one.result_names, one.reference(inputs), strict=True))
    for pass_ in one.passes:
        found = one.run(inputs, pass_=pass_)
        names = one.result_names
        if len(one.passes) > 1:
            names = {FORWARD: names[:1], BACKWARD: names[1:], BOTH: names}[pass_]
        for name, result in zip(names, found, strict=True):
            assert distance(result, expected[name]) <= one.tolerance(dtype), (pass_, name)


@pytest.mark.parametrize("one", TINY, ids=by_name)
def test_a_wrong_result_is_beyond_the_tolerance(one: Case) -> None:
    inputs = one.inputs()
    for result in one.reference(inputs):
        assert distance(1.1 * result, result) > one.tolerance(torch.float32)
        assert distance(torch.full_like(result, float("nan")), result) == float("inf")


@pytest.mark.parametrize("one", TINY, ids=by_name)
def test_inputs_depend_on_the_seed_alone(one: Case) -> None:
    first, again, other = one.inputs(), one.inputs(), one.inputs(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    upstream = one.grad_out(other)
    assert upstream is None or not any(torch.equal(upstream, x) for x in other)
    assert [x.requires_grad for x in one.sources(first)] == [True] * len(one.sources(first))


@pytest.mark.parametrize("one", TINY, ids=by_name)
def test_costs_of_the_parts_add_up(one: Case) -> None:
    if len(one.passes) == 1:
        return
    assert one.flop(FORWARD) + one.flop(BACKWARD) == one.flop() == one.flop(BOTH)
    for dtype in (torch.float32, torch.bfloat16):
        assert one.bytes(FORWARD, dtype) + one.bytes(BACKWARD, dtype) == one.bytes(dtype=dtype)


@pytest.mark.parametrize("one", TINY, ids=by_name)
def test_bytes_of_results_are_those_of_the_tensors(one: Case) -> None:
    inputs = one.inputs()
    for pass_ in one.passes:
        found = one.run(inputs, pass_=pass_)
        assert one.result_bytes(pass_) == sum(result.numel() * result.element_size() for result in found)


def test_flop_of_the_attention_leave_out_hidden_pairs() -> None:
    one = case("prompt_attention", "B2 H3/1 M3 P2 D8")
    assert one.flop(FORWARD) == 4 * 8 * 2 * 3 * (3 * 2 + 1 + 2 + 3)
    assert one.flop() == one.flop(FORWARD) * 14 / 4


def test_flop_of_the_losses_are_gemms_of_the_heads_size() -> None:
    gemm = 2 * 5 * 8 * 40
    assert [case(op, "N5 d8 V40").flop() / gemm for op in ("linear_kl_div", "linear_kl_div_from_moments")] == [3, 2]
    assert case("teacher_moments", "N5 d8 V40").flop() == 2 * gemm
    assert case("kl_div", "N5 V40").flop() == 0


def test_bytes_agree_with_the_floors_of_the_counters() -> None:
    pytest.importorskip("triton")  # whose kernels the counters count
    from benchmarks.counted.attention import ATTENTION

    for problem in ATTENTION:
        one = case("prompt_attention", problem.name)
        assert (one.bytes(FORWARD), one.bytes(BACKWARD)) == problem.floors()


def test_a_reduced_case_costs_what_it_may_and_keeps_its_other_sizes() -> None:
    for one in ALL:
        less = one.reduced(1e9)
        assert less.flop() <= 1e9 or min(less.sizes["N" if "N" in less.sizes else "B"]) == 1
        assert {k: v for k, v in less.sizes.items() if k not in "BN"} == {
            k: v for k, v in one.sizes.items() if k not in "BN"
        }
        assert one.reduced(1e18) == one


@pytest.mark.parametrize("name", MODELS)
def test_suites_of_models_hold_every_op_with_the_models_sizes(name: str) -> None:
    model = MODELS[name]
    assert {one.op for one in suite(name)} == set(OPS)
    for one in suite(name):
        if one.op == "prompt_attention":
            assert one.sizes["H"] == (model.heads, model.kv_heads)
            assert one.sizes["D"] == (model.head_size,)
        else:
            assert one.sizes["V"] == (model.vocab,)
            assert one.sizes.get("d", (model.hidden,)) == (model.hidden,)
