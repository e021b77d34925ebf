"""The ops in PyTorch: opcheck, torch.compile, calls that bypass the dispatcher, second derivatives, GEMMs per call."""

import dataclasses
import sys

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from torch.testing._internal.two_tensor import TwoTensor

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, prompt_attention, teacher_moments
from softprompt_kernels.ops.autograd import scale_rows_op
from softprompt_kernels.ops.kl_div import backward_op as kl_div_backward
from softprompt_kernels.ops.kl_div import forward_op as kl_div_forward
from softprompt_kernels.ops.linear_kl_div import backward_op as linear_backward
from softprompt_kernels.ops.linear_kl_div import forward_op as linear_forward
from softprompt_kernels.ops.moments import student_op, teacher_op
from softprompt_kernels.ops.prompt_attention import attention_op as attention
from softprompt_kernels.ops.prompt_attention import backward_op as attention_backward

TOKENS, SIZE, VOCAB = 6, 4, 30
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORWARD_ONLY = ("test_schema", "test_faketensor")  # for ops without a gradient


def randn(*shape, grad=False):
    return torch.randn(shape).requires_grad_(grad)


def attention_inputs(grad=False):
    tensors = [randn(2, 4, 3, 8, grad=grad), randn(2, 2, 5, 8, grad=grad), randn(2, 2, 5, 6, grad=grad)]
    tensors += [randn(3, 2, 4, 8, grad=grad), randn(3, 2, 4, 6, grad=grad)]
    index, lengths, own = torch.tensor([2, 0]), torch.tensor([4, 1, 3]), torch.tensor([5, 4])
    return [*tensors, index, lengths, own, None, randn(4, grad=grad), True, None, None, 0.3]


def head_inputs(grad=False):
    weights = torch.tensor([1, 0, 2, 0.5, 1, 1])
    return [randn(TOKENS, SIZE, grad=grad), randn(VOCAB, SIZE), randn(VOCAB), randn(TOKENS, SIZE), None, weights]


HEAD_OPTIONS = [None, 0.9, "forward", 0.5, 2.0, 28, 4]


@pytest.mark.refused("simt", "cuda", match="float32")
def test_attention_passes_opcheck(backend):
    torch.library.opcheck(attention.through_dispatcher, (*attention_inputs(grad=True), backend), test_utils=ALL)


@pytest.mark.refused("simt", "cuda", match="float32")
def test_attention_backward_passes_opcheck(backend):
    inputs = attention_inputs()
    out, lse = attention.through_dispatcher(*inputs, backend)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    for needs in ([True] * 6, [False, False, True, True, False, False]):
        arguments = (*grads, out, lse, *inputs, backend, needs)
        torch.library.opcheck(attention_backward, arguments, test_utils=FORWARD_ONLY)


def test_kl_div_passes_opcheck(backend):
    options = ("jsd", 0.3, 2.0, 28, backend)
    inputs = (randn(TOKENS, VOCAB, grad=True), randn(TOKENS, VOCAB), torch.tensor([1, 0, 2, 0.5, 1, 1]), *options)
    torch.library.opcheck(kl_div_forward, inputs, test_utils=ALL)
    _, statistics = kl_div_forward(inputs[0].detach(), *inputs[1:])
    arguments = (torch.ones(TOKENS), statistics, inputs[0].detach(), *inputs[1:])
    torch.library.opcheck(kl_div_backward, arguments, test_utils=FORWARD_ONLY)


def test_linear_kl_div_passes_opcheck(backend):
    torch.library.opcheck(linear_forward, (*head_inputs(grad=True), True, *HEAD_OPTIONS, backend), test_utils=ALL)
    arguments = (torch.ones(TOKENS), *head_inputs(), *HEAD_OPTIONS, backend, [True, True, False])
    torch.library.opcheck(linear_backward, arguments, test_utils=FORWARD_ONLY)


def test_moments_pass_opcheck(backend):
    student, weight, bias, teacher, _, weights = head_inputs()
    options = (0.9, 2.0, 28, 4, backend)
    torch.library.opcheck(teacher_op, (teacher, weight, bias, *options), test_utils=FORWARD_ONLY)
    mean, entropy, bias_mean = teacher_op(teacher, weight, bias, *options)
    labels = torch.tensor([1, -100, 3, 0, 2, 9])
    inputs = (student.requires_grad_(), weight, bias, mean, entropy, bias_mean, labels, weights, True, 0.3, *options)
    torch.library.opcheck(student_op, inputs, test_utils=ALL)


