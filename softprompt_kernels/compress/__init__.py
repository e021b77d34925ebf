"""From a text to a soft prompt: queries, teacher, training, evaluation."""

from softprompt_kernels.compress.chat import ChatFormat
from softprompt_kernels.compress.config import CompressConfig, load_config
from softprompt_kernels.compress.loading import load_model
from softprompt_kernels.compress.plan import Plan, plan
from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
from softprompt_kernels.compress.run import Interrupted, compress, evaluate_prompt

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
