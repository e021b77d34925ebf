"""One context compressed from text to soft prompt: queries, teacher, training, evaluation.

A name is imported when it is first used, so that `softprompt --help` and an error in a configuration need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt_kernels.compress.composition.compose import compose
    from softprompt_kernels.compress.composition.forecast import plan_composition
    from softprompt_kernels.compress.composition.join import join_prompts
    from softprompt_kernels.compress.compressor.compressor import Compressor, read_once
    from softprompt_kernels.compress.compressor.store import load_compressor
    from softprompt_kernels.compress.compressor_runs.config import CompressorConfig
    from softprompt_kernels.compress.compressor_runs.forecast import CompressorPlan, plan_compressor
    from softprompt_kernels.compress.compressor_runs.once import read_context
    from softprompt_kernels.compress.compressor_runs.run import train_compressor
    from softprompt_kernels.compress.config import CompressConfig
    from softprompt_kernels.compress.config_file import load_config
    from softprompt_kernels.compress.diagnose.run import diagnose_run
    from softprompt_kernels.compress.evaluate.suites.made import make_suite
    from softprompt_kernels.compress.evaluate.suites.suite import Suite, write_suite
    from softprompt_kernels.compress.forecast import Plan
    from softprompt_kernels.compress.process.interrupted import Interrupted
    from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
    from softprompt_kernels.compress.saved_prompt import evaluate_prompt
    from softprompt_kernels.compress.sources.chat import ChatFormat
    from softprompt_kernels.compress.sources.model import load_model
    from softprompt_kernels.compress.start import compress, plan
    from softprompt_kernels.compress.suite_run import evaluate_suite, suite_config, suite_of

__all__ = [
    "Advance",
    "ChatFormat",
    "CompressConfig",
    "Compressor",
    "CompressorConfig",
    "CompressorPlan",
    "Interrupted",
    "Plan",
    "Reporter",
    "SilentReporter",
    "Suite",
    "compose",
    "compress",
    "diagnose_run",
    "evaluate_prompt",
    "evaluate_suite",
    "join_prompts",
    "load_compressor",
    "load_config",
    "load_model",
    "make_suite",
    "plan",
    "plan_composition",
    "plan_compressor",
    "read_context",
    "read_once",
    "suite_config",
    "suite_of",
    "train_compressor",
    "write_suite",
]

_MODULES = {
    "compose": "softprompt_kernels.compress.composition.compose",
    "plan_composition": "softprompt_kernels.compress.composition.forecast",
    "join_prompts": "softprompt_kernels.compress.composition.join",
    "ChatFormat": "softprompt_kernels.compress.sources.chat",
    "CompressConfig": "softprompt_kernels.compress.config",
    "Compressor": "softprompt_kernels.compress.compressor.compressor",
    "read_once": "softprompt_kernels.compress.compressor.compressor",
    "load_compressor": "softprompt_kernels.compress.compressor.store",
    "CompressorConfig": "softprompt_kernels.compress.compressor_runs.config",
    "CompressorPlan": "softprompt_kernels.compress.compressor_runs.forecast",
    "plan_compressor": "softprompt_kernels.compress.compressor_runs.forecast",
    "read_context": "softprompt_kernels.compress.compressor_runs.once",
    "train_compressor": "softprompt_kernels.compress.compressor_runs.run",
    "load_config": "softprompt_kernels.compress.config_file",
    "Plan": "softprompt_kernels.compress.forecast",
    "plan": "softprompt_kernels.compress.start",
    "load_model": "softprompt_kernels.compress.sources.model",
    "Advance": "softprompt_kernels.compress.reporter",
    "Reporter": "softprompt_kernels.compress.reporter",
    "SilentReporter": "softprompt_kernels.compress.reporter",
    "Interrupted": "softprompt_kernels.compress.process.interrupted",
    "compress": "softprompt_kernels.compress.start",
    "diagnose_run": "softprompt_kernels.compress.diagnose.run",
    "evaluate_prompt": "softprompt_kernels.compress.saved_prompt",
    "Suite": "softprompt_kernels.compress.evaluate.suites.suite",
    "write_suite": "softprompt_kernels.compress.evaluate.suites.suite",
    "make_suite": "softprompt_kernels.compress.evaluate.suites.made",
    "evaluate_suite": "softprompt_kernels.compress.suite_run",
    "suite_config": "softprompt_kernels.compress.suite_run",
    "suite_of": "softprompt_kernels.compress.suite_run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
