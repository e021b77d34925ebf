"""Compress a long context into a soft prompt.

A public name is imported when it is first used. `softprompt --help` and checks of a configuration therefore need no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt_kernels.integrations import patch, unpatch
    from softprompt_kernels.losses import JSDLoss, KLDivLoss, LinearKLDivLoss
    from softprompt_kernels.ops import (
        TeacherMoments,
        kl_div,
        linear_kl_div,
        linear_kl_div_from_moments,
        prompt_attention,
        teacher_moments,
    )
    from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, PromptBank

__all__ = [
    "EmbeddingPrompt",
    "JSDLoss",
    "KLDivLoss",
    "KVPrompt",
    "LinearKLDivLoss",
    "PromptBank",
    "TeacherMoments",
    "kl_div",
    "linear_kl_div",
    "linear_kl_div_from_moments",
    "patch",
    "prompt_attention",
    "teacher_moments",
    "unpatch",
]

_MODULE_OF = {
    "JSDLoss": "softprompt_kernels.losses",
    "KLDivLoss": "softprompt_kernels.losses",
    "LinearKLDivLoss": "softprompt_kernels.losses",
    "TeacherMoments": "softprompt_kernels.ops",
    "kl_div": "softprompt_kernels.ops",
    "linear_kl_div": "softprompt_kernels.ops",
    "linear_kl_div_from_moments": "softprompt_kernels.ops",
    "prompt_attention": "softprompt_kernels.ops",
    "teacher_moments": "softprompt_kernels.ops",
    "patch": "softprompt_kernels.integrations",
    "unpatch": "softprompt_kernels.integrations",
    "EmbeddingPrompt": "softprompt_kernels.prompts",
    "KVPrompt": "softprompt_kernels.prompts",
    "PromptBank": "softprompt_kernels.prompts",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("softprompt_kernels.losses")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value
