"""The modules give what the ops give, what Liger's formulas say, and refuse what they cannot serve."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div as torch_kl_div

from softprompt_kernels import JSDLoss, LinearKLDivLoss, linear_kl_div, teacher_moments

N, V, D = 12, 50, 8


def plain(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """One value a token, from F.kl_div on the log-softmax of logits."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        first, second = (q, p) if beta == 0 else (p, q)
        return torch_kl_div(first, second, reduction="none", log_target=True).sum(-1)
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    forward, reverse = (torch_kl_div(m, log, reduction="none", log_target=True).sum(-1) for log in (p, q))
    return beta * forward + (1 - beta) * reverse


@pytest.fixture
def hidden() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "student": torch.randn(3, 4, D, dtype=torch.float64, requires_grad=True),
        "weight": torch.randn(V, D, dtype=torch.float64, requires_grad=True),
        "teacher": torch.randn(3, 4, 5, dtype=torch.float64),
        "teacher_weight": torch.randn(V, 5, dtype=torch.float64),
        "labels": torch.tensor([3, 4, -100, 1] * 3),
    }


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("labelled", [False, True])
def test_jsd_of_log_probabilities_and_of_logits(beta, labelled) -> None:
    torch.manual_seed(0)
    student = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(N, V, dtype=torch.float64)
    labels = torch.where(torch.arange(N) % 3 == 0, -7, torch.arange(N)) if labelled else None
    rows = plain(student, teacher, beta)
    expected = rows[labels != -7].mean() if labelled else rows.mean()
    (gradient,) = torch.autograd.grad(expected, student)
    loss = JSDLoss(beta=beta, ignore_index=-7)
    for made in (
        loss(student.log_softmax(-1), teacher.log_softmax(-1), labels),
        loss(student, teacher, labels),
        loss(log_q=student, log_p=teacher, shift_labels=labels),
    ):
        torch.testing.assert_close(made, expected)
        torch.testing.assert_close(torch.autograd.grad(made, student)[0], gradient)


@pytest.mark.parametrize(
    ("divergence", "beta", "meaning"),
    [("forward", 0.5, 0), ("reverse", 0.5, 1), ("jsd", 0.3, 0.3), ("jsd", 0, 0), ("jsd", 1, 1)],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_loss_of_two_heads(hidden, divergence, beta, meaning, reduction, weighted) -> None:
    """Labels choose tokens, weights weigh them, T² multiplies, the head gets its gradient."""
    student, weight, teacher, teacher_weight, labels = hidden.values()
    weights = torch.rand(12, dtype=torch.float64) if weighted else None
    counted = (labels != -100).double() * (weights if weighted else 1)
    rows = 4 * counted * plain(student @ weight.T / 2, teacher @ teacher_weight.T / 2, meaning).flatten()
    expected = {"mean": rows.sum() / counted.sum(), "sum": rows.sum(), "none": rows}[reduction]
    loss = LinearKLDivLoss(divergence, beta, temperature=2.0, reduction=reduction)
    value = loss(student, weight, teacher, teacher_weight, labels, weights=weights)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(*(torch.autograd.grad(v.sum(), (student, weight)) for v in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_loss_of_one_head_with_softcap_scale_bias_and_padding(hidden) -> None:
    student, weight, _, _, labels = hidden.values()
    teacher, bias = torch.randn_like(student), torch.randn(V, dtype=torch.float64)
    loss = LinearKLDivLoss(softcap=3.0, logit_scale=0.5, valid_vocab=40, chunk_tokens=5)
    value = loss(student, weight, teacher, weight, labels, bias=bias)
    logits = [3.0 * torch.tanh((h @ weight.T + bias)[..., :40] * 0.5 / 3.0) for h in (student, teacher)]
    expected = plain(logits[0], logits[1].detach(), 0).flatten()[labels != -100].mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], torch.autograd.grad(expected, weight)[0])
    torch.testing.assert_close(loss(student, weight, teacher, None, labels, bias=bias), expected)


def test_linear_loss_from_moments_is_the_live_one(hidden) -> None:
    student, weight, _, _, labels = hidden.values()
    weight, teacher = weight.detach(), torch.randn_like(student)
    loss = LinearKLDivLoss(temperature=2.0, valid_vocab=40)
    live = loss(student, weight, teacher, None, labels)
    cached = loss(student, weight, teacher_moments(teacher, weight, temperature=2.0, valid_vocab=40), None, labels)
    torch.testing.assert_close(cached, live)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (cached, live)))


def test_ignored_tokens_may_hold_anything_and_may_be_all(hidden) -> None:
    student, weight, teacher, teacher_weight, labels = hidden.values()
    broken = teacher.clone().flatten(0, 1)
    broken[labels == -100] = float("nan")
    loss = LinearKLDivLoss()
    expected = loss(student, weight, teacher, teacher_weight, labels)
    value = loss(student, weight, broken.view_as(teacher), teacher_weight, labels)
    weighted = loss(student, weight, broken.view_as(teacher), teacher_weight, labels, weights=torch.ones(3, 4))
    torch.testing.assert_close(torch.stack([value, weighted]), expected.expand(2))
    nothing = loss(student, weight, teacher, teacher_weight, torch.full((12,), -100))
    assert nothing == 0 and torch.autograd.grad(nothing, student)[0].abs().max() == 0
    assert JSDLoss()(student[0], student[0].detach() + 1, torch.full((4,), -100)) == 0


