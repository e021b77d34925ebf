"""The losses of a head that is split over ranks, against those of the whole head in float64."""

import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from softprompt_kernels.ops import linear_kl_div, linear_kl_div_from_moments, teacher_moments
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.no_interpreter,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
]

VOCAB, SIZE, TOKENS = 83, 16, 13
SHARDS = {2: (0, 60, VOCAB), 3: (0, 11, 12, VOCAB)}

LIVE: dict[str, dict[str, Any]] = {
    **{kind: {"divergence": kind} for kind in ("forward", "reverse", "jsd")},
    "bias, temperature, scale": {"bias": True, "temperature": 1.7, "logit_scale": 0.6},
    **{
        f"softcap, chunks, {kind}": {"softcap": 3.0, "chunk_tokens": 4, "divergence": kind, "beta": 0.3}
        for kind in ("forward", "reverse", "jsd")
    },
    "weights": {"weights": True, "reduction": "none", "chunk_tokens": 3},
    "only skipped rows": {"weights": "none"},
    "a vocabulary that ends in the first shard": {"valid_vocab": 9, "divergence": "jsd"},
    "a vocabulary that ends in the last shard": {"valid_vocab": 70, "bias": True},
    "a teacher's own head": {"teacher_weight": True, "reduction": "sum"},
    "masked entries": {"bias": "-inf"},
    "a shard without a finite logit": {"bias": "-inf shard"},
    "no gradient": {"frozen": True},
    "trained head": {"train": True, "bias": True, "weights": True, "softcap": 3.0},
    "trained head with a cut vocabulary": {"train": True, "valid_vocab": 70, "divergence": "reverse"},
    "no tokens": {"tokens": 0},
}
MOMENTS: dict[str, dict[str, Any]] = {
    "kl": {},
    "bias, temperature, scale": {"bias": True, "temperature": 1.7, "logit_scale": 0.6},
    "labels": {"labels": True, "label_weight": 0.4, "bias": True},
    "labels alone": {"labels": True, "label_weight": 1.0, "no_moments": True, "weights": True},
    "weights": {"weights": True, "reduction": "none", "chunk_tokens": 3},
    "a vocabulary that ends in the first shard": {"valid_vocab": 9},
    "a vocabulary that ends in the last shard": {"valid_vocab": 70, "bias": True},
    "masked entries": {"bias": "-inf"},
    "a shard without a finite logit": {"bias": "-inf shard"},
    "no gradient": {"frozen": True, "labels": True, "label_weight": 0.4},
    "no tokens": {"tokens": 0, "labels": True, "label_weight": 0.4},
}


def call(op: str, case: dict[str, Any], dtype: torch.dtype, own: slice, group: Any = None) -> dict[str, torch.Tensor]:
    """Loss and gradients of one case, from some rows of the head."""
    case, random = dict(case), torch.Generator().manual_seed(3)
    rows = case.pop("tokens", TOKENS)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32)

    weight, other, bias = made(VOCAB, SIZE) / 2, made(VOCAB, SIZE) / 2, made(VOCAB)
    student, teacher = made(rows, SIZE), made(rows, SIZE)
    weights = torch.rand(rows, generator=random) * (torch.rand(rows, generator=random) < 0.6)
    labels = torch.randint(-1, case.get("valid_vocab") or VOCAB, (rows,), generator=random)
    kind = case.pop("bias", None)
    if kind == "-inf":
        bias[::3] = -torch.inf
    elif kind == "-inf shard":
        bias[:60] = -torch.inf
    options: dict[str, Any] = {"group": group, "backend": None if group else "reference"}
    head, trains = weight[own].to(dtype), case.pop("train", False)
    own_bias = None if kind is None else bias[own].to(dtype)
    student = student.to(dtype).requires_grad_(not case.pop("frozen", False))
    if trains:
        head.requires_grad_()
        own_bias = None if own_bias is None else own_bias.requires_grad_()
    skipped = case.pop("weights", False)
    if skipped:
        options["weights"] = weights if skipped is True else torch.zeros(rows)
        with torch.no_grad():
            student[options["weights"] == 0] = torch.nan  # a skipped row may hold anything
    if op == "linear_kl_div":
        if case.pop("teacher_weight", False):
            options["teacher_weight"] = other[own].to(dtype)
        loss = linear_kl_div(student, teacher.to(dtype), head, bias=own_bias, **options, **case)
        found = {}
    else:
        shared = {
            name: case[name] for name in ("temperature", "logit_scale", "valid_vocab", "chunk_tokens") if name in case
        }
        moments = teacher_moments(
            teacher.to(dtype), head, bias=own_bias, group=group, backend=options["backend"], **shared
        )
        found = {"mean": moments.mean, "entropy": moments.entropy}
        if own_bias is not None:
            found["bias mean"] = moments.bias_mean
        if case.pop("labels", False):
            options["labels"] = labels
        given = None if case.pop("no_moments", False) else moments
        loss = linear_kl_div_from_moments(student, given, head, bias=own_bias, **options, **case)
    if loss.requires_grad:
        (loss * torch.linspace(1, 2, max(loss.numel(), 1), dtype=dtype).view_as(loss)).sum().backward()
        found["by student"] = student.grad
    for name, tensor in (("by weight", head), ("by bias", own_bias)):
        if tensor is not None and tensor.grad is not None:
            found[name] = tensor.grad
    return {"loss": loss.detach(), **found}


