"""What the bindings of the CUDA kernels refuse before a pointer is followed, tested in the module for the host."""

import re

import pytest

from softprompt_kernels.kernels.cuda import native
from softprompt_kernels.kernels.problems.loss import DIVERGENCES

pytestmark = pytest.mark.simt

ADDRESS = 16  # of no memory: whoever follows it crashes
MATRIX = (ADDRESS, 0, 5, 1)  # address, dtype, strides
DIVERGENCE_ROWS = {
    "kind": 0,
    "student": MATRIX,
    "teacher": MATRIX,
    "student_bias": 0,
    "teacher_bias": 0,
    "weights": 0,
    "row_scale": 0,
    "statistics": ADDRESS,
    "loss": ADDRESS,
    "gradient": None,
    "rows": 2,
    "vocab": 5,
    "columns": 5,
    "scale": 1.0,
    "inner": 1.0,
    "capped": False,
    "negated": False,
    "beta": 0.5,
    "loss_scale": 1.0,
    "gradient_scale": 1.0,
    "stream": 0,
}
ACCEPTED = ", ".join(f"{number} ({kind})" for kind, number in DIVERGENCES.items())
REFUSED = [
    ({"kind": -1}, f"divergence must be one of {ACCEPTED}; got -1"),
    ({"kind": 3}, f"divergence must be one of {ACCEPTED}; got 3"),
    ({"rows": -1}, "rows must be in [0, 2147483647]; got -1"),
    ({"vocab": 0}, "vocab must be in [1, 2147483647]; got 0"),
    ({"student": (ADDRESS, 3, 5, 1)}, "student's dtype must be one of 0 (float32), 1 (bfloat16), 2 (float16); got 3"),
    ({"student": (ADDRESS + 2, 0, 5, 1)}, "student's address must be a multiple of 4; got 18"),
    ({"teacher": (0, 0, 5, 1)}, "teacher must be an address; got 0"),
    ({"gradient": (ADDRESS, 0, 5, 2)}, "gradient's last stride must be 1; got 2"),
    ({"gradient": (ADDRESS, 0, 4, 1)}, "gradient's row stride must be in [5, "),
    ({"scale": 0.0}, "scale must be finite and at least 1.17549e-38; got 0"),
    ({"inner": float("nan")}, "inner must be finite; got nan"),
    ({"beta": 1.5}, "beta must be in [0, 1]; got 1.5"),
    ({"loss": 0, "statistics": 0}, "statistics must be given where there is no loss; got none"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_sizes_strides_and_numbers_are_checked_before_pointers_are_followed(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        native.HOST.module().divergence_rows(**{**DIVERGENCE_ROWS, **changes})
