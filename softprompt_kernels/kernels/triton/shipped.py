"""What is shipped: example problems that between them reach every kernel and every configuration.

The problems are made of meta tensors, which have shapes and no memory, and the drivers are asked what they would launch
for each on a target. A configuration that a driver gets is compiled and checked from then on, if an example reaches it;
tests/kernels/test_triton_compile.py fails for one that none does.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt_kernels.kernels.attention_problem import AttentionProblem, Needs
from softprompt_kernels.kernels.loss_problem import FORWARD, JSD, REVERSE, Divergence, LogitsProblem
from softprompt_kernels.kernels.triton.ahead_of_time import Request
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class Example:
    """A problem with a name, and what would be launched for it."""

    name: str
    launches: Callable[[Target], list[Launch]]


@dataclass(frozen=True)
class Sizes:
    """Of an attention: letters as in attention_problem.py."""

    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    queries: int = 512
    prompt: int = 256


TRAINING = Sizes()
SHAPES = {
    "training": TRAINING,
    "long prompt": Sizes(batch=4, queries=256, prompt=8192),
    "short": Sizes(batch=16, queries=64, prompt=32),
    "decoding": Sizes(queries=1, prompt=4096),
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
VOCABULARIES = (50257, 128256, 262144)  # the first is no multiple of anything
TOKENS = 1024


def requests(targets: Iterable[Target]) -> list[Request]:
    """Every launch of every example, for each target."""
    found = examples()
    return [
        Request(example.name, launch, target)
        for target, example in itertools.product(targets, found)
        for launch in example.launches(target)
    ]


def examples() -> list[Example]:
    """All, attention first."""
    return [*_attention(), *_kl()]


def attention_problem(
    sizes: Sizes, head: tuple[int, int], dtype: torch.dtype, feature: str | None = None
) -> AttentionProblem:
    """Without memory."""

    def tensor(batch: int, heads: int, tokens: int, size: int) -> Tensor:
        # As projections leave them: tokens before heads.
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
        rows = 4
        return replace(
            problem,
            prompt_key=problem.prompt_key.expand(rows, -1, -1, -1).contiguous(),
            prompt_value=problem.prompt_value.expand(rows, -1, -1, -1).contiguous(),
            prompt_index=_integers(batch),
            prompt_lengths=_integers(rows),
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


def logits_problem(vocab: int, dtype: torch.dtype, kind: str) -> LogitsProblem:
    """Without memory."""
    student, teacher = (torch.empty(TOKENS, vocab, dtype=dtype, device="meta") for _ in range(2))
    return LogitsProblem(student, teacher, None, Divergence(kind, 0.5, 2.0), vocab)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """How torch, and so our kernels, multiply fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def _attention() -> Iterator[Example]:
    plain = [(shape, head, dtype, None) for shape in SHAPES for head in HEAD_SIZES for dtype in ("bf16", "fp32")]
    others = [("training", head, dtype, None) for head in HEAD_SIZES for dtype in ("fp16", "tf32")]
    special = [("training", head, "bf16", feature) for head in ((64, 64), (128, 128)) for feature in FEATURES]
    for shape, head, dtype, feature in plain + others + special:
        size = f"D{head[0]}" + (f"/{head[1]}" if head[0] != head[1] else "")
        name = f"attention {shape} {size} {dtype}" + (f" {feature}" if feature else "")
        yield Example(name, _attention_launches(SHAPES[shape], head, dtype, feature))


def _attention_launches(
    sizes: Sizes, head: tuple[int, int], dtype: str, feature: str | None
) -> Callable[[Target], list[Launch]]:
    def launches(target: Target) -> list[Launch]:
        from softprompt_kernels.kernels.triton import attention

        torch_dtype, tf32 = DTYPES[dtype]
        problem = attention_problem(sizes, head, torch_dtype, feature)
        with float32_products(tf32):
            out, lse, found = attention.plan_forward(problem, target)
            found = list(found)
            for needs in (ALL._replace(sinks=problem.sinks is not None), PROMPT):
                found += attention.plan_backward(
                    problem, out, lse, torch.empty_like(out), torch.empty_like(lse), needs, target
                )[1]
        return found

    return launches


def _kl() -> Iterator[Example]:
    for vocab, dtype, kind in itertools.product(VOCABULARIES, ("bf16", "fp16", "fp32"), (FORWARD, REVERSE, JSD)):
        yield Example(f"kl_div {kind} V{vocab} {dtype}", _kl_launches(vocab, dtype, kind))


def _kl_launches(vocab: int, dtype: str, kind: str) -> Callable[[Target], list[Launch]]:
    def launches(target: Target) -> list[Launch]:
        from softprompt_kernels.kernels.triton import kl_div

        problem = logits_problem(vocab, DTYPES[dtype][0], kind)
        return list(kl_div.plan_forward(problem, target)[-1])

    return launches
