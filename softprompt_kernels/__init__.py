"""Compress a long context into a soft prompt."""

from softprompt_kernels.ops import prompt_attention

__all__ = ["prompt_attention"]
