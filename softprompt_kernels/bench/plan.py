"""What a run measures: cases, implementations and passes, from names that are checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from softprompt_kernels.bench.implementations import DEFAULT_BACKENDS
from softprompt_kernels.bench.peers.registry import PEERS
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.ops.dispatch import BACKENDS
from softprompt_kernels.testing.cases import BOTH, FORWARD, OPS, PASSES, SUITES, Case, case, suite

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_PEER = "none"
QUICK = "quick"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        title: the suite, or "own" for shapes that were given.
        cases: the problems.
        backends, peers: names of implementations.
        named: those of them that the user named. The others are left out where they are slow.
        passes: which passes; an op that lacks one skips it.
        dtype, device: of the inputs.
    """

    title: str
    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    named: frozenset[str]
    passes: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")


def make_plan(
    suite_name: str | None = None,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    backends: Sequence[str] = (),
    peers: Sequence[str] = (),
    passes: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
) -> Plan:
    """A plan from names; nothing given means the default.

    Args:
        suite_name: a suite of `softprompt_kernels.testing.suites`; default "quick".
        ops: only these ops of the suite.
        shapes: shapes of one op, in place of a suite.
        backends, peers: default all; "none" stands for no peer.
        passes: default "forward" and "forward+backward".
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        SoftPromptError: a name is unknown, or the names do not fit together.
    """
    _check("--op", ops, OPS)
    _check("--backend", backends, [backend.name for backend in BACKENDS])
    _check("--peer", peers, [*PEERS, NO_PEER])
    _check("--pass", passes, PASSES)
    _check("--dtype", [dtype], DTYPES)
    if NO_PEER in peers and len(set(peers)) > 1:
        raise SoftPromptError(f"--peer: got {NO_PEER!r} and a peer, accepted is one of them")
    if shapes:
        if len(set(ops)) != 1 or suite_name is not None:
            raise SoftPromptError("--shape: needs exactly one --op, and no --suite")
        try:
            cases = [case(ops[0], shape) for shape in shapes]
        except ValueError as error:
            raise SoftPromptError(f"--shape: {error}") from None
    else:
        _check("--suite", [suite_name or QUICK], SUITES)
        cases = [one for one in suite(suite_name or QUICK) if not ops or one.op in ops]
    wanted = tuple(dict.fromkeys(passes)) or (FORWARD, BOTH)
    if not any(pass_ in one.passes for one in cases for pass_ in wanted):
        raise SoftPromptError(f"--pass: {', '.join(wanted)} is no pass of {', '.join({one.op for one in cases})}")
    return Plan(
        "own" if shapes else suite_name or QUICK,
        tuple(dict.fromkeys(cases)),
        tuple(dict.fromkeys(backends)) or DEFAULT_BACKENDS,
        () if NO_PEER in peers else tuple(dict.fromkeys(peers)) or tuple(PEERS),
        frozenset([*backends, *peers]),
        wanted,
        DTYPES[dtype],
        _device(device),
    )


def _check(option: str, given: Sequence[str], accepted: Iterable[str]) -> None:
    names = list(accepted)
    for name in given:
        if name not in names:
            raise SoftPromptError(f"{option}: got {name!r}, accepted is {', '.join(names)}")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise SoftPromptError(f"--device: got {name!r}, accepted is auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SoftPromptError("--device: got 'cuda', but torch finds no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
