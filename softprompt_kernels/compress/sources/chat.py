"""The chat format: the tokens of a context, of a query and of an answer.

The teacher reads `c ‖ z` and the student `σ ‖ z`, so a chat has to be cut at the end of the context. With a chat
template, the context is the system turn, after a line of instruction, and the query is the user turn with the opening
of the model's answer. If the template has no system role, the context stands at the start of the user turn. Without a
template, the context is plain text and the query a "Question / Answer" pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.errors import SoftPromptError

INSTRUCTION = "Answer from this text.\n\n"
_CONTEXT = "«the context goes here»"
_QUERY = "«the query goes here»"


class ChatFormat:
    """Converts texts to tokens, for one tokenizer.

    Raises:
        SoftPromptError: the chat template cannot be rendered, or does not put the context before the query.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A line feed or turn marker after the context belongs to the context, so that the query starts a turn.
        self.context_start, self.context_end, self.query_start, self.query_end = self._split_template()

    def context_ids(self, text: str) -> Tensor:
        """`[1, C]` int64: the tokens of a context, which the teacher reads before every query.

        Raises:
            SoftPromptError: the text is empty or blank.
        """
        if not text.strip():
            raise SoftPromptError("context: got an empty text, accepted is text with at least one word")
        return torch.tensor([self._encode(f"{self.context_start}{INSTRUCTION}{text.strip()}{self.context_end}")])

    def no_context_ids(self) -> Tensor | None:
        """`[1, n]` int64: the tokens that the template puts before a query without a context; None if there are none.

        These may be the BOS token, the opening of the user turn, and the default system turn of some templates. They
        make the baseline "no context" the chat that the template renders for the query alone.
        """
        start = self.context_start
        if self.tokenizer.chat_template:
            rendered = self._render([{"role": "user", "content": _QUERY}]) or ""
            before = rendered.partition(_QUERY)[0]
            start = before.removesuffix(self.query_start)
        ids = self._encode(start)
        return torch.tensor([ids]) if ids else None

    def query_ids(self, text: str) -> list[int]:
        """The tokens of one query, up to the start of the answer."""
        return self._encode(f"{self.query_start}{text.strip()}{self.query_end}")

    def output_ids(self, text: str) -> list[int]:
        """The tokens of an answer, with the EOS token if the tokenizer has one."""
        ids = self._encode(text.strip() if self.query_end.endswith(("\n", ">")) else " " + text.strip())
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, int(end)]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _split_template(self) -> tuple[str, str, str, str]:
        """The text before and after a context, and the text before and after a query."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.bos_token or "", "\n\n", "Question: ", "\nAnswer:"
        system, user = {"role": "system", "content": _CONTEXT}, {"role": "user", "content": _QUERY}
        rendered = self._render([system, user])
        if rendered is None or _CONTEXT not in rendered or _QUERY not in rendered.partition(_CONTEXT)[2]:
            rendered = self._render([{"role": "user", "content": f"{_CONTEXT}\n\n{_QUERY}"}])
            if rendered is None or _CONTEXT not in rendered or _QUERY not in rendered.partition(_CONTEXT)[2]:
                raise SoftPromptError("tokenizer: its chat template keeps neither a system turn nor a user turn intact")
            before, _, rest = rendered.partition(_CONTEXT)
            between, _, after = rest.partition(_QUERY)
            return before, between, "", after
        before, _, rest = rendered.partition(_CONTEXT)
        between, _, after = rest.partition(_QUERY)
        alone = self._render([system], add_generation_prompt=False) or ""
        turn_end = alone.partition(_CONTEXT)[2]
        if not between.startswith(turn_end):
            turn_end = ""
        return before, turn_end, between[len(turn_end) :], after

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str | None:
        options = {"add_generation_prompt": True, **options}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # a template may raise anything: jinja's errors, or its own for a role it does not support
            return None