def test_scale_rows_passes_opcheck():
    torch.library.opcheck(scale_rows_op, (randn(5, 3), randn(5), randn(5, 3).double(), "op"), test_utils=FORWARD_ONLY)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def losses(student, teacher, weight, backend):
    moments = teacher_moments(teacher, weight, backend=backend)
    weights, labels, options = torch.tensor([1.0, 0, 2, 1, 1, 1]), torch.arange(TOKENS), {"backend": backend}
    return (
        linear_kl_div(student, teacher, weight, weights=weights, temperature=2.0, **options)
        + linear_kl_div_from_moments(student, moments, weight, labels=labels, label_weight=0.5, **options)
        + kl_div(student @ weight.mT, teacher @ weight.mT, divergence="jsd", **options)
    )


def test_losses_compile_in_one_graph_and_give_the_same_bits(backend):
    student, teacher, weight = randn(TOKENS, SIZE, grad=True), randn(TOKENS, SIZE), randn(VOCAB, SIZE)
    eager = losses(student, teacher, weight, backend)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(student, teacher, weight, backend)
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (eager, compiled)))


def attention_sum(query, key, value, prompt_key, prompt_value):
    out, lse = prompt_attention(query, key, value, prompt_key, prompt_value, return_lse=True)
    return (out * out).sum() + lse.sum()


