"""Example problems that together reach every kernel and every shipped configuration.

The problems are made of meta tensors, which have shapes and no memory. The drivers say what they would launch for each
problem on a target, and the ahead-of-time check compiles that. tests/kernels/triton/test_compile.py fails if no example
reaches a configuration, so a new configuration is always compiled and checked.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs
from softprompt_kernels.kernels.problems.loss import (
    DIVERGENCES,
    FORWARD,
    Divergence,
    ExpectationProblem,
    Head,
    HeadProblem,
    LogitsProblem,
)
from softprompt_kernels.kernels.triton.compile.ahead_of_time import Request
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class Example:
    """The name of a problem, and the launches for it on a target."""

    name: str
    launches: Callable[[Target], list[Launch]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of an attention problem; letters as in kernels/problems/attention.py."""

    batch: int = 8  # B
    heads: int = 32  # Hq
    kv_heads: int = 8  # Hkv
    queries: int = 512  # M = N
    prompt: int = 256  # P


TRAINING = Sizes()
SHAPES = {
    "training": TRAINING,
    "long prompt": Sizes(batch=4, queries=256, prompt=8192),
    "short": Sizes(batch=16, queries=64, prompt=32),
    "decoding": Sizes(queries=1, prompt=4096),
    "few queries": Sizes(queries=16, prompt=256),
    "ones": Sizes(batch=1, heads=1, kv_heads=1, queries=1, prompt=1),
    "odd group": Sizes(heads=9, kv_heads=3, queries=300, prompt=77),
}
HEAD_SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))  # D, Dv
DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
FEATURES = ("window", "softcap", "sinks", "full", "bank", "padded", "packed")
ALL = Needs(True, True, True, True, True, True)
PROMPT = Needs(False, False, False, True, True, False)
VOCABULARIES = (50257, 128256, 262144)  # the first is not a multiple of 16
TOKENS, FEW_TOKENS = 1024, 32
HIDDEN = 4096  # d
MAX_CANDIDATES = 3  # configurations of an attention kernel: the shipped one, and those that tuning may choose
HEAD_FEATURES = ("bias", "softcap", "negative scale", "weights")


def requests(targets: Iterable[Target]) -> list[Request]:
    """Every launch of every example, for each target."""
    return [
        Request(example.name, launch, target)
        for target, example in itertools.product(targets, examples())
        for launch in example.launches(target)
    ]


def examples() -> list[Example]:
    """All examples, attention first."""
    return [*_attention(), *_kl_div(), *_heads(), *_expectations()]


def attention_problem(
    sizes: Sizes, head: tuple[int, int], dtype: torch.dtype, feature: str | None = None
) -> AttentionProblem:
    """An attention problem of meta tensors with head sizes (D, Dv) and one of FEATURES."""

    def tensor(batch: int, heads: int, tokens: int, size: int) -> Tensor:
        # In memory tokens come before heads, as projections write them.
        return torch.empty(batch, tokens, heads, size, dtype=dtype, device="meta").transpose(1, 2)

    batch, kv_heads = sizes.batch, sizes.kv_heads
    size, value_size = head
    problem = AttentionProblem(
        query=tensor(batch, sizes.heads, sizes.queries, size),
        key=tensor(batch, kv_heads, sizes.queries, size),
        value=tensor(batch, kv_heads, sizes.queries, value_size),
        prompt_key=torch.empty(1, kv_heads, sizes.prompt, size, dtype=dtype, device="meta"),
        prompt_value=torch.empty(1, kv_heads, sizes.prompt, value_size, dtype=dtype, device="meta"),
        prompt_index=None,
        prompt_lengths=None,
        key_lengths=None,
        cu_seqlens=None,
        sinks=None,
        causal=feature != "full",
        window=128 if feature == "window" else None,
        softcap=30.0 if feature == "softcap" else None,
        scale=size**-0.5,
    )
    if feature == "sinks":
        return replace(problem, sinks=torch.empty(sizes.heads, dtype=dtype, device="meta"))
    if feature == "padded":
        return replace(problem, key_lengths=_integers(batch))
    if feature == "bank":
        prompts = 4
        return replace(
            problem,
            prompt_key=problem.prompt_key.expand(prompts, -1, -1, -1).contiguous(),
            prompt_value=problem.prompt_value.expand(prompts, -1, -1, -1).contiguous(),
            prompt_index=_integers(batch),
            prompt_lengths=_integers(prompts),
        )
    if feature == "packed":
        tokens = batch * sizes.queries
        return replace(
            problem,
            query=tensor(1, sizes.heads, tokens, size),
            key=tensor(1, kv_heads, tokens, size),
            value=tensor(1, kv_heads, tokens, value_size),
            cu_seqlens=_integers(batch + 1),
        )
    return problem


