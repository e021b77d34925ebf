"""linear_kl_div against the float64 oracle on explicit logits."""

import re

import pytest
import torch

from softprompt_kernels.kernels.problems.loss import DIVERGENCES
from softprompt_kernels.ops import linear_kl_div

TOKENS, SIZE, VOCAB = 7, 5, 40


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def explicit_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0, valid_vocab=None):
    logits = hidden.double() @ weight.double().mT
    logits = logits if bias is None else logits + bias.double()
    logits = logits * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits[:, :valid_vocab]


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "everything": {"bias": True, "softcap": 2.0, "logit_scale": 0.6, "valid_vocab": 33},
}


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("head", HEADS)
def test_rows_and_all_gradients_equal_the_oracle(head, kind, chunk_tokens, backend, precision, divergence_oracle):
    student, teacher, weight = (
        randn(*shape, dtype=precision.dtype) for shape in ((TOKENS, SIZE), (TOKENS, SIZE), (VOCAB, SIZE))
    )
    options = dict(HEADS[head])
    if options.pop("bias", False):
        options["bias"] = randn(VOCAB, dtype=precision.dtype)
    fixed = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    row_options = {"beta": 0.3, "temperature": 1.7}
    inputs = [t.requires_grad_() for t in (student, weight, options.get("bias")) if t is not None]
    rows = linear_kl_div(
        student, teacher, weight, teacher_weight=weight.detach(), divergence=kind, reduction="none",
        chunk_tokens=chunk_tokens, backend=backend, **options, **row_options,
    )  # fmt: skip
    expected = divergence_oracle(
        explicit_logits(student, weight, **options),
        explicit_logits(teacher, weight.detach(), **fixed),
        kind,
        **row_options,
    )
    tolerance = {"rtol": precision.tolerance, "atol": precision.tolerance / 10, "check_dtype": False}
    torch.testing.assert_close(rows, expected, **tolerance)
    grad_rows = torch.randn_like(rows)
    actual, wanted = (torch.autograd.grad(x, inputs, grad_rows.to(x.dtype)) for x in (rows, expected))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, **tolerance)


def test_a_shared_head_equals_two_equal_heads(backend, precision):
    """A shared head is one GEMM for student and teacher, two heads are two GEMMs."""
    student, teacher, weight = (
        randn(*shape, dtype=precision.dtype) for shape in ((TOKENS, SIZE), (TOKENS, SIZE), (VOCAB, SIZE))
    )
    student.requires_grad_()
    options = {"bias": randn(VOCAB, dtype=precision.dtype), "softcap": 2.0, "chunk_tokens": 3, "backend": backend}
    shared = linear_kl_div(student, teacher, weight, **options)
    apart = linear_kl_div(student, teacher, weight, teacher_weight=weight.clone(), **options)
    torch.testing.assert_close(shared, apart)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (shared, apart)))


def test_gradient_with_a_frozen_head_equals_that_with_a_trained_one(backend, precision):
    student, teacher, weight = (
        randn(*shape, dtype=precision.dtype) for shape in ((TOKENS, SIZE), (TOKENS, SIZE), (VOCAB, SIZE))
    )
    student.requires_grad_()
    row_weights = torch.tensor([1, 0, 2, 0.5, 0, 1, 1])

    def gradient(weight):
        loss = linear_kl_div(student, teacher, weight, weights=row_weights, backend=backend)
        return torch.autograd.grad(loss * 3, student)[0]

    torch.testing.assert_close(gradient(weight), gradient(weight.clone().requires_grad_()))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(kind):
    teacher, teacher_weight = randn(3, 4), randn(9, 4)
    inputs = (randn(3, 2).requires_grad_(), randn(9, 2).requires_grad_(), randn(9).requires_grad_())

    def loss(student, weight, bias):
        return linear_kl_div(
            student, teacher, weight, teacher_weight=teacher_weight, bias=bias, softcap=3.0, divergence=kind,
            temperature=1.3, valid_vocab=8, reduction="none", backend="reference",
        )  # fmt: skip

    # The bias is in student and teacher logits, but the gradient is only that through the student's.
    fixed = inputs[2].detach()
    assert torch.autograd.gradcheck(lambda s, w: loss(s, w, fixed), inputs[:2])