def test_attention_compiles_in_one_graph_and_gives_the_same_bits(attention_tensors):
    inputs = attention_tensors(dtype=torch.float32, grad=True)
    eager = attention_sum(*inputs)
    compiled = torch.compile(attention_sum, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(eager, compiled)
    for e, c in zip(*(torch.autograd.grad(x, inputs) for x in (eager, compiled)), strict=True):
        assert torch.equal(e, c)


# --- calls that bypass the dispatcher ---------------------------------------------------------------------------------


class DispatchedOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the names of the ops that go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class CalledFunctions(torch.overrides.TorchFunctionMode):
    """Records the functions of torch that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


OPS = {"softprompt_kernels::prompt_attention", "softprompt_kernels::prompt_attention_backward"}


@pytest.fixture
def no_dispatcher(monkeypatch):
    """Attention fails when it goes through the dispatcher."""
    module = sys.modules["softprompt_kernels.ops.prompt_attention"]

    def fail(*_):
        pytest.fail("a call went through the dispatcher")

    monkeypatch.setattr(module, "attention_op", dataclasses.replace(attention, through_dispatcher=fail))
    monkeypatch.setattr(module, "backward_op", fail)


def test_calls_that_nothing_intercepts_bypass_the_dispatcher(attention_tensors, no_dispatcher, monkeypatch):
    inputs = attention_tensors(dtype=torch.float32, grad=True)
    module = sys.modules["softprompt_kernels.ops.prompt_attention"]
    monkeypatch.setattr(module, "_passed", set())
    torch.autograd.grad(attention_sum(*inputs), inputs)
    with torch.no_grad():
        attention_sum(*inputs)
    monkeypatch.setattr(module, "_check_tensors", lambda *_: pytest.fail("a call like one before was checked again"))
    attention_sum(*inputs)


def test_the_record_of_checked_calls_is_bounded(monkeypatch):
    module = sys.modules["softprompt_kernels.ops.prompt_attention"]
    monkeypatch.setattr(module, "_passed", set())
    monkeypatch.setattr(module, "_MAX_PASSED", 3)
    for tokens in range(1, 8):
        own, prompt = torch.randn(1, 1, tokens, 4), torch.randn(1, 1, 2, 4)
        prompt_attention(own, own, own, prompt, prompt)
        assert 1 <= len(module._passed) <= 3


ON_A_GPU = (pytest.param(name, marks=pytest.mark.gpu) for name in ("triton-gpu", "cuda"))


@pytest.mark.parametrize("backend", ["reference", "composed", "cpu", *ON_A_GPU], indirect=True)
def test_gradients_have_the_memory_layout_of_dispatched_ones(attention_tensors, backend):
    inputs = attention_tensors(dtype=torch.float32, grad=True)
    out = prompt_attention(*inputs, backend=backend)
    bypassing = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    with DispatchedOps():
        dispatched = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for one, other in zip(bypassing, dispatched, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


def test_negated_views_zero_tensors_and_subclasses_are_computed_right(attention_tensors):
    inputs = attention_tensors(dtype=torch.float32, grad=True)
    out = prompt_attention(*inputs)
    grad_out = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, inputs[0], -grad_out, retain_graph=True)
    (found,) = torch.autograd.grad(out, inputs[0], torch._neg_view(grad_out), retain_graph=True)
    assert torch.equal(found, expected)
    (zero,) = torch.autograd.grad(out, inputs[0], torch._efficientzerotensor(out.shape), retain_graph=True)
    assert (zero == 0).all()
    twice = TwoTensor(grad_out, 2 * grad_out)
    (found,) = torch.autograd.grad(out, inputs[0], twice)
    assert torch.equal(found.a, -expected)
    with torch.no_grad():
        assert torch.equal(
            prompt_attention(torch._neg_view(inputs[0]), *inputs[1:]), prompt_attention(-inputs[0], *inputs[1:])
        )


def test_modes_profilers_and_tracers_see_attention_and_its_backward(attention_tensors):
    inputs = attention_tensors(dtype=torch.float32, grad=True)
    alone = torch.autograd.grad(attention_sum(*inputs), inputs)
    with DispatchedOps() as ops:
        dispatched = torch.autograd.grad(attention_sum(*inputs), inputs)
    assert set(ops.names) >= OPS
    with torch.profiler.profile() as profile:
        profiled = torch.autograd.grad(attention_sum(*inputs), inputs)
    assert {event.key for event in profile.key_averages()} >= OPS
    for before_dispatch in (False, True):
        make_fx = torch.fx.experimental.proxy_tensor.make_fx
        traced = make_fx(attention_sum, pre_dispatch=before_dispatch)(*[tensor.detach() for tensor in inputs])
        assert any("softprompt_kernels.prompt_attention" in str(node.target) for node in traced.graph.nodes)
    traced = torch.jit.trace(attention_sum, [tensor.detach() for tensor in inputs], check_trace=False)
    assert "softprompt_kernels::prompt_attention" in str(traced.graph)
    with CalledFunctions() as functions:
        attention_sum(*inputs)
    assert any("prompt_attention" in name for name in functions.names)
    for one, other, third in zip(alone, dispatched, profiled, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_subclasses_transforms_and_tangents_go_through_the_dispatcher(attention_tensors):
    inputs = attention_tensors(dtype=torch.float32)
    on_meta = [tensor.to("meta") for tensor in inputs]
    assert prompt_attention(*on_meta).device.type == "meta"
    with torch._subclasses.FakeTensorMode() as mode:
        fake = prompt_attention(*[mode.from_tensor(tensor) for tensor in inputs])
    assert isinstance(fake, torch._subclasses.FakeTensor)
    mapped = torch.vmap(prompt_attention)(*[tensor[None] for tensor in inputs])
    assert torch.equal(mapped[0], prompt_attention(*inputs))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        query = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        prompt_attention(query, *inputs[1:])


def test_a_call_is_checked_unless_an_equal_call_has_passed(attention_tensors):
    query, key, value, prompt_key, prompt_value = attention_tensors(dtype=torch.float32)
    for _ in range(2):
        prompt_attention(query, key, value, prompt_key, prompt_value, softcap=3.0)
        with pytest.raises(TypeError, match="key must have query's dtype"):
            prompt_attention(query, key.to(torch.bfloat16), value, prompt_key, prompt_value, softcap=3.0)
        with pytest.raises(ValueError, match="window must be None or at least 1; got 0"):
            prompt_attention(query, key, value, prompt_key, prompt_value, window=0)
        with pytest.raises(ValueError, match="value must have shape"):
            prompt_attention(query, key, value[:, :, 1:], prompt_key, prompt_value, softcap=3.0)
        with pytest.raises(TypeError, match="prompt_key must be a tensor; got list"):
            prompt_attention(query, key, value, [prompt_key], prompt_value, softcap=3.0)
        with pytest.raises(TypeError, match="query must be a tensor; got NoneType"):
            prompt_attention(None, key, value, prompt_key, prompt_value, softcap=3.0)
        with pytest.raises(TypeError, match="key must be a tensor; got float"):
            prompt_attention(query, 3.0, value, prompt_key, prompt_value, softcap=3.0)
        for name in ("prompt_index", "prompt_lengths", "key_lengths"):
            with pytest.raises(TypeError, match=f"{name} must be None or a tensor; got int"):
                prompt_attention(query, key, value, prompt_key, prompt_value, **{name: 3})
        with pytest.raises(TypeError, match="sinks must be a tensor; got float"):
            prompt_attention(query, key, value, prompt_key, prompt_value, sinks=0.5)
        softcap = torch.tensor(2.0)
        prompt_attention(query, key, value, prompt_key, prompt_value, softcap=softcap)
        with pytest.raises(ValueError, match=r"softcap must be None or a finite number above 0; got -2\.0"):
            prompt_attention(query, key, value, prompt_key, prompt_value, softcap=softcap.neg_())
        for option in ({"window": 2.5}, {"causal": "no"}):
            with pytest.raises((RuntimeError, TypeError)):
                prompt_attention(query, key, value, prompt_key, prompt_value, **option)
        with pytest.raises(ValueError, match="backend must be None or one of"):
            prompt_attention(query, key, value, prompt_key, prompt_value, softcap=3.0, backend="fast")


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_a_clear_error(attention_tensors):
    student, teacher, weight = randn(TOKENS, SIZE, grad=True), randn(TOKENS, SIZE), randn(VOCAB, SIZE)
    moments = teacher_moments(teacher, weight)
    query, *others = attention_tensors(grad=True)
    cases = {
        "prompt_attention": (prompt_attention(query, *others).sum(), query),
        "kl_div": (kl_div(student, teacher), student),
        "linear_kl_div": (linear_kl_div(student, teacher, weight), student),
        "linear_kl_div_from_moments": (linear_kl_div_from_moments(student, moments, weight), student),
    }
    trained = weight.clone().requires_grad_()
    cases["linear_kl_div "] = (linear_kl_div(student, teacher, trained), student)
    for name, (loss, by) in cases.items():
        (gradient,) = torch.autograd.grad(loss, by, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name.strip()} has no second derivative"):
            gradient.sum().backward()


class GemmCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts GEMMs, in units of one of the head's size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[1] / (TOKENS * SIZE * VOCAB)
        return function(*args, **(kwargs or {}))


def gemms(call):
    """GEMMs of the kernels in a call."""
    from softprompt_kernels.ops import dispatch

    counts = []
    select = dispatch.select

    def select_counted(*arguments):
        kernel = select(*arguments)

        class CountedKernel:
            @staticmethod
            def forward(*inputs):
                with GemmCounter() as counter:
                    result = kernel.forward(*inputs)
                counts.append(counter.count)
                return result

            @staticmethod
            def backward(*inputs):
                with GemmCounter() as counter:
                    result = kernel.backward(*inputs)
                counts.append(counter.count)
                return result

        return CountedKernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "select", select_counted)
        call()
    return sum(counts)


def test_only_the_gemms_that_are_needed_are_computed():
    """GEMMs of the head's size: live teacher 3, moments 2; without a gradient 2 and 1; a trained head 6."""
    student, teacher, weight = randn(TOKENS, SIZE, grad=True), randn(TOKENS, SIZE), randn(VOCAB, SIZE)
    trained, moments = weight.clone().requires_grad_(), teacher_moments(teacher, weight)
    options = {"backend": "composed"}

    def without_gradient(function, *inputs):
        with torch.no_grad():
            function(*inputs, **options)

    assert gemms(lambda: linear_kl_div(student, teacher, weight, **options).backward()) == 3
    assert gemms(lambda: without_gradient(linear_kl_div, student, teacher, weight)) == 2
    assert gemms(lambda: linear_kl_div(student.detach(), teacher, weight, **options)) == 2
    assert gemms(lambda: linear_kl_div(student, teacher, trained, **options).backward()) == 6
    assert gemms(lambda: linear_kl_div_from_moments(student, moments, weight, **options).backward()) == 2
    assert gemms(lambda: without_gradient(linear_kl_div_from_moments, student, moments, weight)) == 1
    assert gemms(lambda: teacher_moments(teacher, weight, **options)) == 2
