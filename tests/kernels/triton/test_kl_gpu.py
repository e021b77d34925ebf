"""The Triton losses on a GPU, which neither the interpreter nor a compiler can replace."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda finds none"),
]
KINDS = ("forward", "reverse", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIVE = {"plain": {}, "capped": {"softcap": 20.0, "temperature": 1.5, "bias": True}}


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    with torch.device("cuda"):
        yield


@pytest.fixture
def no_waiting():
    """CUDA raises an error for every call that would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def agree(actual, expected, dtype):
    error = (actual.double() - expected).norm()
    assert error <= (3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * expected.norm()


@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, dtype, vocab):
    student, teacher = ((torch.randn(300, vocab) * 2).to(dtype) for _ in range(2))
    weights = torch.rand(300)
    weights[7], student[7] = 0, torch.nan
    found = []
    for backend, wide in (("triton", lambda t: t), ("reference", torch.Tensor.double)):
        s = wide(student).clone().requires_grad_()
        loss = kl_div(s, wide(teacher), divergence=kind, temperature=1.5, weights=weights, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, s)))
    (loss, gradient), (expected, wanted) = found
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    agree(gradient, wanted, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_a_divergence_keeps_its_relative_accuracy(distance, kind):
    teacher = torch.randn(40, 50000) * 2
    student = teacher + distance * torch.randn_like(teacher)
    found = kl_div(student, teacher, divergence=kind, reduction="none", backend="triton")
    expected = kl_div(student.double(), teacher.double(), divergence=kind, reduction="none", backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", LIVE.values(), ids=LIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_heads(kind, dtype, options, trained):
    student, teacher = ((torch.randn(500, 256)).to(dtype) for _ in range(2))
    weight = (torch.randn(20001, 256) / 8).to(dtype)
    options = {**options, "bias": (torch.arange(20001) % 64 / 32 - 1).to(dtype) if "bias" in options else None}
    found = []
    for backend, wide in (("triton", lambda t: t), ("reference", torch.Tensor.double)):
        s, w = wide(student).clone().requires_grad_(), wide(weight).clone().requires_grad_(trained)
        loss = linear_kl_div(s, wide(teacher), w, divergence=kind, **options, chunk_tokens=128, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, [s, w][: 1 + trained])))
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=0)
    for actual, wanted in zip(found[0][1:], found[1][1:], strict=True):
        agree(actual, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(dtype):
    student, teacher = ((torch.randn(500, 256)).to(dtype) for _ in range(2))
    weight = (torch.randn(40001, 256) / 8).to(dtype)
    labels = torch.randint(-1, 40001, (500,))
    found = []
    for backend, wide in (("triton", lambda t: t), ("reference", torch.Tensor.double)):
        moments = teacher_moments(wide(teacher), wide(weight), backend=backend)
        s = wide(student).clone().requires_grad_()
        loss = linear_kl_div_from_moments(
            s, moments, wide(weight), labels=labels, label_weight=0.3, backend=backend
        )  # fmt: skip
        found.append((moments.mean, loss, *torch.autograd.grad(loss, s)))
    (mean, loss, gradient), (exact_mean, expected, wanted) = found
    assert (mean.double() - exact_mean).norm() <= 1e-5 * exact_mean.norm()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    agree(gradient, wanted, dtype)


def losses(student, teacher, weight, moments, weights):
    options = {"weights": weights, "backend": "triton"}
    return (
        linear_kl_div(student, teacher, weight, **options)
        + linear_kl_div_from_moments(student, moments, weight, **options)
        + kl_div(student, teacher, divergence="jsd", **options)
    )


@pytest.fixture
def tensors():
    student, teacher, weight = torch.randn(64, 128), torch.randn(64, 128), torch.randn(5000, 128) / 8
    moments = teacher_moments(teacher, weight, backend="triton")
    return student.requires_grad_(), teacher, weight, moments, (torch.rand(64) > 0.3).float()


def test_nothing_waits_for_the_device(tensors, no_waiting):
    torch.autograd.grad(losses(*tensors), tensors[0])


def test_a_cuda_graph_of_forward_and_backward_replays(tensors):
    student = tensors[0]
    for _ in range(2):  # the first call compiles
        expected = torch.autograd.grad(losses(*tensors), student)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = torch.autograd.grad(losses(*tensors), student)[0]
    graph.replay()
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(gradient, torch.autograd.grad(losses(*tensors), student)[0])
