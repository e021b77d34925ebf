"""The compiled loss kernels: instruction sets agree, memory that runs out, and arguments that are refused."""

import os
import re
import subprocess
import sys

import pytest
import torch

from softprompt_kernels.kernels.problems.loss import DIVERGENCES
from softprompt_kernels.ops import kl_div, linear_kl_div

pytestmark = pytest.mark.usefixtures("module")

PROBE = """
import torch
from softprompt_kernels.kernels.host import fused_linear
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments
torch.manual_seed(0)
torch.set_num_threads(2)
results = []
def keep(loss, student):
    results.extend([loss.detach(), torch.autograd.grad(loss, student, torch.ones_like(loss))[0]])
for spread in (1.0, 25.0):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("forward", "reverse", "jsd"):
            student = (torch.randn(4, 1003) * spread).to(dtype).requires_grad_()
            teacher = (torch.randn(4, 1003) * spread).to(dtype)
            keep(kl_div(student, teacher, divergence=kind, reduction="none", backend="cpu"), student)
hidden, teacher, weight, bias = (torch.randn(s) for s in ((9, 20), (9, 20), (5003, 20), (5003,)))
hidden.requires_grad_()
for softcap in (None, 4.0):
    keep(linear_kl_div(hidden, teacher, weight, bias=bias, softcap=softcap, reduction="none", backend="cpu"), hidden)
fused_linear._streaming_is_faster = lambda problem, *_: problem.divergence.kind != "jsd"
for kind in ("forward", "reverse"):
    for softcap in (None, 4.0):
        options = {"divergence": kind, "bias": bias, "softcap": softcap, "reduction": "none", "backend": "cpu"}
        keep(linear_kl_div(hidden, teacher, weight, **options), hidden)
moments = teacher_moments(teacher, weight, bias=bias, backend="cpu")
keep(linear_kl_div_from_moments(hidden, moments, weight, bias=bias, reduction="none", backend="cpu"), hidden)
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_instruction_sets_agree(module, tmp_path):
    names = module.instruction_sets()
    results = {}
    for name in names:
        code = PROBE + (
            f"assert native.module().instruction_set() == {name!r}\ntorch.save(results, {str(tmp_path / name)!r})\n"
        )
        done = python(code, SOFTPROMPT_ISA=name)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(tmp_path / name)
    for name in names[:-1]:
        for a, b in zip(results[name], results["baseline"], strict=True):
            tolerance = max(2e-5, torch.finfo(b.dtype).eps)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=2e-5 * float(b.abs().max()) + 1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space this way")
def test_a_workspace_that_does_not_fit_is_a_memory_error():
    code = """
import resource, torch
from softprompt_kernels.ops import kl_div
logits = torch.randn(512, 30000)
kl_div(logits, logits, backend="cpu")
torch.set_num_threads(512)  # each thread needs a workspace of its own
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
try:
    kl_div(logits, logits, backend="cpu")
except MemoryError:
    print("MemoryError")
