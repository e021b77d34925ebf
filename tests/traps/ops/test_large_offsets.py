"""Offsets beyond 2³¹ elements, reached through strides: the storage is never touched, so it costs no memory."""

import mmap

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div_from_moments, teacher_moments

FAR = 2**31 + 64  # elements between neighbours
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux: pages count when they are touched


def untouched(size):
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)


def far_apart(rows, *shape):
    """fp32 [rows, *shape] whose rows lie FAR elements apart in untouched anonymous memory."""
    size = torch.Size(shape).numel()
    memory = torch.frombuffer(untouched(4 * ((rows - 1) * FAR + size)), dtype=torch.float32)
    inner = torch.empty(shape).stride()
    tensor = memory.as_strided((rows, *shape), (FAR, *inner))
    tensor.copy_(torch.randn(tensor.shape))
    return tensor


@pytest.fixture(autouse=True)
def _room():
    if torch.get_default_device().type != "cpu":
        pytest.skip("the memory that nobody touches is the host's")
    try:
        untouched(4 * 3 * FAR).close()
    except OSError as error:
        pytest.skip(f"the system does not lend {12 * FAR} bytes of address space: {error}")


def test_attention_over_tensors_that_are_far_apart(backend, attention):
    torch.manual_seed(0)
    query, key, value = (far_apart(2, *s) for s in ((2, 3, 4), (1, 3, 4), (1, 3, 4)))
    prompt = far_apart(2, 1, 2, 4)
    inputs = [query, key, value, prompt, prompt]
    index = torch.tensor([1, 0])
    out = attention(*inputs, prompt_index=index, backend=backend)
    near = attention(*(t.contiguous() for t in inputs), prompt_index=index, backend=backend)
    assert torch.equal(out, near)


def test_losses_over_rows_that_are_far_apart(backend):
    torch.manual_seed(0)
    student, teacher = far_apart(2, 30), far_apart(2, 30)
    expected = kl_div(student.contiguous(), teacher.contiguous(), backend=backend)
    assert torch.equal(kl_div(student, teacher, backend=backend), expected)
    hidden, weight = far_apart(2, 8), torch.randn(30, 8)
    moments = teacher_moments(hidden, weight, backend=backend)
    loss = linear_kl_div_from_moments(hidden + 1, moments, weight, backend=backend)
    assert torch.equal(loss, linear_kl_div_from_moments(hidden.contiguous() + 1, moments, weight, backend=backend))