def everything(world: int) -> dict[str, dict[str, torch.Tensor]]:
    """On one rank: all cases; what is refused; what is close; how often it communicates."""
    group, rank = dist.group.WORLD, dist.get_rank()
    own = slice(*SHARDS[world][rank : rank + 2])
    results = {
        f"{op}: {name}": call(op, case, torch.float32, own, group)
        for op, cases in (("linear_kl_div", LIVE), ("linear_kl_div_from_moments", MOMENTS))
        for name, case in cases.items()
    }
    results["double"] = call("linear_kl_div", LIVE["jsd"], torch.float64, own, group)
    for kind in ("forward", "reverse", "jsd"):
        student, teacher, weight = close_problem()
        loss = linear_kl_div(student, teacher, weight[:VOCAB][own], divergence=kind, reduction="none", group=group)
        results[f"close {kind}"] = {"loss": loss}
    results["refused"] = refusals(own, group)
    results["collectives"] = collectives(own, group)
    return results


def close_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states whose KL is about 1e-6, and a head."""
    random = torch.Generator().manual_seed(5)
    teacher, weight = torch.randn(64, SIZE, generator=random), torch.randn(VOCAB, SIZE, generator=random)
    return teacher + 4e-4 * torch.randn(64, SIZE, generator=random), teacher, weight


def refusals(own: slice, group: Any) -> dict[str, str]:
    """What this rank says to arguments that are wrong, or wrong on rank 1 alone."""
    second = dist.get_rank() == 1
    student, teacher, weight = close_problem()
    shard = weight[own]
    labels = torch.full((64,), VOCAB)
    moments = teacher_moments(teacher, shard, group=group)

    def said(function: Any) -> str:
        try:
            function()
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def twice() -> None:
        trained = shard.clone().requires_grad_()
        loss = linear_kl_div(student.clone().requires_grad_(), teacher, trained, group=group)
        torch.autograd.grad(torch.autograd.grad(loss, trained, create_graph=True)[0].sum(), trained)

    def twice_stored(function: Any) -> None:
        given = student.clone().requires_grad_()
        torch.autograd.grad(torch.autograd.grad(function(given), given, create_graph=True)[0].sum(), given)

    few = slice(0, 64 - second)
    return {
        "tokens": said(lambda: linear_kl_div(student[few], teacher[few], shard, group=group)),
        "tokens of moments": said(lambda: teacher_moments(teacher[few], shard, group=group)),
        "size": said(lambda: linear_kl_div(student, teacher, shard[:, second:], group=group)),
        "dtype": said(
            lambda: teacher_moments(
                teacher.double() if second else teacher, shard.double() if second else shard, group=group
            )
        ),
        "gradient": said(
            lambda: linear_kl_div_from_moments(student.clone().requires_grad_(second), moments, shard, group=group)
        ),
        "temperature": said(lambda: linear_kl_div(student, teacher, shard, temperature=1.0 + second, group=group)),
        "vocabulary": said(lambda: teacher_moments(teacher, shard, valid_vocab=VOCAB + 1, group=group)),
        "moments' vocabulary": said(
            lambda: linear_kl_div_from_moments(student, moments, shard, valid_vocab=VOCAB - 1, group=group)
        ),
        "labels": said(
            lambda: linear_kl_div_from_moments(student, moments, shard, labels=labels, label_weight=0.5, group=group)
        ),
        "largest label": said(
            lambda: linear_kl_div_from_moments(
                student, moments, shard, labels=labels - 1 - int(second), label_weight=0.5, group=group
            )
        ),
        "backend": said(lambda: linear_kl_div(student, teacher, shard, backend="cpu", group=group)),
        "backend on one rank": said(
            lambda: teacher_moments(teacher, shard, backend="cuda" if second else None, group=group)
        ),
        "backend of moments on one rank": said(
            lambda: linear_kl_div_from_moments(student, moments, shard, backend="cuda" if second else None, group=group)
        ),
        "no number": said(lambda: teacher_moments(teacher, shard, temperature=None if second else 1.0, group=group)),
        "no integer": said(lambda: linear_kl_div(student, teacher, shard, valid_vocab=torch.tensor(9), group=group)),
        "weights of moments": said(
            lambda: linear_kl_div_from_moments(
                student, moments, shard, weights=torch.ones(64) if second else None, group=group
            )
        ),
        "group": said(lambda: linear_kl_div(student, teacher, shard, group="world")),
        "trained twice": said(twice),
        "twice": said(lambda: twice_stored(lambda h: linear_kl_div(h, teacher, shard, group=group))),
        "moments twice": said(
            lambda: twice_stored(lambda h: linear_kl_div_from_moments(h, moments, shard, group=group))
        ),
    }


def collectives(own: slice, group: Any) -> dict[str, list[str]]:
    """The collectives of a forward and backward, with their bytes on this rank."""
    student, teacher, weight = close_problem()
    moments, found = teacher_moments(teacher, weight[own], group=group), {}
    calls = {
        "linear_kl_div": lambda h: linear_kl_div(h, teacher, weight[own], chunk_tokens=32, group=group),
        "jsd": lambda h: linear_kl_div(h, teacher, weight[own], divergence="jsd", group=group),
        "moments": lambda h: linear_kl_div_from_moments(h, moments, weight[own], group=group),
        "teacher": lambda h: teacher_moments(teacher, weight[own], group=group).mean.sum() + h.sum(),
    }
    for name, function in calls.items():
        seen: list[str] = []
        gather, reduce = dist.all_gather_single, dist.all_reduce

        def counted_gather(out: Any, tensor: Any, group: Any, gather: Any = gather, seen: Any = seen) -> None:
            seen.append(f"gather {tensor.nbytes}")
            gather(out, tensor, group=group)

        def counted_reduce(tensor: Any, group: Any, reduce: Any = reduce, seen: Any = seen) -> None:
            seen.append(f"sum {tensor.nbytes}")
            reduce(tensor, group=group)

        dist.all_gather_single, dist.all_reduce = counted_gather, counted_reduce
        try:
            function(student.clone().requires_grad_()).backward()
        finally:
            dist.all_gather_single, dist.all_reduce = gather, reduce
        found[name] = seen
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    call("linear_kl_div", LIVE["forward"], torch.float64, slice(None))  # what torch imports then, ranks import no more
    return {world: run_ranks(world, everything, world) for world in SHARDS}


@cache
def of_one_process(op: str, name: str) -> dict[str, torch.Tensor]:
    return call(op, (LIVE if op == "linear_kl_div" else MOMENTS)[name], torch.float64, slice(None))


@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize(
    ("op", "name"),
    [("linear_kl_div", name) for name in LIVE] + [("linear_kl_div_from_moments", name) for name in MOMENTS],
)
def test_every_rank_gets_what_one_process_gets(ranks, world, op, name) -> None:
    expected = of_one_process(op, name)
    for rank, results in enumerate(ranks[world]):
        found, own = results[f"{op}: {name}"], slice(*SHARDS[world][rank : rank + 2])
        assert found.keys() == expected.keys()
        for part, tensor in expected.items():
            if part in ("by weight", "by bias"):
                tensor = tensor[own]
            scale = max(1.0, float(tensor.abs().max())) if tensor.numel() and tensor.isfinite().all() else 1.0
            torch.testing.assert_close(
                found[part].double(), tensor, rtol=0, atol=1e-6 * scale, msg=f"{part}, rank {rank}"
            )


def test_all_ranks_get_the_same_bits(ranks) -> None:
    for results in ranks.values():
        for name in results[0].keys() - {"refused", "collectives"}:
            for part in results[0][name].keys() - {"by weight", "by bias"}:
                assert all(torch.equal(results[0][name][part], other[name][part]) for other in results[1:]), name


def test_float64_is_exact(ranks) -> None:
    expected = call("linear_kl_div", LIVE["jsd"], torch.float64, slice(None))
    for part in expected:
        torch.testing.assert_close(ranks[3][0]["double"][part], expected[part], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_small_loss_keeps_its_digits(ranks, kind) -> None:
    student, teacher, weight = (tensor.double() for tensor in close_problem())
    expected = linear_kl_div(student, teacher, weight, divergence=kind, reduction="none", backend="reference")
    assert 1e-8 < expected.mean() < 3e-6
    found = ranks[2][0][f"close {kind}"]["loss"].double()
    assert abs(found.mean() / expected.mean() - 1) < 1e-3


SAID = {
    "tokens": r"ValueError: the shape of student_hidden must be the same.*\[64, 16\] on rank 0, \[63, 16\] on rank 1",
    "tokens of moments": r"ValueError: the shape of teacher_hidden must be the same.*\[63, 16\] on rank 1",
    "size": r"ValueError: .*weight must have shape \[V, d\] with d = 16 of student_hidden",
    "dtype": r"ValueError: the dtype of teacher_hidden must be the same.*float64 on rank 1",
    "gradient": r"ValueError: a gradient by student_hidden must be the same.*False on rank 0, True on rank 1",
    "temperature": r"ValueError: temperature must be the same.*1.0 on rank 0, 2.0 on rank 1",
    "vocabulary": r"ValueError: valid_vocab must be None or in \[1, 83\], the entries of all ranks of group; got 84",
    "moments' vocabulary": r"ValueError: valid_vocab must be 83, which the moments were made with; got 82",
    "labels": r"ValueError: labels must be below the vocabulary's size 83; got 83",
    "largest label": r"ValueError: the largest label must be the same on all ranks of group; got 82 on rank 0, 81 on",
    "backend": r"ValueError: backend must be None or 'composed' with a group; got 'cpu'",
    "backend on one rank": r"ValueError: .*backend='cuda' cannot serve this teacher_moments call",
    "backend of moments on one rank": r"ValueError: .*backend='cuda' cannot serve this linear_kl_div_from_moments call",
    "no number": r"(ValueError: group: a rank refused its arguments \(rank 1: )?TypeError: float\(\) argument must be",
    "no integer": r"TypeError: valid_vocab must be None or an int; got Tensor",
    "weights of moments": r"ValueError: rows of weights above 0 must be the same.*None on rank 0, 64 on rank 1",
    "group": r"TypeError: group must be None or a torch.distributed.ProcessGroup; got str",
    "trained twice": r"RuntimeError: linear_kl_div has no second derivative",
    "twice": r"RuntimeError: linear_kl_div has no second derivative",
    "moments twice": r"RuntimeError: linear_kl_div_from_moments has no second derivative",
}


@pytest.mark.parametrize("name", SAID)
def test_all_ranks_refuse(ranks, name) -> None:
    for results in itertools.chain(*ranks.values()):
        assert re.match(SAID[name], results["refused"][name]), results["refused"][name]


def test_collectives_are_those_of_the_docstring(ranks) -> None:
    told, tokens, mean = "gather 2048", 64, 4 * 64 * SIZE
    assert ranks[2][0]["collectives"] == {
        "linear_kl_div": [told, *["gather 1024"] * 2, f"sum {mean + 4 * tokens}"],
        "jsd": [told, f"gather {32 * tokens}", f"sum {16 * tokens}", f"sum {mean + 4 * tokens}"],
        "moments": [told, f"gather {16 * tokens}", f"sum {mean}"],
        "teacher": [told, f"gather {16 * tokens}", f"sum {mean}"],
    }
