"""Soft prompts: their parameters, their initialisation, and their files."""

from softprompt_kernels.prompts.adapter import check_destination, describe, load, save
from softprompt_kernels.prompts.bank import PromptBank
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.prefix import Prefix

__all__ = [
    "EmbeddingPrompt",
    "KVPrompt",
    "Prefix",
    "PromptBank",
    "check_destination",
    "describe",
    "load",
    "save",
]
