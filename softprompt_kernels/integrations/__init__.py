"""The package's attention in models of transformers and PEFT, by one line.

`patch` changes one model, `unpatch` restores it. `register` makes the name "softprompt" known to transformers, for
`from_pretrained(..., attn_implementation="softprompt")`.
"""

from softprompt_kernels.integrations.patch import patch, unpatch
from softprompt_kernels.models.attention import register

__all__ = ["patch", "register", "unpatch"]
