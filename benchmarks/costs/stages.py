"""What each stage of a run has to compute and to move on one of G ranks, from the shapes of the model alone.

L layers, d hidden size, Hq query heads and Hkv key heads of size D, V vocabulary, N weights in the layers, C context, k
prompt, Q queries of z tokens with answers of n, B sequences a step, r rows. Weights, keys and values have 2 bytes, rows
4 where they are fitted. κ = 4·L·Hkv·D bytes are the keys and values of a token.

| stage | FLOP | bytes of memory |
|---|---|---|
| context, in chunks of S tokens | 2NC + 2·L·Hq·D·C² | weights and earlier keys once a chunk: 2N·C/S + κC²/2S |
| answers, A at a time | Q(z+n)(2N + 4·L·Hq·D·C) + 2QnVd | weights, context, head a step: Q/A·(n+1)(2N + κC + 2Vd) |
| targets | 6·QnVd: three GEMMs with the head on a GPU | the head once for 1024 tokens |
| matching | 8·r·L·Hq·D·C, r·L·Hq(6Dk + 4k²), 14·T·512·L·Hq·D·k | context twice, rows, the rows of a step T times |
| training, T steps | T·B((z+n)(4N + 14·L·Hq·D·k) + 6nVd) | weights and head twice a step |
| evaluation | 50 sequences: one pass of the teacher, five of students | weights and head once for 1024 tokens |

Every rank reads the whole context. Queries, sequences of a step and of the evaluation are shared out, and so are the
layers of matching. A stage is a sum of pieces: a piece has one dtype and one bound.

The terms of the ops are those that `python -m benchmarks.counted` counts: attention takes 2 GEMMs forward (4·D FLOP for
a pair of query and key) and 5 backward (10·D).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

CHUNK = 1024  # tokens of a context, or of an evaluation, that go through the model at once
BATCH_ANSWERS = 128
ROWS_A_STEP = 512
EVALUATED = 50  # sequences


@dataclass(frozen=True)
class Model:
    """Shapes of a model, without biases and norms."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    size: int
    intermediate: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """N: the weights of all layers, without embedding and head."""
        attention = self.hidden * self.size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the layers."""
        return 2 * self.layer_weights

    @property
    def head_bytes(self) -> int:
        """Bytes of the head, and the FLOP of its logits for a token."""
        return 2 * self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of layers, embedding and head."""
        return self.layer_bytes + 2 * self.head_bytes

    @property
    def kv_bytes(self) -> int:
        """κ."""
        return 4 * self.layers * self.kv_heads * self.size

    @property
    def pair(self) -> int:
        """FLOP of one GEMM of attention for a pair of query and key token, in all layers: 2·L·Hq·D."""
        return 2 * self.layers * self.heads * self.size


