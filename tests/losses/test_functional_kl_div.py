"""`losses.functional.kl_div` is `torch.nn.functional.kl_div` in every form, and blocks serve the usual ones."""

import copy
import pickle
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as torch_functional

from softprompt_kernels import KLDivLoss
from softprompt_kernels.losses import functional

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean'", "ignore:size_average and reduce")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "BLOCK", 5)


def both(input, target, **options):
    """Value and gradients of the input, ours and PyTorch's."""
    results = []
    for function in (functional.kl_div, torch_functional.kl_div):
        x = input.detach().clone().requires_grad_()
        loss = function(x, target, **options)
        loss.backward(torch.ones_like(loss) * 0.7)
        results.append((loss.detach(), x.grad))
    return results


def served_by_blocks(*arguments, **options) -> bool:
    graph = functional.kl_div(*arguments, **options).grad_fn
    names = set()
    while graph is not None:
        names.add(type(graph).__name__)
        graph = graph.next_functions[0][0] if graph.next_functions else None
    return "_BlockSumBackward" in names


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    reduction=st.sampled_from(("none", "sum", "batchmean", "mean")),
    log_target=st.booleans(),
    zeros=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 1000),
)
def test_every_reduction_shape_and_layout(shape, reduction, log_target, zeros, transposed, dtype, seed) -> None:
    """Inputs need not be normalised, and logarithms of the target neither."""
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    t = t if log_target else t.exp()
    if zeros and not log_target:
        t = torch.where(t < 1, 0, t)
    if transposed:
        x, t = x.transpose(0, -1), t.transpose(0, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (ours, our_gradient), (theirs, their_gradient) = both(x, t, reduction=reduction, log_target=log_target)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_deprecated_arguments(log_target, size_average, reduce, reduction) -> None:
    x, t = torch.randn(4, 6), torch.rand(4, 6)
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction, "log_target": log_target}
    (ours, our_gradient), (theirs, their_gradient) = both(x, t, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("log_target", [False, True])
def test_infinities_and_zeros_give_what_pytorch_gives(log_target) -> None:
    inf = float("inf")
    for x_0 in (-1.0, -inf):
        for t_0 in (-inf, -2.0) if log_target else (0.0, 0.5):
            x, t = torch.full((4, 6), -1.0), torch.full((4, 6), 0.5)
            x[1, 2], t[1, 2] = x_0, t_0
            assert served_by_blocks(x.requires_grad_(), t, reduction="sum", log_target=log_target)
            (ours, our_gradient), (theirs, their_gradient) = both(x, t, reduction="sum", log_target=log_target)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            torch.testing.assert_close(our_gradient, their_gradient, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
def test_first_and_second_derivatives(log_target) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.rand(3, 4, dtype=torch.float64)

    def loss(x):
        return functional.kl_div(x, t, reduction="batchmean", log_target=log_target)

    assert served_by_blocks(x, t, reduction="batchmean", log_target=log_target)
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))
    loss_of_theirs = torch_functional.kl_div(x, t, reduction="batchmean", log_target=log_target)
    torch.testing.assert_close(
        torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss_of_theirs, x)[0], rtol=1e-12, atol=0
    )
    per_sample = torch.func.vmap(torch.func.grad(loss), randomness="error")(torch.stack([x.detach(), x.detach() + 1]))
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss)(x.detach() + 1))


@pytest.mark.parametrize("log_target", [False, True])
def test_forward_mode_derivatives_are_pytorchs(log_target) -> None:
    x, t = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    results = []
    for function in (functional.kl_div, torch_functional.kl_div):

        def loss(x, t, function=function):
            return function(x**2, t, reduction="batchmean", log_target=log_target)

        tangents = torch.func.jvp(loss, (x, t), (torch.ones_like(x), torch.ones_like(t)))
        results.append((*tangents, torch.func.hessian(loss)(x, t)))
    torch.testing.assert_close(*results)


def test_a_target_that_needs_a_gradient_gets_pytorchs() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t = (torch.rand(3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    for log_target in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, t, log=log_target: functional.kl_div(x, t, reduction="sum", log_target=log), (x, t)
        )


@pytest.mark.parametrize(
    ("x", "t"),
    [
        (torch.randn(4, 6), torch.rand(6)),  # broadcasting
        (torch.randn(4, 6), torch.rand(4, 6).double()),  # mixed dtypes
        (torch.randn(()), torch.rand(())),
        (torch.randn(0, 6), torch.rand(0, 6)),
        (torch.randn(4, 6, device="meta"), torch.rand(4, 6, device="meta")),
        (torch.randn(1, 3), torch.rand(1, 3)),  # one block
    ],
    ids=["broadcast", "dtypes", "scalar", "empty", "meta", "small"],
)
def test_other_calls_are_pytorchs(x, t) -> None:
    for reduction in ("sum", "batchmean", "mean"):
        ours = functional.kl_div(x, t, reduction=reduction)
        theirs = torch_functional.kl_div(x, t, reduction=reduction)
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        if ours.device.type != "meta":
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not served_by_blocks(x.clone().requires_grad_(), t, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_keep_their_dtype_and_are_summed_in_fp32(dtype) -> None:
    x, t = torch.full((50, 40), -0.7, dtype=dtype), torch.full((50, 40), 0.3, dtype=dtype)  # each rounds the same way
    exact = torch_functional.kl_div(x.double(), t.double(), reduction="batchmean")
    (ours, gradient), (_, their_gradient) = both(x, t, reduction="batchmean")
    assert ours.dtype == gradient.dtype == dtype
    assert abs(ours.double() - exact) <= 0.51 * torch.finfo(dtype).eps * abs(exact)
    torch.testing.assert_close(gradient, their_gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            functional.kl_div(x, t, reduction="sum"), torch_functional.kl_div(x, t, reduction="sum")
        )


def test_errors_are_pytorchs() -> None:
    for arguments in (
        (torch.randn(2, 9), torch.rand(2, 9), None, None, "median"),
        (torch.randn(2, 9), torch.rand(2, 5), None, None, "sum"),
    ):
        with pytest.raises((ValueError, RuntimeError)) as ours:
            functional.kl_div(*arguments)
        with pytest.raises(ours.type) as theirs:
            torch_functional.kl_div(*arguments)
        assert str(ours.value) == str(theirs.value)


def test_the_module_is_a_kldivloss_that_copies_pickles_and_compiles() -> None:
    module = KLDivLoss(reduction="batchmean", log_target=True)
    assert isinstance(module, torch.nn.KLDivLoss) and not module.state_dict()
    assert repr(module) == "KLDivLoss(reduction='batchmean', log_target=True)"
    assert KLDivLoss(size_average=False).reduction == "sum"
    x, t = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7)
    expected = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(x, t)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), compiled):
        value = loss(x, t)
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("log_target", [False, True])
def test_faster_than_pytorch_where_it_says_so(log_target, monkeypatch) -> None:
    """Tensors of 36 MiB, one thread, the shortest of alternating rounds: what others on the machine disturb least."""
    monkeypatch.undo()
    x = torch.randn(288, 32768).requires_grad_()
    t = torch.randn(288, 32768) if log_target else torch.rand(288, 32768)
    times: dict = {functional.kl_div: [], torch_functional.kl_div: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):
            for function, taken in times.items():
                start = time.perf_counter()
                function(x, t, reduction="batchmean", log_target=log_target).backward()
                taken.append(time.perf_counter() - start)
                x.grad = None
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (min(taken) for taken in times.values())
    assert ours < theirs
