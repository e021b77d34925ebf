"""The ops: attention over [soft prompt ; own tokens], and KL divergences of language-model heads."""

from softprompt_kernels.ops.kl_div import kl_div
from softprompt_kernels.ops.linear_kl_div import linear_kl_div
from softprompt_kernels.ops.moments import TeacherMoments, linear_kl_div_from_moments, teacher_moments
from softprompt_kernels.ops.prompt_attention import prompt_attention

__all__ = [
    "TeacherMoments",
    "kl_div",
    "linear_kl_div",
    "linear_kl_div_from_moments",
    "prompt_attention",
    "teacher_moments",
]
