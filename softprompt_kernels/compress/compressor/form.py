"""What a compressor is, beside its numbers. No torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softprompt_kernels.compress.compressor.segments import even_lengths
from softprompt_kernels.errors import SoftPromptError

State = Literal["replaced", "accumulated"]


@dataclass(frozen=True)
class Form:
    """What a compressor is, beside its numbers.

    Args:
        tokens: k, the summary tokens.
        state: what becomes of the prompts of earlier segments.
        segment_tokens: the longest segment.
        lora_rank: r; 0 for no LoRA.
    """

    tokens: int
    state: State
    segment_tokens: int
    lora_rank: int = 0

    def prompt_tokens(self, context_tokens: int) -> int:
        """The length of the prompt of a context."""
        return self.tokens * (len(even_lengths(context_tokens, self.segment_tokens)) if self.accumulates else 1)

    @property
    def accumulates(self) -> bool:
        """Whether the state grows."""
        return self.state == "accumulated"

    def check_window(self, window: int, segments: int, longest: int) -> None:
        """Check that the model's window has room for a state, a segment and the summary tokens.

        Args:
            window: of the model, in tokens.
            segments: of the longest context.
            longest: tokens of its longest segment.

        Raises:
            SoftPromptError: it has not.
        """
        before = self.tokens * ((segments - 1) if self.accumulates else min(1, segments - 1))
        room = window - before - self.tokens
        if longest > room:
            raise SoftPromptError(
                f"segment_tokens: got {longest} for a model with a window of {window}, of which the state "
                f"takes {before} tokens and the summary {self.tokens}; accepted is "
                + (f"1 to {room}" if room > 0 else "a larger window, or fewer summary tokens or segments")
            )
