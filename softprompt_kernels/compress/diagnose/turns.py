"""How the teacher's answers end: by a token that ends an answer, at the most tokens they may have, or in another turn.

An answer goes on with the next turn if it holds, before its last token, a control token of the tokenizer or, at the
start of a line, what the chat template puts before a query ("Question:", "[INST]"). Some models open further parts of
their own turn with control tokens; these are told by the opening of the answer that follows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress.diagnose.evidence import Turns
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.sources.template import ChatTemplate
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.models import Head
from softprompt_kernels.models.families import max_positions

_QUERY, _ANSWER = "«the query goes here»", "«the answer goes here»"
_NEAR = 40  # characters in which the opening of an answer is looked for
_SHOWN = 160  # characters of the example
_ROWS = 256  # rows of logits in memory at once


def turns_of(inputs: RunInputs, taught: Taught) -> Turns:
    """How the answers of a run end that the teacher wrote itself.

    Args:
        inputs: of the run.
        taught: with the teacher's hidden states of evaluated examples.
    """
    ends, marks = end_tokens(inputs.model, inputs.chat), TurnMarks.of(inputs.chat)
    written = [
        example
        for name, queries in inputs.sets.items()
        for query, example in zip(queries, taught.examples[name], strict=True)
        if query.output is None
    ]
    running = [example for example in written if marks.goes_on(inputs.tokenizer, example, ends)]
    states = [
        state
        for name, queries in taught.queries.items()
        for query, state in zip(queries, taught.states[name], strict=True)
        if query.output is None
    ]
    return Turns(
        answers=len(written),
        ended=sum(example.output_ids[-1] in ends for example in written),
        running_on=len(running),
        example=_shown(inputs.tokenizer, running[0]) if running else "",
        end_rendered=marks.end_rendered,
        end_probability=_probability(inputs.objective.head, states, ends),
        window=max_positions(inputs.model.config),
    )


@dataclass(frozen=True)
class TurnMarks:
    """What a chat template puts around the turns.

    Args:
        question: the last line before a query; "" if there is none.
        opening: the last line before an answer; "" if there is none.
        end_rendered: whether a control token stands behind an answer; True where the template shows none.
        controls: the control tokens of the tokenizer, without those that the template writes within an answer.
    """

    question: str
    opening: str
    end_rendered: bool
    controls: frozenset[int]

    @classmethod
    def of(cls, chat: ChatFormat) -> TurnMarks:
        """The marks of a chat format."""
        tokenizer, source = chat.tokenizer, json.loads(chat.rendered_from)
        time = datetime.fromisoformat(source["time"])
        template = ChatTemplate(tokenizer, source["template"], source["arguments"], time)
        before, _, opening = (template.render(None, _QUERY) or "").partition(_QUERY)
        if tokenizer.bos_token and tokenizer.bos_token not in opening:  # else it opens turns too
            before = before.removeprefix(tokenizer.bos_token)
        answered = (template.render(None, _QUERY, _ANSWER) or "").partition(_QUERY)[2]
        lead, shown, end = answered.removeprefix(opening).partition(_ANSWER)
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        added |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        return cls(
            question=_last_line(before),
            opening=_last_line(opening),
            end_rendered=not source["template"] or not shown or any(name in end for name in added.values()),
            controls=frozenset(index for index, name in added.items() if name not in lead),
        )

    def goes_on(self, tokenizer: PreTrainedTokenizerBase, example: Example, ends: AbstractSet[int]) -> bool:
        """Whether an answer goes on with another turn.

        Args:
            tokenizer: of the model.
            example: with the answer.
            ends: the tokens that end an answer.
        """
        answer = example.output_ids[:-1] if example.output_ids[-1] in ends else example.output_ids
        place = next((i for i, token in enumerate(answer) if token in self.controls), None)
        if place is not None:
            rest = _decode(tokenizer, answer[place:])
            if not self.opening or self.opening not in rest[: len(self.opening) + _NEAR]:
                return True
        return bool(self.question) and any(map(self._asks, _decode(tokenizer, answer).split("\n")))

    def _asks(self, line: str) -> bool:
        """Whether a line opens a query. A mark that is only a word, such as "user", must be the whole line."""
        line = line.strip()
        return line == self.question or (not self.question[-1].isalnum() and line.startswith(self.question))


@torch.no_grad()
def _probability(head: Head, states: Sequence[Tensor], ends: AbstractSet[int]) -> float | None:
    """Mean probability of the tokens that end an answer, over the teacher's hidden states `[n_i, d]`."""
    if not states or not ends:
        return None
    hidden, total = torch.cat(list(states)), 0.0
    index = torch.tensor(sorted(ends), device=head.weight.device)
    for start in range(0, hidden.shape[0], _ROWS):
        logits = head.logits(hidden[start : start + _ROWS].to(head.weight.dtype)).float()
        total += float(logits.softmax(-1)[:, index].sum())
    return total / hidden.shape[0]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def _shown(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return " ".join(_decode(tokenizer, example.output_ids).split())[-_SHOWN:]
