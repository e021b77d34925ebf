"""Cases of the ops for other people's suites: inputs, FLOP and bytes, a float64 reference, and a tolerance.

>>> from softprompt_kernels.testing.cases import case, suite
>>> one = case("linear_kl_div", "N8 d16 V100")
>>> one.flop("forward+backward")  # 3 GEMMs of 2·N·V·d
76800.0
>>> inputs = one.inputs()
>>> found = one.run(inputs, backend="composed")  # loss, and the gradient of the student's hidden states
>>> [distance(*pair) < one.tolerance(inputs.student.dtype) for pair in zip(found, one.reference(inputs))]
[True, True]
>>> [each.shape for each in suite("qwen3") if each.op == "prompt_attention"]
['B8 H16/8 M256 P128 D128', 'B4 H16/8 M128 P2048 D128', 'B8 H16/8 M1 P2048 D128']

Any runner can be put around it. `one.prepare(inputs, backend, pass_)` returns a function that does the work once, which
is what pytest-benchmark, torch.utils.benchmark and Triton's do_bench take. Nothing here imports pytest.
"""

from __future__ import annotations

from softprompt_kernels.testing.attention import AttentionInputs, PromptAttentionCase
from softprompt_kernels.testing.case import BACKWARD, BOTH, FORWARD, PASSES, Case, as_pass, distance
from softprompt_kernels.testing.losses import (
    HeadInputs,
    KlDivCase,
    LabelInputs,
    LinearCrossEntropyCase,
    LinearKlDivCase,
    LinearKlDivFromMomentsCase,
    LogitsInputs,
    TeacherInputs,
    TeacherMomentsCase,
)
from softprompt_kernels.testing.suites import SUITES, suite

__all__ = [
    "BACKWARD",
    "BOTH",
    "FORWARD",
    "OPS",
    "PASSES",
    "SUITES",
    "AttentionInputs",
    "Case",
    "HeadInputs",
    "KlDivCase",
    "LabelInputs",
    "LinearCrossEntropyCase",
    "LinearKlDivCase",
    "LinearKlDivFromMomentsCase",
    "LogitsInputs",
    "PromptAttentionCase",
    "TeacherInputs",
    "TeacherMomentsCase",
    "as_pass",
    "case",
    "distance",
    "suite",
]

OPS: dict[str, type[Case]] = {
    kind.op: kind
    for kind in (
        PromptAttentionCase,
        KlDivCase,
        LinearKlDivCase,
        LinearKlDivFromMomentsCase,
        LinearCrossEntropyCase,
        TeacherMomentsCase,
    )
}
"""The class of each op's cases."""


def case(op: str, shape: str) -> Case:
    """The case of an op and a shape.

    Args:
        op: the name of an op.
        shape: such as "B8 H14/2 M256 P128 D64" for the attention, "N512 V49152" for `kl_div` and "N512 d576 V49152"
            for the losses from hidden states.

    Raises:
        ValueError: an unknown op, or a shape that is not one of this op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    return OPS[op].from_shape(shape)
