"""The names that a profiler shows: every kernel, the calls in which it runs, and what its tile counts.

How names are built stands in `kernels/ranges.py`. `docs/how-to/profile.md` has the same table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from softprompt_kernels.kernels.ranges import PREFIX

REGION = f"{PREFIX}profile"
"""The range of what is measured."""

ROUND = f"{PREFIX}round"
"""The range of one round of it."""

STORED = "torch"
"""In the place of the backend: the backward scales the gradient that the forward stored, one product by PyTorch."""

ROWS_KEYS = "rows x keys"
TOKENS_VOCABULARY = "tokens x vocabulary"
PRODUCT = "rows x columns x depth"


@dataclass(frozen=True)
class Kernel:
    """A kernel that has a range."""

    name: str  # of its function in the source
    backends: tuple[str, ...]
    calls: tuple[str, ...]  # op and pass
    tile: str  # what its numbers count


_ATTENTION = ("prompt_attention.forward", "prompt_attention.backward")
_LOGITS = ("kl_div.forward", "kl_div.backward")
_HEADS = ("linear_kl_div.forward", "linear_kl_div.backward")
_EXPECTATIONS = ("teacher_moments.forward", "linear_kl_div_from_moments.forward")
_GPU = ("triton", "cuda", "simt")

KERNELS = (
    Kernel("attention_forward", ("cpu", "cuda", "simt"), _ATTENTION[:1], ROWS_KEYS),
    Kernel("attention_backward", ("cpu", "cuda", "simt"), _ATTENTION[1:], ROWS_KEYS),
    Kernel("forward_kernel", ("triton",), _ATTENTION[:1], ROWS_KEYS),
    Kernel("merge_kernel", ("triton",), _ATTENTION[:1], "rows x head size"),
    Kernel("backward_dq_kernel", ("triton",), _ATTENTION[1:], ROWS_KEYS),
    Kernel("backward_dkdv_kernel", ("triton",), _ATTENTION[1:], ROWS_KEYS),
    Kernel("reduce_splits_kernel", ("triton",), _ATTENTION[1:], ROWS_KEYS),
    Kernel("kl_logits", ("cpu",), _LOGITS, TOKENS_VOCABULARY),
    Kernel("kl_rows", ("cpu",), _HEADS, TOKENS_VOCABULARY),
    Kernel("kl_tile", ("cpu",), _HEADS[:1], TOKENS_VOCABULARY),
    Kernel("expectation_rows", ("cpu",), _EXPECTATIONS, TOKENS_VOCABULARY),
    Kernel("divergence_", ("composed",), (*_LOGITS, *_HEADS), TOKENS_VOCABULARY),
    Kernel("exponentials_", ("composed",), _EXPECTATIONS, TOKENS_VOCABULARY),
    Kernel("divergence_kernel", ("triton",), (*_LOGITS, *_HEADS), TOKENS_VOCABULARY),
    Kernel("exponentials_kernel", ("triton",), _EXPECTATIONS, TOKENS_VOCABULARY),
    Kernel("divergence_rows", ("cuda", "simt"), (*_LOGITS, *_HEADS), TOKENS_VOCABULARY),
    Kernel("exponential_rows", ("cuda", "simt"), _EXPECTATIONS, TOKENS_VOCABULARY),
    Kernel("gemm", ("cpu", "composed"), (*_HEADS, *_EXPECTATIONS), PRODUCT),
    Kernel("head_logits", _GPU, (*_HEADS, *_EXPECTATIONS), PRODUCT),
    Kernel("pull_back", _GPU, (*_HEADS, *_EXPECTATIONS), PRODUCT),
    Kernel("add_outer", _GPU, _HEADS[1:], PRODUCT),
)
"""All of them. A call of `composed` attention, and of `reference`, has none: it is made of PyTorch's operations."""

_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<call>\w+\.(?:forward|backward))(?:\.(?P<kernel>\w+))?"
    r"\[(?P<backend>\w+)(?: (?P<tile>\d+(?:x\d+)*))?\]"
)


@dataclass(frozen=True)
class Name:
    """The parts of a name."""

    call: str  # op and pass, as "kl_div.forward"
    backend: str
    kernel: str | None  # None: the whole call
    tile: tuple[int, ...]

    @property
    def flop(self) -> float | None:
        """FLOP of a GEMM: 2 for each of its products; None for all others."""
        is_gemm = any(kernel.name == self.kernel and kernel.tile == PRODUCT for kernel in KERNELS)
        return 2.0 * prod(self.tile) if is_gemm else None


def parse_name(text: str) -> Name | None:
    """The parts of the name of a range; None for any other name."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    tile = tuple(map(int, match["tile"].split("x"))) if match["tile"] else ()
    return Name(match["call"], match["backend"], match["kernel"], tile)
