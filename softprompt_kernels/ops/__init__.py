"""The ops: attention over a shared prompt, and KL divergences of language-model heads."""

from softprompt_kernels.ops.prompt_attention import prompt_attention

__all__ = ["prompt_attention"]
