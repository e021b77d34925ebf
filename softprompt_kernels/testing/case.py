"""A case: an op and the sizes of one problem, with its inputs, its cost, its reference and its tolerance.

An op runs in one of three passes. Results are a tuple of tensors:

    "forward"            (out,) or (loss,), without a graph
    "backward"           the gradients alone; the forward ran before, and its graph is kept
    "forward+backward"   (out or loss, gradients)

Only what trains in practice gets a gradient: all five inputs of the attention, and the student of a loss (the
teacher and the head are frozen). A forward of a loss that needs a gradient computes it already; the backward then only
scales its rows. `flop` and `bytes` count that gradient to "backward", so that the parts add up to "forward+backward".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from softprompt_kernels.testing.shapes import parse_shape, show_shape

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Case(ABC):
    """One problem of one op. Equal cases have equal inputs; a case can be pickled."""

    op: ClassVar[str]
    """The name of the problem: that of the op, or of a loss that an op has as a special case."""
    passes: ClassVar[tuple[str, ...]] = PASSES
    """The passes that the op has."""
    letters: ClassVar[tuple[str, ...]]
    """The sizes of a shape, in the order of its text."""
    result_names: ClassVar[tuple[str, ...]]
    """The names of the results of "forward+backward" (of "forward" for an op without a gradient)."""

    @property
    def function(self) -> str:
        """The op that computes it, as in `softprompt_kernels`. It is `op`, except for `linear_cross_entropy`."""
        return self.op

    @classmethod
    def from_shape(cls, shape: str) -> Self:
        """The case of a shape.

        Args:
            shape: such as "B8 H14/2 M256 P128 D64"; the sizes are those of `letters`, in any order.

        Raises:
            ValueError: a size is missing, unknown or out of range.
        """
        sizes = parse_shape(shape, cls.letters)
        return cls(*(number for letter in cls.letters for number in sizes[letter]))

    @property
    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the shape by letter."""

    @property
    def shape(self) -> str:
        """The shape as text; `from_shape` reads it."""
        return show_shape(self.sizes)

    @property
    def name(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"

    @abstractmethod
    def inputs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Any:
        """The inputs, a named tuple of tensors. They do not depend on the device.

        Args:
            dtype: of all tensors of floating-point numbers.
            device: where they are put.
            seed: of the random numbers.
        """

    @abstractmethod
    def forward(self, inputs: Any, backend: str | None = None) -> Callable[[], Tensor | Results]:
        """The op on these inputs, as a function without arguments. What can be cached is made before.

        Args:
            inputs: from `inputs`.
            backend: None: the op chooses.
        """

    @abstractmethod
    def sources(self, inputs: Any) -> tuple[Tensor, ...]:
        """The inputs that get a gradient, `[..]` each.

        Args:
            inputs: from `inputs`.
        """

    @abstractmethod
    def grad_out(self, inputs: Any) -> Tensor | None:
        """The gradient that the backward starts from, in the result's shape and dtype; None for a loss.

        Args:
            inputs: from `inputs`.
        """

    @abstractmethod
    def flop(self, pass_: str | None = None) -> float:
        """FLOP of the GEMMs that the op cannot do without. 0 where it has none.

        Args:
            pass_: one of `passes`; None: the last of them.
        """

    @abstractmethod
    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that must be read and written at least: each input and each result once a pass.

        Args:
            pass_: one of `passes`; None: the last of them.
            dtype: of the inputs.
        """

    @abstractmethod
    def result_bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the results, which no implementation can do without.

        Args:
            pass_: one of `passes`; None: the last of them.
            dtype: of the inputs.
        """

    @abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest accepted ‖result − reference‖ / ‖reference‖ of each result.

        Args:
            dtype: of the inputs: float64, float32, float16 or bfloat16.
        """

    @abstractmethod
    def tiny(self) -> Self:
        """The same problem in a size that takes no time."""

    @abstractmethod
    def reduced(self, flop: float) -> Self:
        """The same problem with fewer sequences or tokens, so that "forward+backward" has at most `flop` FLOP.

        One sequence or token is left at least. The float64 reference of a large case takes minutes; that of the
        reduced one does not.
        """

    def prepare(self, inputs: Any, backend: str | None = None, pass_: str | None = None) -> Call:
        """A function that runs one pass on these inputs. What a training step would keep is made before.

        Args:
            inputs: from `inputs`.
            backend: None: the op chooses.
            pass_: one of `passes`; None: the last of them.

        Raises:
            ValueError: an unknown pass or backend, or a backend that cannot serve the case (when it is called).
        """
        pass_ = self.check_pass(pass_)
        return as_pass(self.forward(inputs, backend), self.sources(inputs), self.grad_out(inputs), pass_)

    def run(self, inputs: Any, backend: str | None = None, pass_: str | None = None) -> Results:
        """Run one pass once. Arguments and errors as in `prepare`."""
        return self.prepare(inputs, backend, pass_)()

    def reference(self, inputs: Any, pass_: str | None = None) -> Results:
        """The results of a pass in float64, by the backend `reference`.

        Makes all scores, or all logits, in float64; see `reduced`.

        Args:
            inputs: from `inputs`, of any dtype.
            pass_: one of `passes`; None: the last of them.
        """
        exact = type(inputs)(*(_exact(tensor) for tensor in inputs))
        return self.run(exact, "reference", pass_)

    def check_pass(self, pass_: str | None) -> str:
        """The name of the pass.

        Args:
            pass_: one of `passes`; None: the last of them.

        Raises:
            ValueError: the op does not have this pass.
        """
        pass_ = self.passes[-1] if pass_ is None else pass_
        if pass_ not in self.passes:
            raise ValueError(f"pass of {self.op} must be one of {', '.join(self.passes)}; got {pass_!r}")
        return pass_


def _exact(tensor: Tensor) -> Tensor:
    """A copy in float64; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def as_pass(
    forward: Callable[[], Tensor | Results], sources: Sequence[Tensor], grad_out: Tensor | None, pass_: str
) -> Call:
    """One pass of any implementation.

    Args:
        forward: returns out or a scalar loss, with a graph where gradients are on; for "forward" alone also a tuple.
        sources: the tensors that get a gradient, `[..]` of any dtype.
        grad_out: the gradient of what `forward` returns, in its shape and dtype; None for a scalar.
        pass_: "forward", "backward" (runs `forward` here, once) or "forward+backward".
    """
    if pass_ == FORWARD:

        def inference() -> Results:
            with torch.no_grad():
                found = forward()
            return found if isinstance(found, tuple) else (found,)

        return inference
    if pass_ == BACKWARD:
        kept = _one(forward())
        return lambda: torch.autograd.grad(kept, tuple(sources), grad_out, retain_graph=True)

    def training() -> Results:
        out = _one(forward())
        return (out, *torch.autograd.grad(out, tuple(sources), grad_out))

    return training


def _one(found: Tensor | Results) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite where a value is not finite.

    Args:
        found: a result, `[..]` of any dtype.
        expected: its reference, in found's shape.
    """
    found, expected = found.detach().double(), expected.detach().double()
    apart = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return apart if apart < float("inf") else float("inf")
