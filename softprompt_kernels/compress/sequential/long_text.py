"""The inputs of a compression in segments, loaded and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.inputs import Loaded, RunInputs, check_window, load_inputs
from softprompt_kernels.compress.sequential.queries import PIECE, SegmentQueries, queries_by_segment
from softprompt_kernels.compress.sequential.segments import Segment, cut
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.families import max_positions


@dataclass(frozen=True, eq=False)
class LongText:
    """A long text and what is asked about it.

    Args:
        inputs: of the whole text. Its queries are those that a run in one piece would have.
        segments: of the text.
        queries: of each segment.
        fits: whether the model's window has room for the whole text with any query.
    """

    inputs: RunInputs
    segments: Sequence[Segment]
    queries: Sequence[SegmentQueries]
    fits: bool

    def segment_inputs(self, index: int) -> RunInputs:
        """The inputs of a run with one segment as its context."""
        segment, asked, config = self.segments[index], self.queries[index], self.inputs.config
        if not asked.heldout:
            config = config.model_copy(update={"evaluate_every": 0})
        return replace(
            self.inputs,
            config=config,
            text=segment.text,
            context_ids=segment.ids.to(self.inputs.model.device),
            train=asked.train,
            heldout=asked.heldout,
            test=asked.test,
        )


def load_long_text(config: CompressConfig, loaded: Loaded | None = None) -> LongText:
    """Load the inputs and check them. Nothing is written.

    Args:
        config: with `segment_tokens`.
        loaded: as in `load_inputs`.

    Raises:
        SoftPromptError: an input is invalid, or a segment does not fit into the model's window with the prompt before
            it and each query.
    """
    assert config.segment_tokens is not None
    inputs = load_inputs(config, loaded)
    segments = cut(inputs.chat, inputs.text, config.segment_tokens, PIECE)
    window, k = max_positions(inputs.model.config), config.tokens
    short = min(segments, key=lambda segment: segment.tokens)
    if short.tokens <= k:
        raise SoftPromptError(
            f"segment_tokens: got {config.segment_tokens}, which leaves segment {short.number} of {len(segments)} "
            f"{short.tokens} tokens, accepted is a size that leaves each more than tokens={k}"
        )
    before = [0 if segment.number == 1 else k for segment in segments]
    if config.state == "accumulated":
        before = [k * (segment.number - 1) for segment in segments]
    widest = max(segments, key=lambda segment: before[segment.number - 1] + segment.tokens)
    behind = before[widest.number - 1]
    if behind + widest.tokens >= window:
        hint = "; state=replaced has the same k tokens before every segment" if config.state == "accumulated" else ""
        raise SoftPromptError(
            f"segment_tokens: got {config.segment_tokens}; segment {widest.number} of {len(segments)} has "
            f"{widest.tokens} tokens behind a prompt of {behind}, accepted is less than {window} together, the model's "
            f"window{hint}"
        )
    queries = queries_by_segment(config, segments)
    asked = [query for own in queries for query in (*own.train, *own.heldout, *own.test)]
    check_window(inputs.model, inputs.chat, behind + widest.tokens, asked, config.new_tokens)
    return LongText(inputs, segments, queries, _fits(inputs, asked))


def _fits(inputs: RunInputs, asked: Sequence[Query]) -> bool:
    if inputs.context_tokens >= max_positions(inputs.model.config):
        return False
    try:
        check_window(inputs.model, inputs.chat, inputs.context_tokens, asked, inputs.config.new_tokens)
    except SoftPromptError:
        return False
    return True
