"""From a text to a soft prompt: queries, teacher, training, evaluation.

Names are imported when they are first asked for: `softprompt --help` and a mistake in a configuration need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt_kernels.compress.config import CompressConfig, load_config
    from softprompt_kernels.compress.forecast import Plan, plan
    from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
    from softprompt_kernels.compress.run import Interrupted, compress, evaluate_prompt
    from softprompt_kernels.compress.sources.chat import ChatFormat
    from softprompt_kernels.compress.sources.model import load_model

__all__ = [
    "Advance",
    "ChatFormat",
    "CompressConfig",
    "Interrupted",
    "Plan",
    "Reporter",
    "SilentReporter",
    "compress",
    "evaluate_prompt",
    "load_config",
    "load_model",
    "plan",
]

_HOMES = {
    "ChatFormat": "softprompt_kernels.compress.sources.chat",
    "CompressConfig": "softprompt_kernels.compress.config",
    "load_config": "softprompt_kernels.compress.config",
    "Plan": "softprompt_kernels.compress.forecast",
    "plan": "softprompt_kernels.compress.forecast",
    "load_model": "softprompt_kernels.compress.sources.model",
    "Advance": "softprompt_kernels.compress.reporter",
    "Reporter": "softprompt_kernels.compress.reporter",
    "SilentReporter": "softprompt_kernels.compress.reporter",
    "Interrupted": "softprompt_kernels.compress.run",
    "compress": "softprompt_kernels.compress.run",
    "evaluate_prompt": "softprompt_kernels.compress.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
