"""Which backend serves a call, how to override the choice, and what is logged and announced."""

import warnings
from typing import NamedTuple

import pytest
import torch

from softprompt_kernels.kernels.composed import kl_div as composed_kl_div
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.problems.loss import Divergence, LogitsProblem
from softprompt_kernels.kernels.reference import attention as reference_attention
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.losses import kl_div as triton_kl_div
from softprompt_kernels.ops import dispatch, kl_div, prompt_attention

BACKENDS = dispatch.BACKENDS

needs_triton = pytest.mark.skipif(runtime.missing() is not None, reason=f"the triton backend: {runtime.missing()}")


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch):
    """Without the cpu backend, which may not have been built."""
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b for b in BACKENDS if b.name != "cpu"))
    monkeypatch.delenv("SOFTPROMPT_BACKEND", raising=False)
    monkeypatch.delenv("SOFTPROMPT_LOG", raising=False)


@pytest.fixture
def prefer(monkeypatch):
    """`prefer(backend)` puts a backend before all others."""

    def put_first(backend):
        monkeypatch.setattr(dispatch, "BACKENDS", (backend, *dispatch.BACKENDS))

    return put_first


def attend(**options):
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    return prompt_attention(query, key, key, key, key, **options)


def chosen(capfd, monkeypatch, **options):
    monkeypatch.setenv("SOFTPROMPT_LOG", "dispatch")
    attend(**options)
    return capfd.readouterr().err


def test_backends_are_listed_from_most_to_least_preferred():
    assert [b.name for b in BACKENDS] == ["cpu", "composed", "triton", "cuda", "simt", "reference"]
    assert [b.name for b in BACKENDS if b.by_name_only] == ["simt"]


def test_the_cpu_backend_is_preferred_where_it_was_built_and_serves_every_op(capfd, monkeypatch):
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    monkeypatch.setattr(dispatch, "BACKENDS", BACKENDS)
    assert "prompt_attention on cpu -> cpu (preferred)" in chosen(capfd, monkeypatch)
    first = dispatch.available_backends()[0]
    assert first.name == "cpu" and len(first.ops) == 5
    double = torch.ones(1, 2, dtype=torch.float64)
    kl_div(double, double)
    assert "kl_div on cpu -> composed (cpu: student_logits is torch.float64" in capfd.readouterr().err


def test_the_composed_backend_is_preferred_on_a_cpu_without_it(capfd, monkeypatch):
    assert "prompt_attention on cpu -> composed (preferred)" in chosen(capfd, monkeypatch)


def test_a_choice_is_logged_once(capfd, monkeypatch):
    assert chosen(capfd, monkeypatch)
    assert not chosen(capfd, monkeypatch)


def test_the_argument_and_the_environment_name_a_backend(capfd, monkeypatch):
    assert "-> reference (requested)" in chosen(capfd, monkeypatch, backend="reference")
    monkeypatch.setenv("SOFTPROMPT_BACKEND", "reference")
    dispatch._announced.clear()
    assert "-> reference (requested)" in chosen(capfd, monkeypatch)
    assert "-> composed (requested)" in chosen(capfd, monkeypatch, backend="composed")


def test_a_named_backend_that_cannot_serve_says_which_argument_is_in_the_way():
    with pytest.raises(ValueError, match=r"backend='composed' cannot serve this prompt_attention call: .*softcap=2.0"):
        attend(softcap=2.0, backend="composed")
    with pytest.raises(ValueError, match="window=2 is shorter than prompt and keys"):
        attend(window=2, backend="composed")


def test_a_fallback_to_the_reference_is_announced_once_with_what_to_do():
    with pytest.warns(UserWarning, match=r"reference backend.*softcap=2.0.*backend='reference'"):
        attend(softcap=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(softcap=2.0)
        attend(window=2, backend="reference")


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="backend must be None or one of composed, cuda, reference, simt, triton; got 'fast'"
    ):
        attend()


def test_the_first_backend_that_can_serve_a_call_is_chosen(capfd, monkeypatch, prefer):
    prefer(dispatch.Backend("native", "made for this test", {"prompt_attention": reference_attention}))
    assert "-> native (preferred)" in chosen(capfd, monkeypatch)
    assert [r.name for r in dispatch.available_backends()] == [
        "native",
        "composed",
        "triton",
        "cuda",
        "simt",
        "reference",
    ]
    kl_div(torch.ones(1, 2), torch.ones(1, 2))  # the first has no kl_div, so the next one serves it
    with pytest.raises(ValueError, match="native: it has no kl_div"):
        kl_div(torch.ones(1, 2), torch.ones(1, 2), backend="native")


def test_a_missing_backend_is_skipped_and_announced_with_how_to_get_it(capfd, monkeypatch, prefer):
    how = "it was not built: run make build"
    kernels = {"prompt_attention": reference_attention}
    prefer(dispatch.Backend("native", "made for this test", kernels, missing=lambda: how))
    with pytest.warns(UserWarning, match=f"the native backend would serve calls on cpu, but {how}"):
        assert "-> composed" in chosen(capfd, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()  # announced once
        kl_div(torch.ones(1, 2), torch.ones(1, 2))  # not announced: it has no kl_div
    record = dispatch.available_backends()[0]
    assert (record.name, record.available, record.detail) == ("native", False, how)
    with pytest.raises(ValueError, match=how):
        attend(backend="native")


@needs_triton
def test_available_backends_lists_what_each_serves():
    records = {r.name: r for r in dispatch.available_backends()}
    ops = {"prompt_attention", "kl_div", "linear_kl_div", "teacher_moments", "linear_kl_div_from_moments"}
    assert set(records["reference"].ops) == set(records["composed"].ops) == ops
    assert set(records["cuda"].ops) == set(records["simt"].ops) == ops
    assert all(r.detail and (r.available or r.name in ("cuda", "simt")) for r in records.values())


def test_a_backend_for_tests_serves_only_calls_that_name_it(capfd, monkeypatch, prefer):
    served = []
    kernel = type("Kernel", (), {"unsupported": lambda self, problem: served.append(problem)})()
    prefer(dispatch.Backend("tested", "for this test", {"prompt_attention": kernel}, by_name_only=True))
    assert "-> composed (preferred)" in chosen(capfd, monkeypatch) and not served
    with pytest.raises(ValueError) as raised:
        attend(softcap=2.0, backend="composed")
    assert "tested" not in str(raised.value)
    assert dispatch.select("prompt_attention", None, "tested", torch.device("cpu")) is kernel and served


@needs_triton
def test_a_refusal_says_which_backends_can_and_why_the_others_cannot():
    double = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError) as raised:
        kl_div(double, double, backend="triton")
    assert str(raised.value) == (
        "backend='triton' cannot serve this kl_div call: triton: student_logits is torch.float64, and it computes in "
        "fp32. Backends that can: composed, reference (cuda: student_logits is on cpu, and it serves NVIDIA GPUs)"
    )
    with pytest.raises(ValueError, match=r"Backends that can: reference \(triton: .*\)"):
        attend(softcap=2.0, backend="composed")


@needs_triton
def test_tensors_on_a_gpu_go_to_triton_and_those_on_a_cpu_do_not():
    class FakeTensor(NamedTuple):
        device: torch.device
        dtype: torch.dtype = torch.float32

    def chosen_for(device):
        logits = FakeTensor(torch.device(device))
        problem = LogitsProblem(logits, logits, None, Divergence("forward", 0.5, 1.0), 2)
        return dispatch.select("kl_div", problem, None, logits.device)

    assert chosen_for("cuda") is triton_kl_div
    assert chosen_for("cpu") is composed_kl_div
