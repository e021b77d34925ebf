"""Compress a long context into a soft prompt."""

from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, PromptBank

__all__ = [
    "EmbeddingPrompt",
    "KVPrompt",
    "PromptBank",
    "prompt_attention",
]