def test_teacher_of_another_size_and_dtype(backend, divergence_oracle):
    student, weight = randn(TOKENS, SIZE, dtype=torch.float32), randn(VOCAB, SIZE, dtype=torch.float32)
    teacher, teacher_weight = randn(TOKENS, 9, dtype=torch.bfloat16), randn(VOCAB, 9, dtype=torch.bfloat16)
    loss = linear_kl_div(student, teacher, weight, teacher_weight=teacher_weight, backend=backend)
    expected = divergence_oracle(explicit_logits(student, weight), explicit_logits(teacher, teacher_weight)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.refused("triton", match="bfloat16"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_16_bits_are_no_worse_than_pytorch(dtype, backend, divergence_oracle):
    """At most 3 times the error of a 16-bit head in PyTorch with an fp32 softmax, which is far more than is needed."""
    student, weight = randn(16, 32, dtype=dtype).requires_grad_(), (randn(200, 32) / 4).to(dtype)
    teacher = (student.detach().double() + 0.3 * randn(16, 32)).to(dtype)

    def theirs(student):
        logits = (h @ weight.mT for h in (student, teacher))
        log_student, log_teacher = (torch.log_softmax(z.float(), -1) for z in logits)
        return torch.nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")

    def gradient(loss, hidden):
        return torch.autograd.grad(loss, hidden)[0].double()

    exact = student.detach().double().requires_grad_()
    expected = divergence_oracle(explicit_logits(exact, weight), explicit_logits(teacher, weight)).mean()
    ours, other = linear_kl_div(student, teacher, weight, backend=backend), theirs(student)
    assert abs(ours - expected) <= 2 * abs(other - expected) + 1e-6 * expected
    wanted = gradient(expected, exact)
    assert (gradient(ours, student) - wanted).norm() <= 3 * (gradient(other, student) - wanted).norm()


def test_fp16_gradients_survive_a_loss_scale(backend):
    """Row gradients of 1e-9 are below fp16's smallest number until the loss scale lifts them."""
    student = randn(4, 8, dtype=torch.float16).requires_grad_()
    weight = randn(30, 8, dtype=torch.float16) * 0.02
    teacher = student.detach() + torch.tensor(2**-9, dtype=torch.float16)
    loss = linear_kl_div(student, teacher, weight, temperature=1.0, backend=backend)
    scaled = torch.autograd.grad(loss * 2.0**16, student)[0].double() / 2.0**16
    exact = student.detach().double().requires_grad_()
    wanted = torch.autograd.grad(linear_kl_div(exact, teacher, weight.double(), backend="reference"), exact)[0]
    assert wanted.abs().max() < torch.finfo(torch.float16).tiny
    torch.testing.assert_close(scaled, wanted, rtol=2e-2, atol=1e-9)


def test_nothing_of_the_size_of_all_logits_is_allocated():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    student, teacher, weight = (randn(*s, dtype=torch.float32) for s in ((64, 4), (64, 4), (1000, 4)))
    with Largest() as seen:
        from softprompt_kernels.kernels.composed import linear_kl_div as kernel
        from softprompt_kernels.kernels.problems.loss import Divergence, Head, HeadProblem

        head = Head(weight, None, None, 1.0)
        kernel.forward(HeadProblem(student, teacher, head, head, None, Divergence("forward", 0.5, 1.0), 8), True)
    assert seen.elements <= 2 * (2**16) < 64 * 1000 * 3


ERRORS = [
    (
        {"weight": (VOCAB, SIZE + 1)},
        ValueError,
        "weight must have shape [V, d] with d = 5 of student_hidden; got [40, 6]",
    ),
    ({"teacher": (TOKENS, 9)}, ValueError, "weight must have shape [V, d] with d = 9 of teacher_hidden; got [40, 5]"),
    ({"teacher": (3, SIZE)}, ValueError, "teacher_hidden must have student_hidden's leading dimensions [7]; got [3]"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must have shape [V] = [40]; got [3]"),
    ({"softcap": 0.0}, ValueError, "softcap must be None or a finite number above 0; got 0.0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite; got inf"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be None or at least 1; got 0"),
    ({"teacher_weight": torch.zeros(50, SIZE)}, ValueError, "valid_vocab must be given where the heads have different"),
    ({"teacher_weight": torch.zeros(50, 4)}, ValueError, "teacher_weight must have shape [V, d] with d = 5"),
    ({"valid_vocab": 0}, ValueError, "valid_vocab must be None or in [1, 40]; got 0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_error_names_argument_got_and_accepted(changes, error, message):
    student = randn(TOKENS, SIZE, dtype=torch.float32)
    teacher = randn(*changes.pop("teacher", (TOKENS, SIZE)), dtype=torch.float32)
    weight = randn(*changes.pop("weight", (VOCAB, SIZE)), dtype=torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        linear_kl_div(student, teacher, weight, **changes)


def test_student_and_weight_share_a_dtype():
    with pytest.raises(TypeError, match=r"weight must have student_hidden's dtype torch.float32; got torch.float64"):
        linear_kl_div(randn(2, 3, dtype=torch.float32), randn(2, 3), randn(5, 3))