"""
    done = python(code)
    assert done.stdout.strip() == "MemoryError", done.stderr


# --- what the bindings refuse before a pointer is followed ------------------------------------------------------------

ADDRESS = 16  # of no memory: whoever follows it crashes

CALLS = {
    "kl_rows": {
        "student": ADDRESS,
        "teacher": ADDRESS,
        "student_bias": 0,
        "teacher_bias": 0,
        "loss": ADDRESS,
        "rows": 2,
        "vocab": 5,
        "student_stride": 5,
        "teacher_stride": 5,
        "divergence": 0,
        "beta": 0.5,
        "softcap": 0.0,
        "gradient": True,
        "threads": 1,
    },
    "kl_logits": {
        "student": ADDRESS,
        "teacher": ADDRESS,
        "weights": 0,
        "row_scale": ADDRESS,
        "gradient": ADDRESS,
        "loss": 0,
        "rows": 2,
        "vocab": 5,
        "columns": 5,
        "student_stride": 5,
        "teacher_stride": 5,
        "gradient_stride": 5,
        "student_dtype": 0,
        "teacher_dtype": 0,
        "divergence": 0,
        "beta": 0.5,
        "temperature": 1.0,
        "threads": 1,
    },
    "expectation_rows": {
        "logits": ADDRESS,
        "bias": 0,
        "labels": 0,
        "label_logit": 0,
        "row_max": ADDRESS,
        "row_sum": ADDRESS,
        "bias_sum": 0,
        "mean": ADDRESS,
        "rows": 2,
        "columns": 5,
        "size": 3,
        "stride": 5,
        "mean_stride": 3,
        "first_column": 0,
        "bias_scale": 1.0,
        "threads": 1,
    },
    "kl_tile": {
        "student": ADDRESS,
        "teacher": ADDRESS,
        "student_bias": 0,
        "teacher_bias": 0,
        "state": ADDRESS,
        "gradient_accumulator": ADDRESS,
        "mean_accumulator": ADDRESS,
        "rows": 2,
        "columns": 5,
        "size": 3,
        "student_stride": 5,
        "teacher_stride": 5,
        "gradient_stride": 3,
        "mean_stride": 3,
        "divergence": 0,
        "softcap": 0.0,
        "threads": 1,
    },
}

REFUSED = [
    ("kl_rows", {"rows": -1}, "rows must be at least 0; got -1"),
    ("kl_rows", {"vocab": 0}, "vocab must be in [1, 2147483647]; got 0"),
    ("kl_rows", {"student_stride": 4}, "student_stride must be in [5, "),
    ("kl_rows", {"beta": float("nan")}, "beta must be in [0, 1]; got nan"),
    ("kl_rows", {"softcap": -1.0}, "softcap must be finite and at least 0; got -1"),
    ("kl_rows", {"threads": 0}, "threads must be in [1, 4096]; got 0"),
    ("kl_rows", {"loss": 0}, "loss must be an address; got 0"),
    ("kl_logits", {"columns": 4}, "columns must be in [5, 2147483647]; got 4"),
    ("kl_logits", {"student_stride": -5}, "student_stride must be in [0, "),
    ("kl_logits", {"gradient_stride": 0}, "gradient_stride must be in [5, "),
    (
        "kl_logits",
        {"student_dtype": 3},
        "student_dtype must be one of 0 (float32), 1 (bfloat16), 2 (float16); got 3",
    ),
    ("kl_logits", {"temperature": 0.0}, "temperature must be finite and above 0; got 0"),
    ("kl_logits", {"row_scale": 0}, "row_scale must be an address; got 0"),
    ("kl_logits", {"gradient": 0}, "loss must be an address; got 0"),
    ("expectation_rows", {"stride": 4}, "stride must be in [5, "),
    ("expectation_rows", {"mean_stride": 2}, "mean_stride must be in [3, "),
    ("expectation_rows", {"labels": ADDRESS}, "label_logit must be given with labels; got none"),
    ("expectation_rows", {"label_logit": ADDRESS}, "labels must be given with label_logit; got none"),
    ("expectation_rows", {"bias_sum": ADDRESS}, "bias must be given with bias_sum; got none"),
    ("expectation_rows", {"first_column": -1}, "first_column must be at least 0; got -1"),
    ("kl_tile", {"columns": 0}, "columns must be in [1, 2147483647]; got 0"),
    ("kl_tile", {"teacher_stride": 4}, "teacher_stride must be in [5, "),
    ("kl_tile", {"gradient_stride": 2}, "gradient_stride must be in [3, "),
    ("kl_tile", {"mean_stride": 2}, "mean_stride must be in [3, "),
    ("kl_tile", {"mean_accumulator": 0}, "mean_accumulator must be given with gradient_accumulator; got none"),
    ("kl_tile", {"state": 0}, "state must be an address; got 0"),
    ("kl_tile", {"softcap": float("inf")}, "softcap must be finite and at least 0; got inf"),
]


@pytest.mark.parametrize(("function", "changes", "message"), REFUSED, ids=[f"{f}: {m}" for f, _, m in REFUSED])
def test_sizes_and_strides_are_checked_before_pointers_are_followed(module, function, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(module, function)(**{**CALLS[function], **changes})


DIVERGENCES_OF = {
    "kl_rows": "0 (forward), 1 (reverse), 2 (jsd)",
    "kl_logits": "0 (forward), 1 (reverse), 2 (jsd)",
    "kl_tile": "0 (forward), 1 (reverse)",
}


UNKNOWN = [(f, n) for f in DIVERGENCES_OF for n in (-1, 2, 3, 2**31 - 1) if f"{n} (" not in DIVERGENCES_OF[f]]


def test_every_binding_with_a_divergence_is_in_the_table(module):
    takes_divergence = {name for name in dir(module) if "divergence: " in (getattr(module, name).__doc__ or "")}
    assert DIVERGENCES_OF.keys() == takes_divergence
    everything = ", ".join(f"{number} ({kind})" for kind, number in DIVERGENCES.items())
    assert DIVERGENCES_OF["kl_rows"] == everything


@pytest.mark.parametrize(("function", "number"), UNKNOWN)
def test_an_unknown_divergence_is_refused_with_the_accepted_ones(module, function, number):
    message = f"divergence must be one of {DIVERGENCES_OF[function]}; got {number}"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(module, function)(**{**CALLS[function], "divergence": number})


def test_float64_is_refused_with_the_argument():
    logits, single = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"cpu: student_logits is torch.float64, and it computes in fp32"):
        kl_div(logits, logits, backend="cpu")
    with pytest.raises(ValueError, match=r"cpu: teacher_logits is torch.float64, and it computes in fp32"):
        kl_div(single, logits, backend="cpu")
    with pytest.raises(ValueError, match=r"cpu: student_hidden is torch.float64, and it computes in fp32"):
        linear_kl_div(logits, logits, torch.randn(9, 5, dtype=torch.float64), backend="cpu")
