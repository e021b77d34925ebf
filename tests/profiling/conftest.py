"""Calls of every op, each pass, for a backend that runs on the CPU."""

from collections.abc import Callable

import pytest
import torch

from softprompt_kernels.ops import (
    kl_div,
    linear_kl_div,
    linear_kl_div_from_moments,
    prompt_attention,
    teacher_moments,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """At these sizes more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def _attend(backend: str, queries: int, prompt: int) -> None:
    size, dtype = (64, torch.float16) if backend == "simt" else (16, torch.float32)
    sizes = [(2, 4, queries), (2, 2, queries), (2, 2, queries), (1, 2, prompt), (1, 2, prompt)]
    query, key, value, prompt_key, prompt_value = (
        torch.randn(*each, size, dtype=dtype, requires_grad=True) for each in sizes
    )
    prompt_attention(query, key, value, prompt_key, prompt_value, backend=backend).float().sum().backward()


def _all_ops(backend: str) -> None:
    _attend(backend, queries=5, prompt=16)
    _attend(backend, queries=1, prompt=600)  # few rows and many keys: some backends split the keys
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    weight = torch.randn(40, 8)
    moments = teacher_moments(teacher, weight, backend=backend)
    linear_kl_div_from_moments(student, moments, weight, backend=backend).backward()
    linear_kl_div(student, teacher, weight, backend=backend).backward()
    linear_kl_div(student, teacher, weight.clone().requires_grad_(), backend=backend).backward()
    kl_div(torch.randn(6, 40, requires_grad=True), torch.randn(6, 40), backend=backend).backward()
    if backend == "cpu":  # memory holds the logits of few tokens: the vocabulary is streamed
        linear_kl_div(torch.randn(120, 4), torch.randn(120, 4), torch.randn(160_000, 4), backend=backend)


@pytest.fixture
def run_all_ops() -> Callable[[str], None]:
    """`run_all_ops(backend)` runs all ops, forward and backward, so that every kernel runs."""
    return _all_ops
