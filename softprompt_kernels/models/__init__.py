"""Run transformers models with a prefix: capture, forward, generate, sample, head, rotary shifts."""

from softprompt_kernels.models.capture import MemoryStore, TokenStore, capture, embed_prefix, prefix_of
from softprompt_kernels.models.decode.batch import DecodingBatch, DecodingRow, TokenScore
from softprompt_kernels.models.families import auto_class
from softprompt_kernels.models.forward import prompted_hidden, prompted_logits
from softprompt_kernels.models.generate import generate
from softprompt_kernels.models.head import Head, head_of
from softprompt_kernels.models.prepare import prepare, release
from softprompt_kernels.models.registry import register_family
from softprompt_kernels.models.rope import check_fixed_frequencies, shift_keys
from softprompt_kernels.models.sample import Continuation, sample
from softprompt_kernels.models.tap import FedTokens, QueryRecorder, QueryTap, ScoreFunction

__all__ = [
    "Continuation",
    "DecodingBatch",
    "DecodingRow",
    "FedTokens",
    "Head",
    "MemoryStore",
    "QueryRecorder",
    "QueryTap",
    "ScoreFunction",
    "TokenScore",
    "TokenStore",
    "auto_class",
    "capture",
    "check_fixed_frequencies",
    "embed_prefix",
    "generate",
    "head_of",
    "prefix_of",
    "prepare",
    "prompted_hidden",
    "prompted_logits",
    "register_family",
    "release",
    "sample",
    "shift_keys",
]
