"""Where the context ends and the query begins, in tokens.

The teacher reads `c ‖ z` and the student `σ ‖ z`, so both have to be cut at the same place. With a chat template the
context is the system turn, under a line that says what it is for, and the query is the user turn with the opening of
the model's answer. A template that has no system role gets the context at the start of the user turn. Without a
template the context is plain text and the query a "Question / Answer" pair.
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
    """Texts to tokens, for one tokenizer.

    Raises:
        SoftPromptError: a chat template that cannot be rendered, or that does not keep context before query.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        before, between, after = self._pieces()
        # A new line or turn marker that follows the context belongs to the context: the query then starts as a turn
        # does.
        self.context_start, self.context_end, self.query_start, self.query_end = before, *between, after

    def context_ids(self, text: str) -> Tensor:
        """`[1, C]` int64: what the teacher reads before every query.

        Raises:
            SoftPromptError: a text without content.
        """
        if not text.strip():
            raise SoftPromptError("context: got an empty text, accepted is one with at least a word")
        return torch.tensor([self._encode(f"{self.context_start}{INSTRUCTION}{text.strip()}{self.context_end}")])

    def bare_ids(self) -> Tensor | None:
        """`[1, n]` int64: what the template puts before a query when there is no context; None where that is nothing.

        The model alone is the model behind this, as its template would run it: with the token that begins a text, the
        opening of the turn, and the system turn that some templates bring along.
        """
        bare = self.context_start
        if self.tokenizer.chat_template:
            rendered = self._render([{"role": "user", "content": _QUERY}]) or ""
            before = rendered.partition(_QUERY)[0]
            bare = before.removesuffix(self.query_start)
        ids = self._encode(bare)
        return torch.tensor([ids]) if ids else None

    def query_ids(self, text: str) -> list[int]:
        """The tokens of one query, up to where the answer starts."""
        return self._encode(f"{self.query_start}{text.strip()}{self.query_end}")

    def output_ids(self, text: str) -> list[int]:
        """The tokens of an answer, with the token that ends it."""
        ids = self._encode(text.strip() if self.query_end.endswith(("\n", ">")) else " " + text.strip())
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, int(end)]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pieces(self) -> tuple[str, tuple[str, str], str]:
        if not self.tokenizer.chat_template:
            return self.tokenizer.bos_token or "", ("\n\n", "Question: "), "\nAnswer:"
        system, user = {"role": "system", "content": _CONTEXT}, {"role": "user", "content": _QUERY}
        rendered = self._render([system, user])
        if rendered is None or _CONTEXT not in rendered or _QUERY not in rendered.partition(_CONTEXT)[2]:
            rendered = self._render([{"role": "user", "content": f"{_CONTEXT}\n\n{_QUERY}"}])
            if rendered is None or _CONTEXT not in rendered or _QUERY not in rendered.partition(_CONTEXT)[2]:
                raise SoftPromptError("tokenizer: its chat template keeps neither a system turn nor a user turn whole")
            before, _, rest = rendered.partition(_CONTEXT)
            between, _, after = rest.partition(_QUERY)
            return before, (between, ""), after
        before, _, rest = rendered.partition(_CONTEXT)
        between, _, after = rest.partition(_QUERY)
        alone = self._render([system], add_generation_prompt=False) or ""
        turn_end = alone.partition(_CONTEXT)[2]
        if not between.startswith(turn_end):
            turn_end = ""
        return before, (turn_end, between[len(turn_end) :]), after

    def _render(self, messages: list[dict[str, str]], **options: Any) -> str | None:
        options = {"add_generation_prompt": True, **options}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # a template may raise anything: jinja's errors, or its own for a role that it does not know
            return None