def logits_problem(tokens: int, vocab: int, dtype: torch.dtype, kind: str, weighted: bool = False) -> LogitsProblem:
    """A divergence of given logits [tokens, vocab], as meta tensors."""
    student, teacher = (torch.empty(tokens, vocab, dtype=dtype, device="meta") for _ in range(2))
    return LogitsProblem(student, teacher, _floats(tokens) if weighted else None, Divergence(kind, 0.5, 2.0), vocab)


def head_problem(
    vocab: int, dtype: torch.dtype, kind: str, tokens: int = TOKENS, feature: str | None = None
) -> HeadProblem:
    """A divergence of the logits of hidden states, as meta tensors; one head for student and teacher."""
    student, teacher = (torch.empty(tokens, HIDDEN, dtype=dtype, device="meta") for _ in range(2))
    head = _head(vocab, dtype, feature)
    weights = _floats(tokens) if feature == "weights" else None
    return HeadProblem(student, teacher, head, head, weights, Divergence(kind, 0.5, 2.0), None)


def expectation_problem(
    vocab: int, dtype: torch.dtype, need_mean: bool, tokens: int = TOKENS, feature: str | None = None
) -> ExpectationProblem:
    """An expectation problem of meta tensors; the feature "labels" has a weight for each token too."""
    hidden = torch.empty(tokens, HIDDEN, dtype=dtype, device="meta")
    labels = _integers(tokens) if feature == "labels" else None
    weights = _floats(tokens) if feature in ("labels", "weights") else None
    return ExpectationProblem(hidden, _head(vocab, dtype, feature), labels, weights, 2.0, None, need_mean)


def _head(vocab: int, dtype: torch.dtype, feature: str | None) -> Head:
    weight = torch.empty(vocab, HIDDEN, dtype=dtype, device="meta")
    bias = torch.empty(vocab, dtype=dtype, device="meta") if feature == "bias" else None
    scale = -0.5 if feature == "negative scale" else 0.5
    return Head(weight, bias, 30.0 if feature == "softcap" else None, scale)


@contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Whether torch's fp32 GEMMs, and so our kernels, may use TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def _floats(count: int) -> Tensor:
    return torch.empty(count, device="meta")


def _attention() -> Iterator[Example]:
    """Every head size in "training"; other shapes, dtypes and features where they change the compiled code."""
    powers = ((64, 64), (128, 128), (256, 256))
    cases: list[tuple[str, tuple[int, int], str, str | None]]
    cases = [("training", head, "bf16", None) for head in HEAD_SIZES]
    cases += [("training", head, dtype, None) for head in powers for dtype in ("fp16", "tf32")]
    cases += [("training", head, "fp32", None) for head in powers[:2]]
    cases += [(shape, (128, 128), "bf16", None) for shape in SHAPES if shape != "training"]
    cases += [("decoding", head, "fp32", None) for head in powers[:2]]
    cases += [(shape, head, "bf16", None) for shape in ("decoding", "few queries") for head in (powers[0], powers[2])]
    cases += [("training", (128, 128), "bf16", feature) for feature in FEATURES]
    for shape, head, dtype, feature in cases:
        size = f"D{head[0]}" + (f"/{head[1]}" if head[0] != head[1] else "")
        name = f"attention {shape} {size} {dtype}" + (f" {feature}" if feature else "")
        torch_dtype, tf32 = DTYPES[dtype]
        problem = attention_problem(SHAPES[shape], head, torch_dtype, feature)
        prompt_only = (
            dtype == "bf16" and feature is None and head[0] in (64, 128)
        )  # a frozen model with a trained prompt
        yield Example(name, partial(_attention_launches, problem, tf32, prompt_only))


