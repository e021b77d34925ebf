"""`python try_wheel.py [--compiled]`: calls one op of the installed package and says which kernels served it.

Prints the file of softprompt_kernels.kernels.cpu.native, the instruction set of the CPU kernels (`none` if there are no
compiled ones), the sum of the result (8), and any warnings. With --compiled it fails without compiled CPU kernels.
"""

import sys
import warnings

import torch

from softprompt_kernels import prompt_attention
from softprompt_kernels.kernels.cpu import native

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = prompt_attention(*[torch.ones(1, 1, 2, 4)] * 5)
print(native.__file__, native.instruction_set(), out.sum().item(), *[w.message for w in caught], sep="\n")
if out.sum().item() != 8:
    sys.exit("the result is wrong")
if "--compiled" in sys.argv and native.missing():
    sys.exit(f"no compiled CPU kernels: {native.missing()}")