LLAMA_8B = Model("8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Model("70B", 80, 8192, 64, 8, 128, 28672, 128256)


@dataclass(frozen=True)
class Job:
    """A run: the defaults of `softprompt compress`."""

    context: int
    tokens: int
    queries: int = 256
    question: int = 32
    answer: int = 48
    rows: int = 6144
    refinement: int = 300
    steps: int = 200
    batch: int = 8


@dataclass(frozen=True)
class Piece:
    """A part of a stage, on one rank.

    Args:
        flop, bytes_moved, exponentials: of this rank.
        dtype: of its GEMMs.
        weight_passes: how often it reads all layers, parts of which a sharded base receives each time.
        summed_bytes: gradients that all ranks sum.
    """

    flop: float
    bytes_moved: float
    exponentials: float = 0.0
    dtype: str = "bf16"
    weight_passes: float = 0.0
    summed_bytes: float = 0.0


def stages(model: Model, job: Job, ranks: int = 1) -> dict[str, list[Piece]]:
    """The pieces of each stage, on the rank with the most work."""
    return {
        "context": [capture(model, job.context)],
        "answers": answers(model, job, ranks),
        "targets": [targets(model, job, ranks)],
        "matching": matching(model, job, ranks),
        "training": [training(model, job, ranks)] if job.steps else [],
        "evaluation": [evaluation(model, job, ranks)],
    }


def capture(model: Model, context: int) -> Piece:
    """A context in chunks, each with the chunks before it as its prefix."""
    chunks = context / CHUNK
    return Piece(
        flop=2 * model.layer_weights * context + model.pair * context**2,
        bytes_moved=chunks * model.layer_bytes + model.kv_bytes * (context * chunks / 2 + context),
        exponentials=model.layers * model.heads * context**2 / 2,
        weight_passes=chunks,
    )


def answers(model: Model, job: Job, ranks: int) -> list[Piece]:
    """Reading the questions, and writing the answers token by token, behind one context that a batch shares."""
    queries = ceil(job.queries / ranks)
    batches = ceil(queries / BATCH_ANSWERS)
    step = model.layer_bytes + model.kv_bytes * job.context + model.head_bytes

    def tokens(count: int, passes: int, logits: int) -> Piece:
        flop = count * (2 * model.layer_weights + 2 * model.pair * job.context) + logits * model.head_bytes
        seen = count * model.layers * model.heads * job.context
        return Piece(flop, passes * step, seen, weight_passes=passes)

    read = tokens(queries * job.question, batches, queries)
    written = tokens(queries * job.answer, batches * job.answer, queries * job.answer)
    return [read, written]


def targets(model: Model, job: Job, ranks: int) -> Piece:
    """Moments of the answers."""
    tokens = ceil(job.queries / ranks) * job.answer
    return Piece(3 * model.head_bytes * tokens, model.head_bytes * tokens / CHUNK)


def matching(model: Model, job: Job, ranks: int) -> list[Piece]:
    """Rows against the context, the closed form, and refinement: fp32. Layers are shared out."""
    share = ceil(model.layers / ranks) / model.layers
    rows, k, pairs = job.rows, job.tokens, share * job.rows * model.layers * model.heads
    row_bytes = share * 4 * model.layers * model.heads * (2 * model.size + 1)
    against_context = Piece(
        flop=share * 4 * rows * model.pair * job.context,
        bytes_moved=share * 2 * model.kv_bytes * job.context + 3 * rows * row_bytes,
        exponentials=3 * pairs * job.context,
        dtype="fp32",
    )
    closed_form = Piece(
        pairs * (6 * model.size * k + 4 * k**2), 3 * rows * row_bytes, exponentials=2 * pairs * k, dtype="fp32"
    )
    in_steps = job.refinement * ROWS_A_STEP
    refinement = Piece(
        flop=share * 7 * in_steps * model.pair * k,
        bytes_moved=3 * in_steps * row_bytes,
        exponentials=share * 2 * in_steps * model.layers * model.heads * k,
        dtype="fp32",
    )
    return [against_context, closed_form, refinement]


def training(model: Model, job: Job, ranks: int) -> Piece:
    """Steps end to end: forward, and backward to the prompt alone."""
    sequences, tokens = job.steps * ceil(job.batch / ranks), job.question + job.answer
    attention = 7 * model.pair * job.tokens
    return Piece(
        flop=sequences * (tokens * (4 * model.layer_weights + attention) + 3 * model.head_bytes * job.answer),
        bytes_moved=job.steps * 2 * (model.layer_bytes + model.head_bytes),
        exponentials=2 * sequences * tokens * model.layers * model.heads * job.tokens,
        weight_passes=2 * job.steps,
        summed_bytes=job.steps * 2 * model.kv_bytes * job.tokens,  # fp32
    )


def evaluation(model: Model, job: Job, ranks: int) -> Piece:
    """A pass of the teacher and five of students, with their logits."""
    tokens = ceil(EVALUATED / ranks) * (job.question + job.answer)
    passes, seen = ceil(tokens / CHUNK), job.context + 5 * job.tokens
    return Piece(
        flop=tokens * (6 * 2 * model.layer_weights + 2 * model.pair * seen + 6 * model.head_bytes),
        bytes_moved=passes * (6 * (model.layer_bytes + model.head_bytes) + model.kv_bytes * seen),
        exponentials=tokens * model.layers * model.heads * seen,
        weight_passes=6 * passes,
    )
