"""A compressor: k learned summary tokens that a frozen model reads behind a text, and optionally LoRA.

    [ σ_{i−1} ; segment i ; k summary tokens ]   →   σ_i = keys and values that each layer computes for the k tokens

    replaced      σ = σ_n: the last state stands for all that was read (RMT, arXiv 2207.06881)
    accumulated   σ = [σ_1; …; σ_n]: segment i is read behind all earlier ones (AutoCompressors, arXiv 2305.14788)

The keys are rotated to where the prompt is: 0..k−1, or behind the earlier ones. Gist tokens (arXiv 2304.08467), ICAE
(arXiv 2307.06945) and 500xCompressor (arXiv 2408.03094) read one segment the same way. Models with learned positions
keep the keys as they are, as for every other prompt.

Cost of a context: one forward pass over C + n·k tokens. A segment has no graph unless LoRA is trained, or the state
that it is read behind has one. Attention sees the same keys as in a plain run over all tokens, so gradients are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_kernels.compress.compressor.form import Form
from softprompt_kernels.compress.compressor.lora import Lora
from softprompt_kernels.compress.compressor.segments import even_lengths
from softprompt_kernels.compress.teacher.context import move_keys
from softprompt_kernels.models import check_fixed_frequencies
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.capture import LayerSink
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.models.finite import check_finite
from softprompt_kernels.models.forward import run_base, wants_grad
from softprompt_kernels.prompts import Prefix
from softprompt_kernels.prompts.offload import input_device


class Compressor:
    """Summary tokens for a model.

    Args:
        model: prepared and frozen.
        form: what the compressor is.
        summary: `[k, d]`, embeddings in place of the embedding module's output. Kept in fp32 (float64 stays).
        lora: of the form's rank; None for rank 0.

    Raises:
        SoftPromptError: the model's rotary frequencies depend on the length, so that keys cannot be moved.
        ValueError: a shape or the rank does not fit.
    """

    def __init__(self, model: PreTrainedModel, form: Form, summary: Tensor, lora: Lora | None = None) -> None:
        check_fixed_frequencies(model)
        width = embedding_table(model).shape[1]
        if tuple(summary.shape) != (form.tokens, width):
            raise ValueError(f"summary: got shape {tuple(summary.shape)}, accepted is {(form.tokens, width)}")
        if (lora.rank if lora else 0) != form.lora_rank:
            raise ValueError(f"lora: got rank {lora.rank if lora else 0}, accepted is {form.lora_rank}")
        dtype = torch.float64 if summary.dtype == torch.float64 else torch.float32
        self.model, self.form, self.lora = model, form, lora
        self.summary = nn.Parameter(summary.detach().to(input_device(model), dtype, copy=True))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """LoRA is on within, for `read` and for the backward pass through it."""
        with self.lora.on() if self.lora else nullcontext():
            yield

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained."""
        return {"summary": self.summary, **(self.lora.named_parameters() if self.lora else {})}

    def read(self, contexts: Sequence[Tensor], lengths: Sequence[Sequence[int]], graph_segments: int = 0) -> Prefix:
        """The prompts of several contexts, in one forward pass a segment. To be called within `reading`.

        Args:
            contexts: R sequences of token ids `[C_r]`, int64.
            lengths: of the segments of each context, equally many; they add up to C_r.
            graph_segments: the gradient goes through the last so many segments. What was read before is a constant.

        Returns:
            A prefix of R rows without padding, in the model's dtype: k tokens, or n·k of n segments.
        """
        segments = _padded_segments(contexts, lengths)
        state: Prefix | None = None
        for index, (ids, real) in enumerate(segments):
            graph = torch.is_grad_enabled() and index >= len(segments) - graph_segments
            with torch.set_grad_enabled(graph):
                new = self._read_segment(ids, real, state)
            state = new if state is None or not self.form.accumulates else _joined(state, new)
        assert state is not None
        return state

    def _read_segment(self, ids: Tensor, real: Tensor | None, state: Prefix | None) -> Prefix:
        """The keys and values of the summary tokens behind `[state; segment]`, moved to the prompt's place.

        Args:
            ids: `[R, S]`.
            real: `[R]`, how many of them are tokens; None: all.
            state: k or more tokens for each row; None: nothing.
        """
        model, device = self.model, input_device(self.model)
        ids, known = ids.to(device), 0 if state is None else state.length
        real = None if real is None else real.to(device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.lora is not None or wants_grad(state))):
            sink = LayerSink()
            call = Call(state, key_lengths=real, sink=sink, wants_grad=torch.is_grad_enabled())
            run_base(model, call, known + torch.arange(ids.shape[1], device=device)[None], input_ids=ids)
            segment = sink.close()
            behind = segment if state is None else _joined(state, segment)
        graph, sink = torch.is_grad_enabled(), LayerSink()
        ends = known + (torch.full((ids.shape[0],), ids.shape[1], device=device) if real is None else real)
        behind = Prefix(behind.layers, None if real is None else ends)
        rows = self.summary.to(embedding_table(self.model).dtype).expand(ids.shape[0], -1, -1)
        positions = ends[:, None] + torch.arange(self.form.tokens, device=device)
        hidden = run_base(model, Call(behind, sink=sink, wants_grad=graph), positions, inputs_embeds=rows)
        if not graph:  # a training looks at its loss
            check_finite(model, "hidden states of the summary tokens", hidden)
        place = known if self.form.accumulates else 0
        return move_keys(model, sink.close(), place - ends)


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The weight `[V, d]` of a model's embedding."""
    return cast(Tensor, model.get_input_embeddings().weight)


def _padded_segments(
    contexts: Sequence[Tensor], lengths: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor | None]]:
    """The segments of R contexts that have equally many: a pair `(ids [R, S], real tokens [R])` for each.

    Args:
        contexts: token ids `[C_r]`.
        lengths: of the segments of each context; they add up to C_r.

    Returns:
        int64 tensors on the CPU. Shorter segments are padded on the right with token 0; `None` where none is.
    """
    parts = [context.cpu().split(list(of_one)) for context, of_one in zip(contexts, lengths, strict=True)]
    found = []
    for segment in zip(*parts, strict=True):
        ids = torch.nn.utils.rnn.pad_sequence(list(segment), batch_first=True)
        real = torch.tensor([part.shape[0] for part in segment])
        found.append((ids, None if bool((real == ids.shape[1]).all()) else real))
    return found


def _joined(first: Prefix, second: Prefix) -> Prefix:
    """The tokens of two prefixes of equally many rows, one behind the other."""
    return Prefix.of(
        (torch.cat((key, other_key), dim=2), torch.cat((value, other_value), dim=2))
        for (key, value), (other_key, other_value) in zip(first.layers, second.layers, strict=True)
    )


@torch.no_grad()
def read_once(compressor: Compressor, context_ids: Tensor) -> Prefix:
    """The prompt of one context, without a graph.

    Args:
        compressor: the compressor.
        context_ids: `[C]` or `[1, C]` int64.

    Returns:
        One row of `form.prompt_tokens(C)` tokens, in the model's dtype.

    Raises:
        SoftPromptError: the context has too many segments for the model's window, or a hidden state is not finite.
    """
    ids = context_ids.reshape(-1)
    lengths = even_lengths(ids.shape[0], compressor.form.segment_tokens)
    compressor.form.check_window(max_positions(compressor.model.config), len(lengths), max(lengths))
    with compressor.reading():
        return compressor.read([ids], [lengths])
