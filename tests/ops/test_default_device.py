"""The default device of the caller changes no op: what an op makes is where its arguments are."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, prompt_attention, teacher_moments

N, V, D = 5, 40, 8


def _logits_loss(student, teacher, weight, backend):
    return kl_div(student @ weight.mT, (teacher @ weight.mT).detach(), backend=backend)


def _live_loss(student, teacher, weight, backend):
    return linear_kl_div(student, teacher, weight, divergence="jsd", chunk_tokens=2, backend=backend)


def _plain_loss(student, teacher, weight, backend):
    return linear_kl_div(student, teacher, weight.detach(), bias=teacher.new_zeros(V), backend=backend)


def _loss_from_moments(student, teacher, weight, backend):
    moments = teacher_moments(teacher, weight.detach(), bias=teacher.new_zeros(V), backend=backend)
    labels = torch.arange(N, device=student.device)
    return linear_kl_div_from_moments(
        student, moments, weight.detach(), bias=teacher.new_zeros(V), labels=labels, label_weight=0.3, backend=backend
    )


def _attention(student, teacher, weight, backend):
    query, key = student[None, None], teacher[None, None]
    return prompt_attention(query, key, key, weight[None, None], weight[None, None], backend=backend).square().mean()


@pytest.mark.parametrize("call", [_logits_loss, _live_loss, _plain_loss, _loss_from_moments, _attention])
@pytest.mark.parametrize("name", ["reference", "composed", "cpu"])
def test_the_default_device_changes_nothing(call, name, request):
    request.getfixturevalue("served")(name)
    results = []
    for default in (None, "meta"):
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(n, D, generator=generator, device="cpu") for n in (N, N, V)]
        student, weight = made[0].requires_grad_(), made[2].requires_grad_()
        torch.set_default_device(default)
        try:
            loss = call(student, made[1], weight, name)
            loss.backward()
        finally:
            torch.set_default_device(None)
        results.append([loss.detach(), student.grad, weight.grad])
    for one, other in zip(*results, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.fixture
def served():
    """`served("cpu")` skips the test where the compiled kernels are missing."""
    from softprompt_kernels.kernels.cpu import native

    def check(name):
        if name == "cpu" and native.missing():
            pytest.skip(f"the cpu backend: {native.missing()}")

    return check
