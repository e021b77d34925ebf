"""Compress a long context into a soft prompt."""

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
    "KVPrompt",
    "PromptBank",
    "TeacherMoments",
    "kl_div",
    "linear_kl_div",
    "linear_kl_div_from_moments",
    "prompt_attention",
    "teacher_moments",
]