def _attention_launches(problem: AttentionProblem, tf32: bool, prompt_only: bool, target: Target) -> list[Launch]:
    from softprompt_kernels.kernels.triton.attention import plan as attention_plan

    launches = []
    with allow_tf32(tf32):
        for candidate in range(MAX_CANDIDATES):
            out, lse, forward = attention_plan.plan_forward(problem, target, candidate)
            gradients = torch.empty_like(out), torch.empty_like(lse)
            every = ALL._replace(sinks=problem.sinks is not None)
            launches += forward
            for needs in (every, PROMPT) if prompt_only else (every,):
                launches += attention_plan.plan_backward(problem, out, lse, *gradients, needs, target, candidate)[1]
    return launches


def _kl_div() -> Iterator[Example]:
    small, middle, large = VOCABULARIES
    cases = [(TOKENS, middle, dtype, kind, False) for dtype in ("bf16", "fp16", "fp32") for kind in DIVERGENCES]
    cases += [(TOKENS, vocab, "bf16", kind, False) for vocab in (small, large) for kind in DIVERGENCES]
    cases += [(FEW_TOKENS, middle, "bf16", FORWARD, False)]
    cases += [(TOKENS, 1000, "fp32", kind, True) for kind in DIVERGENCES]
    for tokens, vocab, dtype, kind, weighted in cases:
        name = f"kl_div {kind} N{tokens} V{vocab} {dtype}" + (" weights" if weighted else "")
        problem = logits_problem(tokens, vocab, DTYPES[dtype][0], kind, weighted)
        yield Example(name, partial(_kl_div_launches, problem))


def _kl_div_launches(problem: LogitsProblem, target: Target) -> list[Launch]:
    from softprompt_kernels.kernels.triton.losses import kl_div

    (loss, statistics), forward = kl_div.plan_forward(problem, target)
    return forward + kl_div.plan_backward(problem, loss, statistics, target)[1]


def _heads() -> Iterator[Example]:
    cases = [(VOCABULARIES[1], dtype, kind, TOKENS, None) for dtype in ("bf16", "fp16", "fp32") for kind in DIVERGENCES]
    cases += [(vocab, "bf16", FORWARD, TOKENS, None) for vocab in (VOCABULARIES[0], VOCABULARIES[2])]
    cases += [(VOCABULARIES[1], "bf16", FORWARD, FEW_TOKENS, None)]
    special = [(VOCABULARIES[1], "bf16", FORWARD, TOKENS, feature) for feature in HEAD_FEATURES]
    for vocab, dtype, kind, tokens, feature in [*cases, *special]:
        name = f"linear_kl_div {kind} N{tokens} V{vocab} {dtype}" + (f" {feature}" if feature else "")
        problem = head_problem(vocab, DTYPES[dtype][0], kind, tokens, feature)
        yield Example(name, partial(_head_launches, problem))


def _head_launches(problem: HeadProblem, target: Target) -> list[Launch]:
    from softprompt_kernels.kernels.triton.losses import linear_kl_div

    return [launch for need in (True, False) for launch in linear_kl_div.plan(problem, need, target)]


def _expectations() -> Iterator[Example]:
    cases: list[tuple[int, str, int, str | None]]
    cases = [(VOCABULARIES[1], dtype, TOKENS, None) for dtype in ("bf16", "fp16", "fp32")]
    cases += [(VOCABULARIES[0], "bf16", TOKENS, None), (VOCABULARIES[1], "bf16", FEW_TOKENS, None)]
    cases += [(VOCABULARIES[1], "bf16", TOKENS, feature) for feature in ("bias", "labels", "weights")]
    for vocab, dtype, tokens, feature in cases:
        for need_mean in (True, False):
            name = f"{'teacher_moments' if need_mean else 'log-partition'} N{tokens} V{vocab} {dtype}"
            problem = expectation_problem(vocab, DTYPES[dtype][0], need_mean, tokens, feature)
            yield Example(name + (f" {feature}" if feature else ""), partial(_expectation_launches, problem))


def _expectation_launches(problem: ExpectationProblem, target: Target) -> list[Launch]:
    from softprompt_kernels.kernels.triton.losses import expectation

    return expectation.plan(problem, target)