@pytest.mark.parametrize(
    "loss", [JSDLoss(0.3), LinearKLDivLoss("jsd", 0.3, -1, 2.0, "sum", softcap=5.0)], ids=["jsd", "linear"]
)
def test_no_state_copies_pickles_and_shows_itself(loss) -> None:
    assert not loss.state_dict() and not list(loss.parameters())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), eval(repr(loss))):
        assert vars(copied).keys() == vars(loss).keys() and repr(copied) == repr(loss)
    assert all(f"{name}={value}" in repr(loss) for name, value in (("beta", 0.3), ("ignore_index", loss.ignore_index)))


def test_compiled_whole_under_autocast_and_with_two_backwards(hidden) -> None:
    """As in DDP with no_sync: gradients of two backwards add up."""
    student, weight, teacher, teacher_weight, labels = (
        t.detach().float() if t.is_floating_point() else t for t in hidden.values()
    )
    student.requires_grad_()
    linear, jsd, moments = LinearKLDivLoss("jsd"), JSDLoss(), LinearKLDivLoss()
    same = torch.randn(3, 4, D)
    calls = [
        lambda: linear(student, weight, teacher, teacher_weight, labels),
        lambda: jsd(student @ weight.T, teacher @ teacher_weight.T, labels),
        lambda: moments(student, weight, teacher_moments(same, weight), None, labels),
    ]
    for autocast in (False, True):
        for call in calls:
            results = []
            for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
                student.grad = None
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = function()
                assert loss.dtype == torch.float32
                loss.backward(retain_graph=True)
                once = student.grad.clone()
                loss.backward()
                torch.testing.assert_close(student.grad, 2 * once)
                results.append((loss.detach(), once))
            torch.testing.assert_close(*results)


def test_gradcheck(hidden) -> None:
    student, weight, teacher, teacher_weight, labels = hidden.values()
    loss = LinearKLDivLoss("jsd", 0.3, temperature=2.0)
    assert torch.autograd.gradcheck(lambda s, w: loss(s, w, teacher, teacher_weight, labels), (student, weight))
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: JSDLoss(0.3)(s, torch.ones(4, 6).double()), (logits,))


def test_options_are_checked_when_the_module_is_made() -> None:
    for make, message in (
        (lambda: JSDLoss(beta=1.5), "beta must be"),
        (lambda: JSDLoss(beta=1e-6), "beta must be"),
        (lambda: LinearKLDivLoss("kl"), "divergence must be"),
        (lambda: LinearKLDivLoss(beta=2.0), "beta must be"),
        (lambda: LinearKLDivLoss(temperature=0.0), "temperature must be"),
        (lambda: LinearKLDivLoss(reduction="batchmean"), "reduction must be"),
        (lambda: LinearKLDivLoss(softcap=-1.0), "softcap must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_wrong_calls_are_named(hidden) -> None:
    student, weight, teacher, teacher_weight, labels = hidden.values()
    moments = teacher_moments(student, weight)
    for loss, arguments, error, message in (
        (LinearKLDivLoss(), (student, weight, teacher, teacher_weight, labels.double()), TypeError, "shift_labels"),
        (LinearKLDivLoss(), (student, weight, teacher, teacher_weight, labels[1:]), ValueError, "shift_labels .*= 12"),
        (LinearKLDivLoss(), (student, weight, teacher), ValueError, "weight must have shape"),
        (LinearKLDivLoss(), (student, weight.detach(), moments, teacher_weight), ValueError, "teacher_weight must"),
        (LinearKLDivLoss("reverse"), (student, weight.detach(), moments), ValueError, "teacher_input must be hidden"),
        (LinearKLDivLoss(softcap=2.0), (student, weight.detach(), moments), ValueError, "teacher_input must be hidden"),
        (JSDLoss(), (student, teacher), ValueError, "valid_vocab"),
        (JSDLoss(), (student, student, [1, 2]), TypeError, "shift_labels .* list"),
        (JSDLoss(), (student, student, labels[1:]), ValueError, "shift_labels must have N = 12"),
        (JSDLoss(), (student, student, labels.to("meta")), ValueError, "shift_labels must be on cpu"),
        (JSDLoss(), ([1.0], student, labels), TypeError, "student_logits must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            loss(*arguments)
    with pytest.raises(ValueError, match="weights must have the 12 elements"):
        LinearKLDivLoss()(student, weight, teacher, teacher_weight, labels, weights=torch.ones(3))
    with pytest.raises(TypeError, match="weights must be None or a tensor; got list"):
        LinearKLDivLoss()(student, weight, teacher, teacher_weight, labels, weights=[1.0] * 12)
    for make in (JSDLoss, LinearKLDivLoss):
        with pytest.raises(TypeError, match="ignore_index must be an integer; got NoneType"):
            make(ignore_index=None)


def test_trains_like_the_op_inside_a_module() -> None:
    """A loss held by a model moves with it and adds no parameters."""

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss = nn.Linear(D, V, bias=False), LinearKLDivLoss()

    model = Distilled().double()
    hidden, teacher = torch.randn(2, N, D, dtype=torch.float64)
    value = model.loss(hidden, model.head.weight, teacher)
    torch.testing.assert_close(value, linear_kl_div(hidden, teacher, model.head.weight))
    assert [name for name, _ in model.named_parameters()] == ["head.weight"]


def test_names_are_lazy() -> None:
    code = (
        "import sys, softprompt_kernels as s; assert 'torch' not in sys.modules; s.losses.functional.kl_div; "
        "s.JSDLoss, s.KLDivLoss, s.LinearKLDivLoss"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
