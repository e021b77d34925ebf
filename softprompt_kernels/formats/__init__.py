"""Soft prompts in the files of other packages: export, import, inspection, model card, hub."""

from softprompt_kernels.formats.card import card_text
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.hub import push
from softprompt_kernels.formats.importing import import_prompt
from softprompt_kernels.formats.inspection import fit, inspection
from softprompt_kernels.formats.vllm import completion_request

__all__ = [
    "Content",
    "card_text",
    "completion_request",
    "export",
    "fit",
    "import_prompt",
    "inspection",
    "push",
    "read",
]
